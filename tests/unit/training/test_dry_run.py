"""One rank of a large job on the meta device: parameters add up, memory is what the layouts' formulas say."""

import re
from pathlib import Path

import pytest
import torch

import pretrain_gpt
from megatron.core.parallel_state import Group, PipelineChannels, ProcessGroups
from megatron.training import memory_model, training
from megatron.training.arguments import parse_arguments
from megatron.training.config import Arguments
from megatron.training.dry_run import DryRun, dry_run, parse_rank, representative_ranks
from megatron.training.dry_run_report import libraries_line, most_needed, table, verdict
from megatron.training.environment import Environment
from megatron.training.memory_model import GIB, MIB, library_memory

HIDDEN, LAYERS = 4096, 32
TINY = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-experts 4 --vocab-size 203 "
    "--tokenizer-type NullTokenizer --mock-data --train-iters 1 --seq-length 16 --max-position-embeddings 16 --bf16"
)


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
        assert result.live == pipeline - stage
        # besides what is kept of live microbatches: a layer's temporary tensors, messages, gradients of messages
        kept = result.live * chunk.activation_bytes
        assert kept < result.activations < kept + 0.5 * 2**30
        for measured, bytes_a_parameter in ((result.weights, 2), (result.gradients, 4), (result.optimizer, 12)):
            # buckets are padded
            assert measured == pytest.approx(bytes_a_parameter * chunk.parameters, rel=1e-5)
        held += 4 * chunk.parameters
    copies = 3 * (LAYERS * (2 + experts) + 1) * HIDDEN  # norms and routers, on all four tensor-parallel ranks
    padding = 2 * 256 * HIDDEN  # 32000 entries in four multiples of 128
    assert held == known_parameters + copies + padding


def test_sharded_optimizer_and_interleaving() -> None:
    interleaved = ("--num-layers", "16", "--num-layers-per-virtual-pipeline-stage", "2")
    plain, wider = (_run(_mixtral(8, 4, rank, *interleaved)) for rank in ("0/16", "0/32"))
    assert [list(chunk.stage.layers) for chunk in plain.chunks] == [[0, 1], [8, 9]]
    assert plain.sharded_optimizer == plain.optimizer == wider.optimizer
    assert wider.sharded_optimizer == pytest.approx(wider.optimizer / 2, rel=1e-5)
    assert (plain.microbatches, plain.live, wider.microbatches) == (16, 11, 8)


def test_masters_and_moments_in_fewer_bits_are_counted() -> None:
    flags = "--hidden-size 256 --use-precision-aware-optimizer --main-params-dtype bf16-remainder"
    flags += " --main-grads-dtype bf16 --exp-avg-dtype fp8 --exp-avg-sq-dtype fp16 --dry-run 0/1"
    result = _run(parse_arguments([*TINY.split(), *flags.split()])[0])
    parameters = result.chunks[0].parameters
    assert result.gradients == pytest.approx(2 * parameters, rel=2e-3)
    assert result.optimizer == pytest.approx((2 + 1 + 2 + 2 / 64) * parameters, rel=2e-3)
    # nor does a step hold anything of theirs besides: gradients and moments are read in the types that they have
    plain = _run(parse_arguments([*TINY.split(), "--hidden-size", "256", "--dry-run", "0/1"])[0])
    assert result.peaks["step"] - result.peaks["build"] == plain.peaks["step"] - plain.peaks["build"]


def test_received_rows_are_kept() -> None:
    """With experts on several ranks, the rows that have come for them are kept instead of the tokens here."""
    flags = ("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
    shared, own = (
        _run(_mixtral(8, 4, "16/64", *flags, "--expert-model-parallel-size", size)).chunks[0].activation_bytes
        for size in ("8", "1")
    )
    tokens, layers = 4096 // 2, LAYERS // 4
    assert shared - own == pytest.approx(layers * tokens * 2 * HIDDEN * 2, rel=0.05)  # two experts a token, 2 bytes


FEWER = {
    "1F1B": "--pipeline-model-parallel-size 4 --dry-run 1/4",
    "interleaved": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --dry-run 1/2",
    "one stage": "--dry-run 0/1",
}


@pytest.mark.parametrize("flags", FEWER.values(), ids=FEWER)
def test_a_few_microbatches_are_enough(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wider = "--hidden-size 256 --seq-length 256 --max-position-embeddings 256 --global-batch-size 16"
    arguments = parse_arguments([*TINY.split(), *wider.split(), *flags.split()])[0]
    few = _run(arguments)
    monkeypatch.setattr(memory_model, "enough_microbatches", lambda pipeline, rank, microbatches: microbatches)
    assert few.activations == pytest.approx(_run(arguments).activations, rel=0.01)


@pytest.mark.parametrize(
    "flags",
    [
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "--moe-expert-capacity-factor 0.5",
        "--moe-expert-capacity-factor 1.5 --expert-model-parallel-size 2",
        "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity",
        "--expert-model-parallel-size 4 --moe-token-dispatcher-type allgather",
        "--reset-position-ids --reset-attention-mask --moe-input-jitter-eps 0.1",
        "--context-parallel-size 2",
    ],
)
def test_whatever_depends_on_values_is_assumed(flags: str) -> None:
    arguments = parse_arguments([*TINY.split(), *flags.split(), "--dry-run", "1/4"])[0]
    result = _run(arguments)
    assert result.activations > result.live * result.chunks[0].activation_bytes > 0


def _pairs(*kinds: str) -> PipelineChannels:
    return PipelineChannels(**dict.fromkeys(kinds, Group((0, 4))))


def test_what_the_libraries_take() -> None:
    """The rule of docs/dry_run.md, for groups that share members or not."""
    alone = library_memory(ProcessGroups(), "alltoall", 10 * GIB)
    assert (alone.nccl, alone.fragmentation) == (0, 3 * GIB) and 0.7 * GIB < alone.cuda < 0.8 * GIB
    four, eight = Group((0, 1, 2, 3)), Group(tuple(range(8)))
    channels = _pairs("forward_out", "backward_in")
    flagship = ProcessGroups(world=eight, tp=four, tp_cp=four, etp=four, ep_etp=four, pp_channels=channels)
    assert library_memory(flagship, "alltoall", 0).nccl == int(2 * 0.7 * GIB) + (40 + 8) * MIB
    shared = ProcessGroups(world=eight, dp_cp=eight, ep=eight, ep_etp=eight)  # gradients apart from the model
    assert library_memory(shared, "alltoall", 0).nccl == int(2 * 0.7 * GIB) + 7 * (320 + 64) * MIB
    line = libraries_line(library_memory(flagship, "alltoall", 7 * GIB))
    assert line.startswith("plus about 4.3 GiB for NCCL, CUDA and fragmentation")


def test_recomputation_keeps_less() -> None:
    full, fewer = ("--recompute-granularity", "full"), ("--num-layers", "16")
    flags = ((), ("--recompute-granularity", "selective"), (*full, "--recompute-method", "block"), full)
    kept = [_run(_mixtral(8, 4, "4/16", *fewer, *more)).chunks[0].activation_bytes for more in flags]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4
    # of four layers, only the inputs are kept
    assert kept[-1] == pytest.approx(4 * 1024 * HIDDEN * 2, rel=0.1)


def test_state_in_the_hosts_memory_is_not_on_the_device() -> None:
    """All of its bytes, to a few elements, and nothing else of a step."""
    wider = "--num-layers 1 --hidden-size 256 --dry-run 1/2"
    zero = "--use-distributed-optimizer --overlap-grad-reduce --optimizer-cpu-offload --optimizer-offload-fraction"
    whole, *shares = (
        _run(parse_arguments([*TINY.split(), *wider.split(), *zero.split(), fraction])[0])
        for fraction in ("0", "0.25", "1")
    )
    state = whole.sharded_optimizer
    assert whole.host == 0 and state > 2**20
    for share, fraction in zip(shares, (0.25, 1.0), strict=True):
        moved = state - share.sharded_optimizer
        assert fraction * state - 64 * 12 < moved <= fraction * state
        assert whole.peaks["step"] - share.peaks["step"] == pytest.approx(moved, abs=4096)  # the allocator's blocks
        assert moved < share.host <= moved + 2 * 6 * state / 12
    arguments = parse_arguments([*TINY.split(), *wider.split(), *zero.split(), "1"])[0]
    assert " GiB on a machine with 2 such ranks" in table(shares[1], arguments)


def test_recomputed_norms_give_up_their_outputs_alone() -> None:
    """Two in each of eight layers, gathered along the sequence."""
    flags = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn")
    kept = [_run(_mixtral(8, 4, "4/16", *flags, *more)).chunks[0].activation_bytes for more in ((), ("layernorm",))]
    assert 0 < kept[0] - kept[1] <= 2 * 8 * 4096 * HIDDEN * 2


@pytest.mark.parametrize("text", ["16/16", "3", "-1/4", "a/b", "1/0", ""])
def test_bad_ranks(text: str) -> None:
    with pytest.raises(ValueError, match="RANK/WORLD"):
        parse_rank(text)


def test_layouts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="world size 12 is not divisible"):
        _run(_mixtral(8, 4, "0/12"))


PROVIDERS = (pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "dry_run.md"


def _print(flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *flags.split()])
    training._pretrain(Environment(0, 1, 0, 1), *PROVIDERS)
    return capsys.readouterr().out.splitlines()


def test_the_program_prints_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{TINY} --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --use-flash-attn --dry-run 3/4"
    note, *lines = _print(f"{flags} --gpu-memory 3", monkeypatch, capsys)
    assert note.startswith("note: ") and "--use-flash-attn" in note
    assert lines[0] == "dry run of rank 3 of 4: pipeline 1 of 2, data 0 of 1, context 0 of 1, tensor 1 of 2"
    assert lines[3].startswith("layers 2-3, loss") and lines[9].startswith("total")
    assert [line.split()[0] for line in lines[12:17]] == ["build", "load", "step", "evaluation", "save"]
    # of a model this small, rounding the weights from the masters, a piece at a time, takes more than a step
    assert [line for line in lines[12:17] if line.endswith("the most, which is judged")] == [lines[13]]
    assert [line.split()[0] for line in lines[-3:]] == ["plus", "in", "fits"]
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="without torchrun"):
        training._pretrain(Environment(0, 4, 0, 4), *PROVIDERS)
    with pytest.raises(SystemExit, match="1"):
        _print(f"{flags} --gpu-memory 1", monkeypatch, capsys)
    assert "does not fit a GPU of 1.0 GiB" in capsys.readouterr().out


def test_the_program_suggests_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _print(f"{TINY} --dry-run 0/2 --suggest 80", monkeypatch, capsys)
    assert lines[-1] == "fits 80.0 GiB: no change is needed" and lines[-2].endswith(" GiB  as given")


@pytest.mark.slow
def test_the_program_says_that_nothing_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        _print(f"{TINY} --dry-run 0/2 --suggest 0.5", monkeypatch, capsys)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("nothing that was tried fits 0.5 GiB")
    first = next(number for number, line in enumerate(lines) if line.startswith("changes of flags to fit 0.5 GiB"))
    needs = [float(line.split(" GiB")[0].split()[-1]) for line in lines[first + 1 : -1]]
    assert needs and needs == sorted(needs, reverse=True) and needs[-1] > 0.5


def test_neither_data_nor_a_tokenizer_are_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = TINY.replace("--tokenizer-type NullTokenizer --mock-data ", "")
    assert _print(f"{bare} --dry-run 0/1", monkeypatch, capsys)[0].startswith("dry run of rank 0")
    with pytest.raises(ValueError, match="give --vocab-size or --tokenizer-model"):
        _print(bare.replace("--vocab-size 203", "--dry-run 0/1"), monkeypatch, capsys)
    for flag in ("--gpu-memory", "--suggest"):
        with pytest.raises(ValueError, match=f"{flag} is a number of GiB for --dry-run"):
            parse_arguments([*TINY.split(), flag, "80"])


@pytest.mark.parametrize(
    ("flags", "rank", "expected"),
    [
        ("--pipeline-model-parallel-size 4", 1, [1, 0, 3]),
        ("--pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 --global-batch-size 2", 15, [15, 3, 7]),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 0, [0, 1]),
        ("", 3, [3]),
    ],
)
def test_ranks_that_may_need_most(flags: str, rank: int, expected: list[int]) -> None:
    world = 16 if "tensor" in flags else 4
    if "first" in flags:
        world = 2
    arguments = parse_arguments([*TINY.split(), *flags.split(), "--dry-run", f"{rank}/{world}"])[0]
    assert representative_ranks(arguments) == expected


def test_the_worst_rank_is_named_and_judged() -> None:
    assert most_needed({1: 3 * GIB, 0: 5 * GIB}, 1) == "in all 3.0 GiB; rank 0 needs most: 5.0 GiB"
    assert most_needed({1: 3 * GIB, 2: 3 * GIB}, 2) == "in all 3.0 GiB; no rank needs more"
    assert verdict(60 * GIB, 80 * GIB) == "fits a GPU of 80.0 GiB: 20.0 GiB are left"
    assert verdict(81 * GIB, 80 * GIB).startswith("does not fit a GPU of 80.0 GiB: 1.0 GiB too much. More tensor-")


def test_the_optimizer_is_that_of_the_flags() -> None:
    arguments = _mixtral(8, 4, "0/32")
    assert "with --use-distributed-optimizer the optimizer's state would lie on 2 ranks: 16.4" in table(
        _run(arguments), arguments
    )


EXAMPLES = re.findall(r"```\n(python pretrain_gpt.py .*?)```\n\n```\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=["first", "second"])
def test_the_document_shows_what_is_printed(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command.replace("\\\n", " ").removeprefix("python pretrain_gpt.py ")
    assert _print(flags, monkeypatch, capsys) == output.splitlines()
