"""Rank grids: who is in a group with whom."""

import pytest

from megatron.core.config import ParallelConfig
from megatron.core.parallel_state import grid_sizes, rank_lists


def test_sixteen_ranks_at_tp4_pp2() -> None:
    config = ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2)
    dense, expert = grid_sizes(config, 16)
    assert dense == {"pp": 2, "dp": 2, "cp": 1, "tp": 4}
    assert expert == {"pp": 2, "edp": 2, "ep": 1, "etp": 4}
    assert rank_lists(dense, ("tp",)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert rank_lists(dense, ("pp",)) == [[rank, rank + 8] for rank in range(8)]
    assert rank_lists(dense, ("dp", "cp")) == [[rank, rank + 4] for rank in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert rank_lists(dense, ("pp", "tp"))[0] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rank_lists(expert, ("edp",)) == rank_lists(dense, ("dp",))


def test_groups_along_an_axis_partition_the_world() -> None:
    sizes = {"pp": 2, "edp": 3, "ep": 2, "etp": 2}
    for axes in (("pp",), ("ep",), ("edp", "etp"), ("pp", "ep", "etp"), ("pp", "edp", "ep", "etp")):
        lists = rank_lists(sizes, axes)
        assert sorted(rank for ranks in lists for rank in ranks) == list(range(24))
        assert all(ranks == sorted(ranks) for ranks in lists)


def test_a_world_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"world size 6 is not divisible by tensor \(2\) x pipeline \(2\)"):
        grid_sizes(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 6)


def test_the_expert_grid_is_independent_of_the_dense_one() -> None:
    config = ParallelConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )
    dense, expert = grid_sizes(config, 16)
    assert dense == {"pp": 2, "dp": 2, "cp": 1, "tp": 4}
    assert expert == {"pp": 2, "edp": 2, "ep": 4, "etp": 1}
    assert rank_lists(expert, ("ep",)) == rank_lists(dense, ("tp",))
    wider = grid_sizes(ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=8), 16)[1]
    assert rank_lists(wider, ("ep",)) == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("settings", [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}])
def test_experts_apart_from_tensor_parallelism_need_different_tokens(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="--sequence-parallel"):
        ParallelConfig(tensor_model_parallel_size=2, **settings)


def test_a_world_that_does_not_fit_the_experts_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expert \(4\) x expert-tensor \(1\) parallel size = 4: start a multiple of 4"
    ):
        grid_sizes(ParallelConfig(expert_model_parallel_size=4), 6)
