"""Changes of flags that make a job fit: tried in their order, ended at the first that fits on every rank."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron.training import dry_run_suggestions
from megatron.training.arguments import parse_arguments
from megatron.training.config import Arguments
from megatron.training.dry_run import StateMemory
from megatron.training.dry_run_suggestions import Change, Suggestion, Tools, flags_of, layouts, suggestions

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-experts 4 --vocab-size 203 "
    "--train-iters 1 --seq-length 16 --max-position-embeddings 16 --bf16 --global-batch-size 16 --dry-run 0/4"
)


def _job(flags: str = "") -> Arguments:
    return parse_arguments(f"{MODEL} {flags}".split())[0]


def _state(job: Arguments) -> StateMemory:
    """100, less what the flags save: half the optimizer's 60, half the gradients' 20, and all of it by EP."""
    size = (
        20 + (10 if job.parallel.grad_reduce_in_bf16 else 20) + (30 if job.parallel.use_distributed_optimizer else 60)
    )
    size //= job.parallel.expert_model_parallel_size
    return StateMemory(size, size)


def _run(job: Arguments) -> Any:
    recompute = job.recompute
    kept = {"full": 2, "selective": 6 if recompute.includes("moe") else 15}.get(
        recompute.recompute_granularity or "", 20
    )
    return SimpleNamespace(activations=kept * job.training.micro_batch_size, libraries=SimpleNamespace(total=1))


def _suggest(job: Arguments, size: int, more_elsewhere: int = 0) -> list[Suggestion]:
    def worst(job: Arguments) -> int:
        return _state(job).live + _run(job).activations + 1 + more_elsewhere

    return list(suggestions(job, 4, size, Tools(state=_state, run=_run, worst=worst)))


def test_the_cheapest_change_that_fits_is_the_last_of_the_list() -> None:
    assert [found.needed for found in _suggest(_job(), 121)] == [121]
    assert [(found.needed, found.flags) for found in _suggest(_job(), 78)] == [
        (100, ""),
        (91, "--use-distributed-optimizer"),
        (86, "--use-distributed-optimizer --recompute-granularity selective"),
        (77, "--use-distributed-optimizer --recompute-granularity selective --recompute-modules core_attn moe"),
    ]
    last = _suggest(_job(), 63)[-1]
    assert last.flags == "--use-distributed-optimizer --recompute-granularity full --grad-reduce-in-bf16"
    assert last.cost == "every layer computed twice, up to a third more time, sums of gradients rounded to bfloat16"


def test_another_layout_is_dearer_than_all_other_changes() -> None:
    found = _suggest(_job("--micro-batch-size 2"), 60)
    needs = [suggestion.needed for suggestion in found if not suggestion.at_least]
    assert needs == sorted(needs, reverse=True) and needs[-1] <= 60 < min(needs[:-1], default=61)
    assert found[-1].flags.endswith("--expert-model-parallel-size 2") and "more messages" in found[-1].cost


def test_every_rank_has_to_fit() -> None:
    alone, with_others = (_suggest(_job(), 92, more)[-1] for more in (0, 3))
    assert (alone.needed, alone.flags) == (91, "--use-distributed-optimizer")
    assert with_others.needed == 89 and "selective" in with_others.flags


def test_nothing_fits() -> None:
    assert _suggest(_job(), 5)[-1].needed > 5


def test_what_a_job_has_or_cannot_have_is_not_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    full = _job("--recompute-granularity full --use-distributed-optimizer")
    assert [found.flags for found in _suggest(full, 63)] == ["", "--grad-reduce-in-bf16"]
    in_float32 = parse_arguments(MODEL.replace("--bf16 ", "").split())[0]
    assert len(layouts(in_float32, 4)) == len(layouts(_job(), 4)) > 0
    unknown = Change({"some_flag_of_tomorrow": True}, "")
    monkeypatch.setattr(dry_run_suggestions, "FREE", (unknown, *dry_run_suggestions.FREE))
    assert _suggest(_job(), 92)[-1].flags == "--use-distributed-optimizer"


def test_flags_are_those_that_differ() -> None:
    job = _job("--recompute-granularity selective --recompute-modules core_attn layernorm")
    changes = [
        Change({"recompute_granularity": "full", "recompute_modules": (), "use_distributed_optimizer": False}, "")
    ]
    assert flags_of(job, changes) == "--recompute-granularity full (without --recompute-modules)"


def test_layouts_divide_ranks_and_model() -> None:
    found = [change.fields for change in layouts(_job(), 4)]
    assert {"expert_model_parallel_size": 4} in found and {"pipeline_model_parallel_size": 4} in found
    assert {"tensor_model_parallel_size": 2, "sequence_parallel": True} in found
    assert all(fields.get("expert_model_parallel_size", 1) <= 4 for fields in found)
    assert layouts(_job("--num-layers 3"), 2)[0].fields == {"expert_model_parallel_size": 2}
    assert not any("pipeline_model_parallel_size" in change.fields for change in layouts(_job("--num-layers 3"), 2))
