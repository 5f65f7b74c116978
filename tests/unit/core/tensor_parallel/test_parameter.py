"""Initial weights depend on the seed and the parameter's name alone."""

import torch
from model_testing import TINY_MODEL

from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import initialize_parameters, named_shards
from megatron.core.tensor_parallel.partition import slice_for_rank


def _weights(groups: ProcessGroups, seed: int = 1) -> dict[str, torch.Tensor]:
    model = MixtralModel(TINY_MODEL, groups=groups, sequence_parallel=False, device=torch.device("cpu"))
    initialize_parameters(model, model.first_layer, seed)
    return {shard.global_name: shard.data for shard in named_shards(model, model.first_layer)}


def test_every_rank_starts_with_its_slice_of_the_same_model() -> None:
    whole = _weights(ProcessGroups())
    seen = set()
    for rank in range(2):
        for stage in range(2):
            tp, pp = Group((0, 1), rank), Group((0, 1), stage)
            model = MixtralModel(
                TINY_MODEL,
                groups=ProcessGroups(tp=tp, pp=pp, etp=tp),
                sequence_parallel=False,
                device=torch.device("cpu"),
            )
            initialize_parameters(model, model.first_layer, 1)
            for shard in named_shards(model, model.first_layer):
                full = whole[shard.global_name]
                if shard.spec.init_rows is not None:  # padding grows with the tensor-parallel size
                    full = torch.cat([full, full.new_zeros(shard.spec.global_shape[0] - full.shape[0], full.shape[1])])
                expected = slice_for_rank(full, shard.spec.partition_dim, shard.spec.partition_stride, rank, 2)
                assert torch.equal(shard.data, expected), shard.global_name
                seen.add(shard.global_name)
    assert seen == whole.keys()


def test_values_have_the_asked_spread_and_differ_by_name_and_seed() -> None:
    first, other = _weights(ProcessGroups()), _weights(ProcessGroups(), seed=2)
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    assert abs(first[name].std().item() / TINY_MODEL.init_method_std - 1) < 0.05
    down = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"
    expected = TINY_MODEL.init_method_std / (2 * TINY_MODEL.num_layers) ** 0.5
    assert abs(first[down].std().item() / expected - 1) < 0.05
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("experts.3", "experts.2")])
    assert torch.equal(first["decoder.final_layernorm.weight"], torch.ones(TINY_MODEL.hidden_size))
    assert not first["output_layer.weight"][TINY_MODEL.vocab_size :].any()
