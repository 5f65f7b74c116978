"""Checkpoint folders: names, tracker, safe files, replacement of a step that is whole at any moment."""

import os
import pickle
import shutil
import sys
import types
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.core import interchange
from megatron.core.config import ModelConfig
from megatron.core.interchange import layout
from megatron.core.parallel_state import grid_sizes


def _write(folder: Path, names: list[str], value: float) -> None:
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        interchange.save_torch(folder / name / interchange.CHECKPOINT_FILE, {"model": {"w": torch.tensor([value])}})


def _value(folder: Path, name: str = "mp_rank_00") -> float:
    return interchange.load_torch(folder / name / interchange.CHECKPOINT_FILE)["model"]["w"].item()


def test_names() -> None:
    root = Path("root")
    assert interchange.checkpoint_dir(root, 12) == root / "iter_0000012"
    assert interchange.checkpoint_dir(root, "release") == root / "release"
    assert interchange.rank_dir_name(3, 0, 1) == "mp_rank_03"
    assert interchange.rank_dir_name(3, 1, 2) == "mp_rank_03_001"
    assert interchange.rank_dir_name(3, 1, 2, 5, 8) == "mp_rank_03_001_005"
    assert interchange.rank_dir_name(3, 0, 1, 5, 8) == "mp_rank_03_005"


def test_tracker(tmp_path: Path) -> None:
    assert interchange.read_tracker(tmp_path) is None
    for step in (0, 17, "release"):
        interchange.write_tracker(tmp_path, step)  # type: ignore[arg-type]
        assert interchange.read_tracker(tmp_path) == step
    assert os.listdir(tmp_path) == [interchange.TRACKER_FILE]
    (tmp_path / interchange.TRACKER_FILE).write_text("100\n")
    assert interchange.read_tracker(tmp_path) == 100


@pytest.mark.parametrize("garbage", [b"", b"\n", b"-3", b"1.5", b"latest", b"\xff\xfe\x00", "١٢".encode(), b"10 20"])
def test_garbage_in_the_tracker_is_refused(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / interchange.TRACKER_FILE).write_bytes(garbage)
    with pytest.raises(ValueError, match=interchange.TRACKER_FILE):
        interchange.read_tracker(tmp_path)


def test_a_step_appears_whole(tmp_path: Path) -> None:
    names = ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    folder = interchange.begin_step(tmp_path, 5)
    assert folder == interchange.begin_step(tmp_path, 5)
    _write(folder, names[:3], 1.0)
    with pytest.raises(ValueError, match="mp_rank_01_001"):
        interchange.commit_step(tmp_path, 5, interchange.Layout(2, 2))
    assert interchange.read_tracker(tmp_path) is None and interchange.available_iterations(tmp_path) == []
    _write(folder, names[3:], 1.0)
    final = interchange.commit_step(tmp_path, 5, interchange.Layout(2, 2))
    assert interchange.find_checkpoint(tmp_path) == (final, 5)
    assert interchange.available_layout(final) == interchange.Layout(2, 2)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000005", interchange.TRACKER_FILE]


def test_leftovers_of_a_killed_save_in_another_layout_do_not_get_in(tmp_path: Path) -> None:
    folder = interchange.begin_step(tmp_path, 5)
    _write(folder, ["mp_rank_00", "mp_rank_01"], 1.0)
    (folder / "mp_rank_00" / ".model_optim_rng.pt.tmp").write_bytes(b"torn")
    _write(interchange.begin_step(tmp_path, 5), ["mp_rank_00"], 2.0)
    final = interchange.commit_step(tmp_path, 5, interchange.Layout())
    assert interchange.available_layout(final) == interchange.Layout() and _value(final) == 2.0
    assert os.listdir(final / "mp_rank_00") == [interchange.CHECKPOINT_FILE]


def test_killed_at_any_point_of_replacing_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system call that changes names fails once in turn; what is found is the old step or the new one."""
    found = []
    for deadly in range(20):
        root = tmp_path / str(deadly)
        root.mkdir()
        _write(interchange.begin_step(root, 5), ["mp_rank_00"], 1.0)
        interchange.commit_step(root, 5, interchange.Layout())
        _write(interchange.begin_step(root, 5), ["mp_rank_00"], 2.0)
        calls = 0

        def dying(function, deadly=deadly):  # type: ignore[no-untyped-def]
            def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
                nonlocal calls
                calls += 1
                if calls > deadly:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(layout.os, "rename", dying(os.rename))
            patch.setattr(layout.os, "replace", dying(os.replace))
            patch.setattr(layout.shutil, "rmtree", dying(shutil.rmtree))
            try:
                interchange.commit_step(root, 5, interchange.Layout())
                finished = True
            except KeyboardInterrupt:
                finished = False
        folder, step = interchange.find_checkpoint(root)
        assert step == 5 and interchange.available_layout(folder) == interchange.Layout()
        found.append(_value(folder))
        # A restart that saves the step again must succeed from wherever the kill left it.
        _write(interchange.begin_step(root, 5), ["mp_rank_00"], 3.0)
        assert _value(interchange.commit_step(root, 5, interchange.Layout())) == 3.0
        assert sorted(os.listdir(root)) == ["iter_0000005", interchange.TRACKER_FILE]
        if finished:
            break
    assert finished and found[0] == 1.0 and found[-1] == 2.0 and len(found) >= 4


def test_find_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        interchange.find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=interchange.TRACKER_FILE):
        interchange.find_checkpoint(tmp_path)
    _write(interchange.begin_step(tmp_path, 5), ["mp_rank_00"], 1.0)
    interchange.commit_step(tmp_path, 5, interchange.Layout())
    assert interchange.find_checkpoint(tmp_path / "iter_0000005") == (tmp_path / "iter_0000005", 5)
    with pytest.raises(ValueError, match="is step 5, not 6"):
        interchange.find_checkpoint(tmp_path / "iter_0000005", 6)
    with pytest.raises(FileNotFoundError, match="has no step 6; it has: 5"):
        interchange.find_checkpoint(tmp_path, 6)
    (tmp_path / interchange.TRACKER_FILE).write_text("7")
    with pytest.raises(FileNotFoundError, match="has no step 7; it has: 5"):
        interchange.find_checkpoint(tmp_path)
    (tmp_path / interchange.TRACKER_FILE).unlink()
    (tmp_path / "release").mkdir()
    (tmp_path / "iter_0000005" / "__0_0.distcp").touch()
    with pytest.raises(FileNotFoundError, match="give the folder of a step in it: iter_0000005, release"):
        interchange.find_checkpoint(tmp_path)


def test_a_step_of_torch_dist_under_another_name_is_named(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    with pytest.raises(ValueError, match=r"is a checkpoint of torch\.distributed\.checkpoint: if Megatron-LM wrote it"):
        interchange.find_checkpoint(tmp_path)
    (tmp_path / "metadata.json").touch()
    with pytest.raises(ValueError, match=r"under another name: rename the folder to release"):
        interchange.find_checkpoint(tmp_path)


def test_incomplete_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mp_rank_"):
        interchange.available_layout(tmp_path)
    _write(tmp_path, ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_001"], 1.0)
    with pytest.raises(ValueError, match=r"mp_rank_01_000.*is missing"):
        interchange.available_layout(tmp_path)
    _write(tmp_path, ["mp_rank_01_000"], 1.0)
    (tmp_path / "mp_rank_00_000x").mkdir()
    with pytest.raises(ValueError, match="not the name of a rank's folder"):
        interchange.available_layout(tmp_path)


def _world_ranks(tp: int, pp: int, ep: int, etp: int, dp: int) -> set[tuple[int, int, int]]:
    """(tp, pp, ep) of every rank of a job, from the grids that training uses."""
    config = SimpleNamespace(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep,
        expert_tensor_parallel=etp, context_parallel_size=1, data_parallel_size=lambda _: dp,
    )  # fmt: skip
    sizes = grid_sizes(config, tp * pp * dp)  # type: ignore[arg-type]
    dense = {rank: place for place, rank in np.ndenumerate(np.arange(tp * pp * dp).reshape(*sizes[0].values()))}
    expert = {rank: place for place, rank in np.ndenumerate(np.arange(tp * pp * dp).reshape(*sizes[1].values()))}
    for rank in dense:
        assert expert[rank][3] == dense[rank][3] % etp, "the expert tensor rank does not follow from the tensor rank"
    return {(dense[rank][3], dense[rank][0], expert[rank][2]) for rank in dense}


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "etp", "dp"),
    [
        (2, 1, 1, 2, 1),
        (2, 2, 2, 2, 2),
        (2, 1, 2, 1, 1),
        (4, 2, 4, 1, 2),
        (4, 1, 2, 2, 1),
        (2, 1, 3, 1, 3),
        (1, 2, 4, 1, 4),
    ],
)
def test_folders_are_those_of_the_ranks_of_a_job(tp: int, pp: int, ep: int, etp: int, dp: int) -> None:
    layout = interchange.Layout(tp, pp, ep, etp)
    ranks = list(layout.ranks())
    assert len(ranks) == len(set(ranks)) == pp * layout.writers_per_stage
    assert set(ranks) == _world_ranks(tp, pp, ep, etp, dp)


def test_layouts_that_folders_cannot_express() -> None:
    for tp, etp in ((1, 2), (3, 2)):
        with pytest.raises(ValueError, match="choose a size that divides the tensor-parallel size"):
            interchange.Layout(tp, 1, 2, etp)


@pytest.mark.parametrize(
    "layout", [interchange.Layout(2, 1, 2), interchange.Layout(1, 3, 2), interchange.Layout(2, 2, 2, 1)], ids=str
)
def test_layout_of_a_folder(tmp_path: Path, layout: interchange.Layout) -> None:
    content = {"args": interchange.model_args_namespace(MODEL, layout, 64), "model": {}}
    for ranks in layout.ranks():
        (tmp_path / layout.folder(*ranks)).mkdir()
        interchange.save_torch(tmp_path / layout.folder(*ranks) / interchange.CHECKPOINT_FILE, content)
    assert str(interchange.available_layout(tmp_path)) == str(layout)
    last = tmp_path / layout.folder(*list(layout.ranks())[-1])
    last.rename(tmp_path / "mp_rank_07_007_007")
    with pytest.raises(ValueError, match="missing"):
        interchange.available_layout(tmp_path)


def test_files_keep_values_and_survive_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content = {
        "args": Namespace(num_layers=2, lr=1e-3, name="x", none=None, sizes=[1, 2], dtype=torch.bfloat16),
        "checkpoint_version": 3.0,
        "model": {"w": torch.arange(6, dtype=torch.bfloat16)},
    }
    interchange.save_torch(path, content)
    for mmap in (False, True):
        loaded = interchange.load_torch(path, mmap=mmap)
        assert loaded["args"] == content["args"] and loaded["checkpoint_version"] == 3.0
        assert torch.equal(loaded["model"]["w"], content["model"]["w"])  # type: ignore[index]
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        interchange.save_torch(path, {"bad": lambda: None})
    assert os.listdir(tmp_path) == ["a.pt"] and interchange.load_torch(path)["checkpoint_version"] == 3.0


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        interchange.load_torch(path)
    interchange.save_torch(path, {"w": torch.arange(1000.0)})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (bytes(flipped), whole[: len(whole) // 2], whole[:-10], b"", b"not a checkpoint", b"PK\x03\x04"):
        path.write_bytes(damaged)
        for mmap in (False, True):
            with pytest.raises(ValueError, match=r"a\.pt"):
                interchange.load_torch(path, mmap=mmap)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list"):
        interchange.load_torch(path)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("in_args", [True, False])
def test_a_planted_payload_never_runs(tmp_path: Path, zipped: bool, in_args: bool) -> None:
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    payload = _Payload(marker)
    content = {"args": Namespace(x=payload)} if in_args else {"args": Namespace(), "model": payload}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="never run"):
        interchange.load_torch(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload of this test does nothing"


def test_objects_of_other_megatron_classes_are_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumerations in the args of NVIDIA's checkpoints do not prevent reading; their modules are not imported."""
    module = types.ModuleType("megatron.core.not_ours")
    exec(
        "import enum\nclass Kind(enum.Enum):\n    A = 1\nclass State:\n    def __init__(self):\n        self.x = 1\n",
        module.__dict__,
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "megatron.core.not_ours", module)
        torch.save({"args": Namespace(kind=module.Kind.A, state=module.State(), n=3)}, tmp_path / "a.pt")
    loaded = interchange.load_torch(tmp_path / "a.pt")
    assert loaded["args"].n == 3 and not hasattr(loaded["args"].state, "x")
    assert "megatron.core.not_ours" not in sys.modules


MODEL = ModelConfig(
    num_layers=2, hidden_size=12, ffn_hidden_size=8, num_attention_heads=6, num_query_groups=3, kv_channels=4,
    vocab_size=300, num_experts=4, rotary_base=1e6, params_dtype="bfloat16",
)  # fmt: skip


def test_args_have_megatrons_names_and_come_back(tmp_path: Path) -> None:
    args = interchange.model_args_namespace(MODEL, interchange.Layout(2), 64, {"tokenizer_type": "NullTokenizer"})
    interchange.save_torch(tmp_path / "a.pt", {"args": args})
    loaded = interchange.load_torch(tmp_path / "a.pt")["args"]
    assert (loaded.vocab_size, loaded.padded_vocab_size, loaded.seq_length) == (300, 512, 64)
    assert loaded.group_query_attention and loaded.swiglu and loaded.untie_embeddings_and_output_weights
    assert loaded.normalization == "RMSNorm" and loaded.position_embedding_type == "rope" and loaded.bf16
    assert (loaded.tensor_model_parallel_size, loaded.pipeline_model_parallel_size) == (2, 1)
    assert loaded.tokenizer_type == "NullTokenizer"
    assert interchange.model_config_from_args(loaded) == MODEL


def test_args_of_other_programs() -> None:
    args = interchange.model_args_namespace(MODEL, interchange.Layout(), 64)
    args.params_dtype = torch.bfloat16
    args.group_query_attention, args.num_query_groups = False, 1
    del args.vocab_size
    model = interchange.model_config_from_args(args)
    assert model.vocab_size is None and model.query_groups == 6 and model.params_dtype == "bfloat16"
    assert interchange.model_config_from_args(args, 299).vocab_size == 299
    args.moe_router_topk_scaling_factor, args.moe_ffn_hidden_size = None, 40
    assert interchange.model_config_from_args(args).ffn_hidden_size == 40


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("swiglu", False, "swiglu=False"),
        ("add_bias_linear", True, "add_bias_linear=True"),
        ("untie_embeddings_and_output_weights", False, "untie"),
        ("rotary_interleaved", True, "rotary_interleaved=True"),
        ("moe_router_score_function", "sigmoid", "moe_router_score_function='sigmoid'"),
        ("quick_geglu", True, "quick_geglu=True"),
        ("moe_router_topk_scaling_factor", 2.5, r"moe_router_topk_scaling_factor=2\.5"),
        ("moe_router_group_topk", 2, "moe_router_group_topk=2"),
        ("num_layers", "2", "wrong type"),
        ("num_experts", None, "no num_experts"),
        ("rotary_base", None, "no rotary_base"),
    ],
)
def test_args_of_another_architecture_are_refused(name: str, value: object, message: str) -> None:
    args = interchange.model_args_namespace(MODEL, interchange.Layout(), 64)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        interchange.model_config_from_args(args)
