"""Every parser of files that users bring, with good files to damage."""

import argparse
import bz2
import gzip
import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_testing import Target
from fuzz_tokenizer_targets import TARGETS as TOKENIZERS

_LINES = [
    {"text": "The quick brown fox\njumps."},
    {"text": "1 2 3", "more": [1, {"a": None}]},
    {"text": "中文 \U0001f9ff"},
    {"text": ""},
]
_CORPUS = "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(_LINES)).encode() + b"\n\n"


def _data_set(folder: Path) -> None:
    from megatron.core.datasets.description import Origin
    from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter

    identity = {"type": "NullTokenizer", "vocab_size": 100, "eod": 99, "sha256": {"a": "0" * 64}, "bos": None}
    source = {"files": [{"path": "a.jsonl", "documents": 3, "bytes": 9}], "files_not_listed": 0, "left_aside": {}}
    for name in ("a", "b"):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for size in (3, 1, 7):
                writer.add_document(list(range(size)))
            writer.finalize(Origin("text", identity, False, False), source)


def _read_data_set(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(folder / "a")
    for document in range(min(indexed.document_count, 50)):
        indexed.get_document(document).sum()
    indexed.document_lengths(0, indexed.document_count)
    assert indexed.fingerprint


def _show_data_set(folder: Path) -> None:
    from tools.data import info, verify

    info(argparse.Namespace(datasets=[str(folder / "a")]))
    verify(argparse.Namespace(datasets=[str(folder / "a")], vocab_size=None, tokenizer_model=None))


def _merge(folder: Path) -> None:
    from tools.merge_datasets import merge

    merge([str(folder)], str(folder / "out" / "ab"))


def _blends(folder: Path) -> None:
    (folder / "blend.txt").write_text("0.5 a_text_document 1e-1 b_text_document 3 c.idx\n")
    (folder / "splits.json").write_text(json.dumps({"train": ["0.6", "a", "0.4", "b"], "valid": ["c"], "test": []}))
    (folder / "split.txt").write_text("969,30,1")


def _long_blend(folder: Path) -> None:
    """So many sources that what is quadratic in them takes too long."""
    _blends(folder)
    (folder / "blend.txt").write_text("".join(f"1 part{number}_text_document\n" for number in range(30_000)))


def _read_blends(folder: Path) -> None:
    from megatron.core.config import DataConfig
    from megatron.core.datasets.blend import BlendOrder, split_blends

    path = {name: str(folder / name) for name in ("blend.txt", "splits.json")}
    split = (folder / "split.txt").read_text(errors="replace")
    for config in (
        DataConfig(data_args_path=path["blend.txt"], split=split),
        DataConfig(per_split_data_args_path=path["splits.json"]),
    ):
        for blend in split_blends(config):
            weights = [source.weight for source in blend.sources if source.weight] if blend else []
            if weights:
                BlendOrder(weights).locate(1000)
            if blend:
                blend.documents(1000)


def _corpus(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content())  # type: ignore[func-returns-value]


def _zst() -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(_CORPUS) + zstandard.ZstdCompressor(write_checksum=True).compress(
        _CORPUS
    )


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [line["text"] for line in _LINES] * 20, "n": list(range(80))})
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, compression="snappy", row_group_size=40)
    return out.getvalue()


def _read_corpus(folder: Path) -> None:
    from tools.preprocessing.inputs import find_inputs
    from tools.preprocessing.reader import blocks_of, check_columns
    from tools.preprocessing.worker import measured, read_documents

    corpus = find_inputs([str(path) for path in folder.iterdir()])
    check_columns(corpus.files, ["text"])
    for part in corpus.files:
        for block in blocks_of(part, ["text"]):
            assert block.start <= block.end <= part.end
            if not block.broken:
                found = read_documents(block, ["text"])
                measured(block, found)


def _run_files(folder: Path) -> None:
    """An interrupted run's journal, of which the fingerprint is put in when it is read, and a rank's status."""
    from megatron.core.datasets.indexed_dataset_writer import WriterState
    from tools.preprocessing.journal import Journal, journal_path
    from tools.preprocessing.part import Report
    from tools.preprocessing.records import seal
    from tools.preprocessing.statistics import FileCount, Statistics

    (folder / "corpus.jsonl").write_bytes(b'{"text": "1 2 3"}\n' * 4)
    part = FileCount([0], 72, 0, 0, 0)
    statistics = Statistics([0], {str(folder.parent / "case" / "corpus.jsonl"): part})
    Journal("@", [WriterState()], statistics).write(journal_path(str(folder / "out")))
    report = [vars(statistics), *Report(statistics, "a", 1, 0)[1:]]
    status = {"state": "done", "run": "0" * 32, "beat": 1, "fingerprint": "@", "report": report}
    (folder / "out_rank00001of00002_status.json").write_bytes(seal(status))


def _resume(folder: Path) -> None:
    from tools.preprocessing import run
    from tools.preprocessing.journal import journal_path
    from tools.preprocessing.part import Part, PartRun
    from tools.preprocessing.ranks import Place, finished_report
    from tools.preprocessing.records import seal, unseal
    from tools.preprocessing.settings import Settings, TokenizerFlags

    flags = TokenizerFlags(tokenizer_type="NullTokenizer", vocab_size=100)
    settings = Settings(
        input=[str(folder / "corpus.jsonl")], output_prefix=str(folder / "out"), json_keys=["text"], tokenizer=flags,
        resume=True,
    )  # fmt: skip
    corpus = run.find_inputs(settings.input)
    tokenizer = run.build_tokenizer(flags, 100)
    encoder = run.Encoder(settings, tokenizer, run.ReferenceEngine(tokenizer))
    pool: Any = argparse.Namespace(encode=lambda blocks: ((block, encoder.encode(block)) for block in blocks))
    part = Part(settings, settings.output_prefix, corpus.files, corpus, tokenizer, pool, "", lambda: None)
    for path in (journal_path(settings.output_prefix), folder / "out_rank00001of00002_status.json"):
        with suppress(ValueError):
            path.write_bytes(seal(unseal(path.read_bytes()) | {"fingerprint": part.fingerprint}))
    if (report := finished_report(settings.output_prefix, Place(1, 2), part.fingerprint)) is not None:
        report.statistics.add(report.statistics)
    PartRun(part, lambda statistics, documents: None, lambda statistics, path: None).run()


def _step(folder: Path) -> None:
    import torch

    from megatron.core.dist_checkpointing.blocks import TensorShard
    from megatron.core.dist_checkpointing.writer import write_metadata, write_shards

    cut = TensorShard(kind="weight", name="a", shape=(4, 6), data=torch.zeros(12), partition_dim=1, size=2)
    whole = TensorShard(kind="master", name="b", shape=(5,), data=torch.ones(5))
    parts = [write_shards(folder, 0, [cut, whole]), write_shards(folder, 1, [TensorShard(**{**vars(cut), "rank": 1})])]
    write_metadata(folder, parts, iteration=1, arguments={"lr": 1e-3}, state={"n": [1]})


def _step_content(folder: Path) -> None:
    _step(folder)
    document = json.loads((folder / "sharded.json").read_text())
    (folder / "sharded.json").write_text(json.dumps(document["content"]))


def _with_checksum(content: bytes) -> bytes:
    """Metadata of this content, whose checksum is right."""
    try:
        content = json.dumps(json.loads(content), separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return content
    head = f'"format":"megatron-mixtral training checkpoint","version":1,"checksum":{zlib.crc32(content)}'
    return b"{" + head.encode() + b',"content":' + content + b"}"


def _read_step(folder: Path) -> None:
    from megatron.core.dist_checkpointing.reader import CheckpointReader

    with CheckpointReader(folder) as reader:
        reader.verify()
        for kind, name in list(reader.metadata.tensors)[:20]:
            reader.read(name, kind)


def _torch_file(zipped: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch

        content = {
            "w": torch.arange(48.0).reshape(6, 8), "turned": torch.ones(4, 6).T, "half": torch.ones(3).bfloat16(),
            "none": torch.empty(0), "args": argparse.Namespace(a=[1, 2.5, None], b={"c": (True, b"\xff")}),
        }  # fmt: skip
        torch.save(content, folder / "a.pt", _use_new_zipfile_serialization=zipped)

    return make


def _pickle(folder: Path) -> None:
    _torch_file(True)(folder)
    with zipfile.ZipFile(folder / "a.pt") as archive:
        described = archive.read("a/data.pkl")
    (folder / "a.pt").write_bytes(described)


def _archive(described: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", described)
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/version", b"3\n")
        for number, size in enumerate((192, 96, 6, 0)):  # what the tensors of `_torch_file` take
            archive.writestr(f"a/data/{number}", bytes(size))
    return out.getvalue()


def _read_torch(folder: Path) -> None:
    from megatron.core.interchange import load_torch
    from megatron.core.interchange.stored_tensor import open_torch, stored_tensor

    path = folder / "a.pt"
    content, records = open_torch(path)
    for name, value in content.items():
        try:
            stored_tensor(path, records, name, value).read()
        except ValueError:
            continue
    repr(content)
    load_torch(path)


def _torch_dist(folder: Path) -> None:
    """Two tensors, one of them in two chunks, and an object, as Megatron-LM has them."""
    import torch
    from torch_dist_testing import save_torch_dist

    pieces = {"a": [((0, 0), torch.ones(2, 3)), ((2, 0), torch.ones(1, 3))], "b": [((0,), torch.ones(4).bfloat16())]}
    common = {"optimizer": [{"step": torch.tensor(2.0)}], "opt_param_scheduler": {"num_steps": 3}}
    args = argparse.Namespace(num_layers=2)
    save_torch_dist(folder, pieces, args, objects={"c/shard_0_1": [None]}, common=common, files=1)


def _read_torch_dist(folder: Path) -> None:
    from megatron.core.interchange.element_types import STORED_AS
    from megatron.core.interchange.torch_dist import CheckpointFolder, ModelKeys, saved_run

    checkpoint = CheckpointFolder(folder)
    repr(saved_run(checkpoint))
    ModelKeys(checkpoint)
    checkpoint.verify(key for key, saved in checkpoint.catalog.tensors.items() if saved.dtype in STORED_AS)
    for key, saved in checkpoint.catalog.tensors.items():
        if saved.dtype in STORED_AS and saved.shape and 0 not in saved.shape:
            target = np.empty(saved.shape, STORED_AS[saved.dtype])
            checkpoint.read_into(target, key, (), range(saved.shape[0]), saved.dtype)
            width = saved.shape[1] if len(saved.shape) > 1 else 1
            if len(saved.shape) < 3:
                target = np.empty((saved.shape[0], width), STORED_AS[saved.dtype])
                checkpoint.read_part(target, key, (), range(saved.shape[0]), range(width))


_CONFIG: dict[str, Any] = {
    "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2,
    "vocab_size": 16, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "torch_dtype": "float32",
    "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None, "router_aux_loss_coef": 0.02,
}  # fmt: skip


def _tensors() -> dict[str, Any]:
    from megatron.core.models.mixtral.hf_config import model_config_from_hf
    from megatron.core.models.mixtral.weights import mixtral_weights

    sources = [source for rule in mixtral_weights(model_config_from_hf(_CONFIG)) for source in rule.sources]
    return {source.name: np.ones(source.shape, np.float32) for source in sources}


def _model(shards: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = _tensors()
        (folder / "config.json").write_text(json.dumps(_CONFIG))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return
        names = sorted(tensors)
        files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
        for file, some in files.items():
            save_file({name: tensors[name] for name in some}, folder / file)
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {name: file for file, some in files.items() for name in some},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def _header(folder: Path) -> None:
    """The weights' header alone; what follows it is put behind it again."""
    _model(1)(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[8 : 8 + int.from_bytes(content[:8], "little")].strip())


def _with_data(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(4 * sum(array.size for array in _tensors().values()))


def _read_model(folder: Path) -> None:
    from megatron.core.models.mixtral.weights import mixtral_weights
    from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource

    source = HuggingFaceSource(folder)
    for rule in islice(mixtral_weights(source.description.model), 20):
        source.read(rule, range(min(2, rule.sources[0].shape[0])))


TARGETS = {
    "indexed_data_set": Target([_data_set], _read_data_set, ("a.idx", "a.bin")),
    "description": Target([_data_set], _show_data_set, ("a.json",)),
    "merge": Target([_data_set], _merge, ("a.json", "b.idx")),
    "blends": Target([_blends, _long_blend], _read_blends),
    "lines": Target([_corpus("a.jsonl", lambda: _CORPUS)], _read_corpus),
    "compressed": Target(
        [
            _corpus("a.jsonl.gz", lambda: gzip.compress(_CORPUS) + gzip.compress(_CORPUS)),
            _corpus("a.jsonl.bz2", lambda: bz2.compress(_CORPUS)),
            _corpus("a.jsonl.xz", lambda: lzma.compress(_CORPUS)),
            _corpus("a.jsonl.zst", _zst),
        ],
        _read_corpus,
    ),
    "parquet": Target([_corpus("a.parquet", _parquet)], _read_corpus),
    "run_files": Target([_run_files], _resume, ("out_*.json",)),
    "step": Target([_step], _read_step),
    "step_metadata": Target([_step_content], _read_step, ("sharded.json",), {"sharded.json": _with_checksum}),
    "torch_file": Target([_torch_file(True), _torch_file(False)], _read_torch),
    "torch_pickle": Target([_pickle], _read_torch, wrap={"a.pt": _archive}),
    "torch_dist": Target([_torch_dist], _read_torch_dist, ("__*.distcp", "common.pt")),
    "torch_dist_metadata": Target([_torch_dist], _read_torch_dist, (".metadata",)),
    "model_config": Target([_model(1)], _read_model, ("config.json",)),
    "model_index": Target([_model(3)], _read_model, ("*.index.json",)),
    "model_weights": Target([_model(1)], _read_model, ("*.safetensors",)),
    "model_header": Target([_header], _read_model, ("*.safetensors",), {"model.safetensors": _with_data}),
    **TOKENIZERS,
}
