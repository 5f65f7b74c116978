"""Saved under one layout, loaded under any other: the same bits, and training goes on as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_testing import refusals, save_as_megatron, saved_tensors, train_and_save
from distributed_testing import run_distributed
from model_testing import relative_difference
from test_layouts import CP2, EP2, ETP1, PP2, SP, TP2, ZERO

LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "tp2_pp2": (4, TP2 | PP2),
    "tp2_sp_dp2_zero": (4, TP2 | SP | ZERO),
    "dp4": (4, {}),
    "dp2_zero": (2, ZERO),
    "pp2_dp2_zero": (4, PP2 | ZERO),
    "ep2": (2, EP2),
    "tp2_sp_ep2_etp1_zero": (4, TP2 | SP | EP2 | ETP1 | ZERO),
    "cp2_ep2": (4, CP2 | EP2),
    "uneven_pp2": (2, PP2 | {"decoder_first_pipeline_num_layers": 1}),
    "pp2_v2": (2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}),
}
Trained = Callable[[str, str], tuple[Path, list[float]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Folder and losses of a run of five steps that saved after three, made once for each layout and type."""
    made: dict[tuple[str, str], tuple[Path, list[float]]] = {}

    def train(layout: str, params_dtype: str) -> tuple[Path, list[float]]:
        if (layout, params_dtype) not in made:
            folder = tmp_path_factory.mktemp(layout)
            losses = run_distributed(train_and_save, *LAYOUTS[layout], params_dtype, "", str(folder))[0]
            made[layout, params_dtype] = folder, losses
        return made[layout, params_dtype]

    return train


QUICK = {
    ("ep2", "tp2", "bfloat16"),
    ("tp2", "pp2", "float64"),
    ("dp2_zero", "one", "bfloat16"),
    ("one", "dp2_zero", "float64"),
}
PAIRS = [
    ("tp2", "pp2"), ("tp2_pp2", "dp4"), ("dp2_zero", "one"), ("one", "dp2_zero"), ("one", "tp2_sp_dp2_zero"),
    ("tp2_sp_dp2_zero", "pp2_dp2_zero"), ("pp2_dp2_zero", "tp2_pp2"), ("dp4", "dp2_zero"),
    ("ep2", "tp2"), ("tp2_pp2", "tp2_sp_ep2_etp1_zero"), ("tp2_sp_ep2_etp1_zero", "cp2_ep2"), ("cp2_ep2", "uneven_pp2"),
    ("uneven_pp2", "ep2"), ("one", "pp2_v2"), ("pp2_v2", "tp2_pp2"),
]  # fmt: skip
CASES = [
    pytest.param(*pair, dtype, marks=() if (*pair, dtype) in QUICK else pytest.mark.slow)
    for pair in PAIRS
    for dtype in ("float64", "bfloat16")
]


@pytest.mark.parametrize(("before", "after", "params_dtype"), CASES)
def test_any_layout_continues_any_other(
    trained: Trained, tmp_path: Path, before: str, after: str, params_dtype: str
) -> None:
    folder, losses = trained(before, params_dtype)
    # a step of the middle of a run is loaded by naming its own folder
    step = folder / "iter_0000003"
    continued = run_distributed(train_and_save, *LAYOUTS[after], params_dtype, str(step), str(tmp_path))[0]
    _assert_continued(tmp_path, continued, folder, losses, params_dtype)


def _assert_continued(run: Path, continued: list[float], folder: Path, losses: list[float], params_dtype: str) -> None:
    """`run` began with what `folder` had after three steps, and went on like that."""
    ours, theirs = saved_tensors(run / "iter_0000003"), saved_tensors(folder / "iter_0000003")
    kinds = {kind for kind, _ in theirs}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"} | ({"master"} if params_dtype == "bfloat16" else set())
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
    if params_dtype == "float64":
        assert continued == pytest.approx(losses, rel=1e-10)
        ours, theirs = saved_tensors(run / "iter_0000005"), saved_tensors(folder / "iter_0000005")
        for key in theirs:
            assert relative_difference(ours[key], theirs[key]) <= 1e-10, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "params_dtype"),
    [
        ("tp2_pp2", "float64"),
        ("tp2_sp_ep2_etp1_zero", "bfloat16"),
        ("pp2_dp2_zero", "bfloat16"),
        ("pp2_v2", "float64"),
    ],
)
def test_any_layout_continues_a_run_of_megatron(
    trained: Trained, tmp_path: Path, after: str, params_dtype: str
) -> None:
    folder, losses = trained("one", params_dtype)
    step = tmp_path / "iter_0000003"
    save_as_megatron(folder / "iter_0000003", step)
    continued = run_distributed(train_and_save, *LAYOUTS[after], params_dtype, str(step), str(tmp_path / "run"))[0]
    _assert_continued(tmp_path / "run", continued, folder, losses, params_dtype)


@pytest.mark.parametrize(
    "layout", ["dp2_zero", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "pp2"))]
)
def test_the_same_layout_continues_bit_for_bit(trained: Trained, tmp_path: Path, layout: str) -> None:
    folder, losses = trained(layout, "bfloat16")
    step = folder / "iter_0000003"
    assert run_distributed(train_and_save, *LAYOUTS[layout], "bfloat16", str(step), str(tmp_path))[0] == losses
    ours, theirs = saved_tensors(tmp_path / "iter_0000005"), saved_tensors(folder / "iter_0000005")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


FEWER_BITS = {"use_precision_aware_optimizer": True, "main_params_dtype": "bf16-remainder"}
MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
SCALED = {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "moments"), [("dp2_zero", "tp2", MOMENTS), ("ep2", "dp2_zero", SCALED)], ids=["bf16", "scaled"]
)
def test_state_in_fewer_bits_goes_to_another_layout(
    tmp_path: Path, before: str, after: str, moments: dict[str, str]
) -> None:
    """Bit for bit, with scales too where no block of numbers is cut in another way."""
    folders = []
    for layout in (before, after):
        world_size, settings = LAYOUTS[layout]
        step = str(folders[0] / "iter_0000003") if folders else ""
        folders.append(tmp_path / layout)
        settings = settings | FEWER_BITS | moments
        run_distributed(train_and_save, world_size, settings, "bfloat16", step, str(folders[-1]))
    theirs, ours = (saved_tensors(folder / "iter_0000003") for folder in folders)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("layout", ["dp2_zero", pytest.param("dp4", marks=pytest.mark.slow)])
def test_each_rank_writes_its_share(trained: Trained, layout: str) -> None:
    folder, _ = trained(layout, "bfloat16")
    sizes = [file.stat().st_size for file in sorted((folder / "iter_0000003").glob("rank_*.safetensors"))]
    assert len(sizes) == LAYOUTS[layout][0] and max(sizes) < 1.3 * min(sizes)


def test_all_ranks_refuse_what_fails_on_one(tmp_path: Path) -> None:
    first, second = run_distributed(refusals, 2, str(tmp_path))
    expectations = (
        "rank 1: ",
        "__0_1.distcp: the checksum of",
        "rank_00001.safetensors has",
        "sharded.json is damaged",
    )
    assert first == second
    for told, expected in zip(first, expectations, strict=True):
        assert expected in told
    assert "rank_00001.safetensors: File too large" in first[0]
    names = ["iter_0000001", "latest_checkpointed_iteration.txt", "megatron"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
