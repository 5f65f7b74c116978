"""The division of layers over pipeline ranks and their chunks."""

import pytest

from megatron.core.config import ParallelConfig
from megatron.core.stages import Stage, whole_model


def _layers(num_layers: int, **settings: int) -> list[list[tuple[int, int]]]:
    stages = ParallelConfig(**settings).stages(num_layers)
    return [[(stage.layers.start, stage.layers.stop) for stage in own] for own in stages]


@pytest.mark.parametrize(
    ("num_layers", "settings", "expected"),
    [
        (8, {"pipeline_model_parallel_size": 2}, [[(0, 4)], [(4, 8)]]),
        (
            8,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
            [[(0, 2), (4, 6)], [(2, 4), (6, 8)]],
        ),
        (
            8,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4},
            [[(0, 1), (2, 3), (4, 5), (6, 7)], [(1, 2), (3, 4), (5, 6), (7, 8)]],
        ),
        (
            10,
            {
                "pipeline_model_parallel_size": 4,
                "decoder_first_pipeline_num_layers": 1,
                "decoder_last_pipeline_num_layers": 3,
            },
            [[(0, 1)], [(1, 4)], [(4, 7)], [(7, 10)]],
        ),
        (
            14,
            {
                "pipeline_model_parallel_size": 3,
                "decoder_first_pipeline_num_layers": 2,
                "decoder_last_pipeline_num_layers": 8,
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            [[(0, 1), (7, 8)], [(1, 3), (8, 10)], [(3, 7), (10, 14)]],
        ),
        (3, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}, [[(0, 2)], [(2, 3)]]),
    ],
    ids=["even", "interleaved", "by number", "uneven", "uneven and interleaved", "uneven last"],
)
def test_layers_of_each_chunk(num_layers: int, settings: dict[str, int], expected: list) -> None:
    assert _layers(num_layers, **settings) == expected
    stages = ParallelConfig(**settings).stages(num_layers)
    order = [own[chunk] for chunk in range(len(stages[0])) for own in stages]
    assert [layer for stage in order for layer in stage.layers] == list(range(num_layers))
    assert [stage.has_embedding for stage in order] == [True] + [False] * (len(order) - 1)
    assert [stage.has_output for stage in order] == [False] * (len(order) - 1) + [True]


def test_one_rank_holds_the_whole_model() -> None:
    assert ParallelConfig().stages(5) == ((whole_model(5),),) == ((Stage(range(5), True, True),),)


@pytest.mark.parametrize(
    ("num_layers", "settings", "message"),
    [
        (6, {"pipeline_model_parallel_size": 4}, r"\(6\) is not divisible .* \(4\): .*decoder-first"),
        (
            6,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
            r"\(6\) is not divisible .* \(2\) x --num-layers-per-virtual-pipeline-stage \(2\) = 4",
        ),
        (
            6,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            r"3 layers are not divisible by its 2 virtual stages",
        ),
        (
            6,
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 2,
                "decoder_last_pipeline_num_layers": 3,
            },
            r"must hold all 6 layers together",
        ),
        (4, {"decoder_first_pipeline_num_layers": 4}, r"must hold all 4 layers together"),
        (8, {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 3}, r"leaves 5 of 8 .* other 3"),
        (8, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 8}, r"leaves 0 of 8 .* other 1"),
    ],
)
def test_divisions_that_do_not_work(num_layers: int, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings).stages(num_layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers_per_virtual_pipeline_stage": 2}, "need --pipeline-model-parallel-size above 1"),
        ({"num_virtual_stages_per_pipeline_rank": 2}, "need --pipeline-model-parallel-size above 1"),
        ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 0}, "must be positive"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "num_layers_per_virtual_pipeline_stage": 2,
            },
            "not both",
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_layers_per_virtual_pipeline_stage": 2,
                "decoder_first_pipeline_num_layers": 2,
            },
            "instead of --num-layers-per-virtual-pipeline-stage",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)
