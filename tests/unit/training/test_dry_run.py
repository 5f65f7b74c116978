"""One rank of a large job on the meta device: parameters add up, memory is what the layouts' formulas say."""

import pytest
import torch
from model_testing import step_batches, tiny_arguments

import pretrain_gpt
from megatron.core.fusions import kernels
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.training import training
from megatron.training.arguments import parse_arguments
from megatron.training.config import Arguments
from megatron.training.dry_run import DryRun, dry_run, parse_rank, table
from megatron.training.initialize import Environment
from megatron.training.setup import build_trainer

HIDDEN, LAYERS = 4096, 32


def _mixtral(experts: int, pipeline: int, rank: str, *more: str) -> Arguments:
    flags = (
        f"--num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size 14336 --num-attention-heads 32 "
        f"--num-query-groups 8 --num-experts {experts} --vocab-size 32000 --seq-length 4096 --micro-batch-size 1 "
        f"--global-batch-size 16 --tensor-model-parallel-size 4 --pipeline-model-parallel-size {pipeline} "
        f"--sequence-parallel --bf16 --tokenizer-type NullTokenizer --mock-data --train-iters 1 --dry-run {rank}"
    )
    return parse_arguments([*flags.split(), *more])[0]


def _run(arguments: Arguments) -> DryRun:
    return dry_run(arguments, pretrain_gpt.model_provider, pretrain_gpt.forward_step)


@pytest.mark.parametrize(
    ("experts", "pipeline", "known_parameters"),
    [(8, 4, 46_702_792_704), (4, 2, 24_153_690_112)],
    ids=["8x7B at TP4 PP4 on 16", "4x7B at TP4 PP2 on 8"],
)
def test_known_models_add_up(experts: int, pipeline: int, known_parameters: int) -> None:
    world = 4 * pipeline
    results = [_run(_mixtral(experts, pipeline, f"{4 * stage + stage % 4}/{world}")) for stage in range(pipeline)]
    held = 0
    for stage, result in enumerate(results):
        (chunk,) = result.chunks
        layers = LAYERS // pipeline
        assert chunk.stage.layers == range(stage * layers, (stage + 1) * layers)
        assert chunk.input_shape == ((1, 4096) if stage == 0 else (1024, 1, HIDDEN))
        assert chunk.output_shape == (() if stage == pipeline - 1 else (1024, 1, HIDDEN))
        assert result.model_parameters == known_parameters
        assert (result.live, result.activations) == (pipeline - stage, (pipeline - stage) * chunk.activation_bytes)
        for measured, bytes_a_parameter in ((result.weights, 2), (result.gradients, 4), (result.optimizer, 12)):
            # buckets are padded
            assert measured == pytest.approx(bytes_a_parameter * chunk.parameters, rel=1e-5)
        held += 4 * chunk.parameters
    copies = 3 * (LAYERS * (2 + experts) + 1) * HIDDEN  # norms and routers, on all four tensor-parallel ranks
    padding = 2 * 256 * HIDDEN  # 32000 entries in four multiples of 128
    assert held == known_parameters + copies + padding


def test_sharded_optimizer_and_interleaving() -> None:
    interleaved = ("--num-layers-per-virtual-pipeline-stage", "4")
    plain, wider = (_run(_mixtral(8, 4, rank, *interleaved)) for rank in ("0/16", "0/32"))
    assert [list(chunk.stage.layers) for chunk in plain.chunks] == [[0, 1, 2, 3], [16, 17, 18, 19]]
    assert plain.sharded_optimizer == plain.optimizer == wider.optimizer
    assert wider.sharded_optimizer == pytest.approx(wider.optimizer / 2, rel=1e-5)
    assert (plain.microbatches, plain.live, wider.microbatches) == (16, 11, 8)
    assert "distributed over 2" in table(wider, _mixtral(8, 4, "0/32"))


def test_activations_are_those_of_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps of one microbatch on the CPU, where torch's attention keeps what FlashAttention does."""
    monkeypatch.delitem(kernels.DEVICES, "cpu")
    arguments = tiny_arguments("float32", {"dry_run": "0/1"})
    trainer = build_trainer(
        arguments, ProcessGroups(), torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step
    )
    (model,) = trainer.model
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) is None or tensor, lambda t: t
    ):
        output = pretrain_gpt.forward_step(model, step_batches(0, 0, 1)[0], None, Microbatch())
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert output[0].ndim == 0
    # on a CPU torch's attention gives its output in another layout than FlashAttention, and the next product copies it
    copies = 4 * arguments.model.num_layers * step_batches(0, 0, 1)[0]["tokens"].numel() * arguments.model.hidden_size
    assert _run(arguments).activations == pytest.approx(real - copies, rel=0.01)


def test_recomputation_keeps_less() -> None:
    full = ("--recompute-granularity", "full")
    flags = ((), ("--recompute-granularity", "selective"), (*full, "--recompute-method", "block"), full)
    kept = [_run(_mixtral(8, 4, "4/16", *more)).chunks[0].activation_bytes for more in flags]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    # of eight layers, only the inputs are kept
    assert kept[-1] == pytest.approx(8 * 1024 * HIDDEN * 2, rel=0.1)


@pytest.mark.parametrize("text", ["16/16", "3", "-1/4", "a/b", "1/0", ""])
def test_bad_ranks(text: str) -> None:
    with pytest.raises(ValueError, match="RANK/WORLD"):
        parse_rank(text)


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="world size 12 is not divisible"):
        _run(_mixtral(8, 4, "0/12"))


def test_the_program_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-experts 4 --vocab-size 203 "
        "--tokenizer-type NullTokenizer --mock-data --train-iters 1 --seq-length 16 --max-position-embeddings 16 "
        "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --bf16 --dry-run 3/4"
    )
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *flags.split()])
    providers = (pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
    training._pretrain(Environment(0, 1, 0, 1), *providers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dry run of rank 3 of 4: pipeline 1 of 2, data 0 of 1, context 0 of 1, tensor 1 of 2"
    assert lines[3].startswith("layers 2-3, loss") and lines[-2].startswith("total")
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="without torchrun"):
        training._pretrain(Environment(0, 4, 0, 4), *providers)
