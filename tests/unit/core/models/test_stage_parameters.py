"""What is computed from the table of weights is what the modules of every stage and rank really hold."""

import math
from dataclasses import replace

import pytest
import torch
from model_testing import TINY_MODEL

from megatron.core.config import ParallelConfig
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.models.mixtral.weights import mixtral_table
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import named_shards, spec_of
from tools.traffic.volume import Step, _Account

# tensor-, expert- and expert-tensor-parallel size, sequence parallelism
LAYOUTS = {
    "one process": (1, 1, 1, False),
    "tp2": (2, 1, 2, False),
    "tp2 sp": (2, 1, 2, True),
    "tp2 sp ep2 etp1": (2, 2, 1, True),
    "ep4": (1, 4, 1, False),
    "tp2 sp ep2 etp2": (2, 2, 2, True),
}


def _groups(tp: int, ep: int, etp: int, rank: int) -> ProcessGroups:
    return ProcessGroups(
        tp=Group(tuple(range(tp)), rank % tp),
        etp=Group(tuple(range(etp)), rank % etp),
        ep=Group(tuple(range(ep)), rank // etp),
        ep_etp=Group(tuple(range(ep * etp)), rank),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_holds_the_rows_of_its_table_in_their_order(layout: str) -> None:
    tp, ep, etp, sp = LAYOUTS[layout]
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=sp,
    )
    table = mixtral_table(TINY_MODEL, TINY_MODEL.padded_vocab_size(tp))
    world = 2 * max(tp, ep * etp)
    step = Step(
        model=TINY_MODEL, parallel=parallel, world_size=world, seq_length=16, micro_batch_size=1, num_microbatches=1
    )  # fmt: skip
    found = set()
    for rank in range(world // 2):
        groups = _groups(tp, ep, etp, rank % (ep * etp))
        for pp_rank, (stage,) in enumerate(parallel.stages(TINY_MODEL.num_layers)):
            model = MixtralModel(
                TINY_MODEL, groups=groups, sequence_parallel=sp, device=torch.device("meta"), stage=stage
            )
            experts = range(groups.ep.rank * 4 // ep, (groups.ep.rank + 1) * 4 // ep)
            expected = {
                (rule.name, name, rule.part_shape(tp if rule.expert is None else etp))
                for name, rule in table.named_weights(stage, experts)
            }
            shards = list(named_shards(model, model.first_layer))
            assert {(s.global_name, s.stage_name, tuple(s.data.shape)) for s in shards} == expected
            found |= {shard.global_name for shard in shards}
            # the parameters in their order, as the gradient buffers and the traffic of a step count on
            counted = list(_Account(step, pp_rank)._parameters(stage))
            held = [(spec_of(p).is_expert, spec_of(p).sequence_partial_grad, p.numel()) for p in model.parameters()]
            assert [(r.is_expert, sp and r.partition_dim is None, elements) for r, elements in counted] == held
    assert found == {rule.name for rule in table.weights()}


def test_elements_are_those_of_the_model_without_padding() -> None:
    for config in (TINY_MODEL, replace(TINY_MODEL, num_layers=3, num_experts=5, kv_channels=24)):
        model = MixtralModel(config, groups=ProcessGroups(), sequence_parallel=False, device=torch.device("meta"))
        assert config.vocab_size is not None and config.padded_vocab_size(1) > config.vocab_size
        padding = 2 * (config.padded_vocab_size(1) - config.vocab_size) * config.hidden_size
        assert model.table.elements == sum(parameter.numel() for parameter in model.parameters()) - padding
        assert model.table.elements == sum(math.prod(rule.shape) for rule in mixtral_table(config).weights())


def test_only_matrices_decay_and_only_what_is_whole_is_summed_over_a_split_sequence() -> None:
    groups = _groups(2, 1, 2, 0)
    model = MixtralModel(TINY_MODEL, groups=groups, sequence_parallel=True, device=torch.device("meta"))
    specs = {name: spec_of(parameter) for name, parameter in model.named_parameters()}
    norms = {name for name in specs if "layernorm" in name}
    assert {name for name, spec in specs.items() if not spec.weight_decay} == norms
    assert {name for name, spec in specs.items() if spec.init_std is None} == norms
    routers = {name for name in specs if name.endswith("router.weight")}
    assert {name for name, spec in specs.items() if spec.sequence_partial_grad} == norms | routers
    residual = {name: spec.init_std for name, spec in specs.items() if "proj" in name or "fc2" in name}
    assert set(residual.values()) == {TINY_MODEL.output_init_std} and len(residual) == 2 * TINY_MODEL.num_layers
