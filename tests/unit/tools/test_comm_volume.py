"""The table of communication: names of layouts, and the numbers of the large models by hand."""

import pytest

from tools.benchmarks.comm_volume import comparison, main, parse_layout, target_table


def test_a_name_stands_for_a_layout() -> None:
    processes, parallel, recompute, dispatcher = parse_layout("tp2-sp-ep4-etp1-pp2-zero-full-allgather-dp2")
    assert processes == 16  # experts need pp 2 x ep 4, the dense grid pp 2 x tp 2
    assert parallel.sequence_parallel and parallel.use_distributed_optimizer and parallel.expert_tensor_parallel == 1
    assert recompute.recompute_granularity == "full" and dispatcher == "allgather"
    with pytest.raises(ValueError, match="'xp2' is none of its parts"):
        parse_layout("xp2")


def test_numbers_of_the_large_models_are_those_by_hand() -> None:
    lines = target_table()
    first_stage = lines[2].split()
    whole = 4096 * 4096 * 2  # bytes of the hidden states of a microbatch
    # attention gathers three and scatters two times in each of 16 layers, the embedding does each once
    activations = 128 * (5 * 16 + 2) * 0.75 * whole
    norms_and_routers = 1.5 * 4 * 16 * (2 + 4) * 4096  # summed in float32 at the end
    assert float(first_stage[1]) == pytest.approx((activations + norms_and_routers) / 1e9, abs=1e-3)
    assert float(first_stage[2]) == pytest.approx(128 * whole / 4 / 1e9, abs=1e-3)


def test_a_difference_is_shown_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    same = {"tp2": {"measured|all-reduce|tp": 8, "formula|all-reduce|tp": 8}}
    assert comparison(same)[1]
    hidden = {"tp2": {"measured|broadcast|tp": 8}}
    lines, equal = comparison(hidden)
    assert not equal and "DIFFERENT" in lines[1]
    assert main(["--layouts", "tp3"]) == 1
    assert "not divisible by --tensor-model-parallel-size (3)" in capsys.readouterr().err
