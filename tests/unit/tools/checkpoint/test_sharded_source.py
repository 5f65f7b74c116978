"""Checkpoints in the sharded format convert to Hugging Face and to other layouts like any other."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from conversion_testing import MakeModel, assert_same_tensors, disk_tensors

from megatron.core.dist_checkpointing import TensorShard, write_metadata, write_shards
from megatron.core.interchange import load_torch, save_torch
from megatron.core.interchange.element_types import to_torch
from megatron.core.models.mixtral.weights import mixtral_weights
from tools.checkpoint import convert_megatron_to_hf_mixtral, util
from tools.checkpoint.loader_mixtral import PerRankSource

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def trained(make_model: MakeModel, tmp_path: Path) -> tuple[Path, Path]:
    """A Hugging Face model, and a sharded checkpoint with its weights, saved by two tensor-parallel ranks."""
    model = make_model()
    command = f"--loader mixtral_hf --saver mixtral --load-dir '{model}' --save-dir '{tmp_path}/released'"
    assert util.main(["--model-type", "GPT", *shlex.split(command)]) == 0
    source = PerRankSource(tmp_path / "released")
    folder = tmp_path / "run" / "iter_0000003"
    folder.mkdir(parents=True)
    written = []
    for rank in range(2):
        shards = []
        for rule in mixtral_weights(source.description.model):
            whole = to_torch(source.read(rule, range(rule.shape[0])), "bfloat16")
            if rule.partition_dim is None:
                part = whole.flatten() if rank == 0 else whole.flatten()[:0]
            elif rule.partition_dim == 0:
                rows = [row for rows in rule.part_rows(rank, 2) for row in rows]
                part = whole[rows].flatten()
            else:
                part = whole.chunk(2, dim=1)[rank].flatten()
            shards.append(
                TensorShard(
                    kind="weight", name=rule.name, shape=rule.shape, data=part, partition_dim=rule.partition_dim,
                    stride=rule.partition_stride, rank=rank, size=2,
                )
            )  # fmt: skip
        written.append(write_shards(folder, rank, shards))
    content = load_torch(tmp_path / "released" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    write_metadata(folder, written, iteration=3, arguments=vars(content["args"]), state={})
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    return model, tmp_path / "run"


def _to_huggingface(source: Path, config: Path, target: Path) -> int:
    command = ["--megatron-checkpoint-path", str(source), "--huggingface-config-path", str(config)]
    command += ["--huggingface-checkpoint-path", str(target), "--max-shard-size", "50KB"]
    return convert_megatron_to_hf_mixtral.main(command)


def test_weights_arrive_bit_for_bit(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, run = trained
    assert _to_huggingface(run, model, tmp_path / "hf") == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(model))
    (run / "iter_0000003" / "sharded.json").rename(run / "iter_0000003" / "metadata.json")  # as it was named before
    command = f"--loader mixtral --saver mixtral --load-dir '{run}' --save-dir '{tmp_path}/tp2'"
    sizes = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    assert util.main(["--model-type", "GPT", *shlex.split(command), *sizes.split()]) == 0
    assert _to_huggingface(tmp_path / "tp2", model, tmp_path / "hf2") == 0
    assert_same_tensors(tmp_path / "hf2", disk_tensors(model))


def _to_huggingface_alone(source: Path, target: Path, *flags: str) -> int:
    command = ["--megatron-checkpoint-path", str(source), "--huggingface-checkpoint-path", str(target)]
    return convert_megatron_to_hf_mixtral.main([*command, *flags])


def _tokenizer(folder: Path, entries: int) -> Path:
    from tokenizers import Tokenizer, models

    folder.mkdir()
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, entries)}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@pytest.mark.parametrize("kind", ["torch", "sharded"])
def test_a_config_is_made_where_there_is_none(
    trained: tuple[Path, Path], tmp_path: Path, capsys: Capture, kind: str
) -> None:
    """Of a model trained from scratch there is nothing but the checkpoint and a tokenizer."""
    from transformers import AutoConfig

    model, run = trained
    source = run if kind == "sharded" else tmp_path / "released"
    tokenizer = _tokenizer(tmp_path / "tokenizer", 150)
    assert _to_huggingface_alone(source, tmp_path / "hf", "--huggingface-config-path", str(tokenizer)) == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(model))
    assert "config.json is made from the arguments" in capsys.readouterr().out
    made, original = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "hf", model))
    different = {name for name in made.keys() & original.keys() if made[name] != original[name]}
    assert different <= {"_name_or_path", "head_dim"}  # a head_dim of null is worked out elsewhere
    assert (made["bos_token_id"], made["eos_token_id"]) == (1, 2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tokenizer / name).read_bytes()
    # The tokenizer that the checkpoint names is taken, whose files are no tokenizer here: the ids are unknown.
    assert _to_huggingface_alone(source, tmp_path / "hf2") == 0
    assert (tmp_path / "hf2" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    assert "the ids of the special tokens in config.json are null" in capsys.readouterr().err
    large = _tokenizer(tmp_path / "large", 151)
    assert _to_huggingface_alone(source, tmp_path / "hf3", "--huggingface-config-path", str(large)) == 1
    assert "has 151 entries but the checkpoint's vocabulary 150" in capsys.readouterr().err
    assert not (tmp_path / "hf3").exists()


def test_what_a_config_contradicts_is_named_and_kept(
    trained: tuple[Path, Path], copy_model: MakeModel, tmp_path: Path, capsys: Capture
) -> None:
    folder = copy_model("other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 99, "sliding_window": 7}))
    assert _to_huggingface(trained[1], folder, tmp_path / "hf") == 0
    notes = capsys.readouterr().err
    assert "max_position_embeddings is 99" in notes and "but 64 in the checkpoint" in notes
    assert "sliding_window is 7" in notes and "but None in the checkpoint" in notes
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["sliding_window"] == 7


@pytest.mark.parametrize("kind", ["torch", "sharded"])
def test_another_layout_than_the_one_given_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: Capture, kind: str
) -> None:
    source = trained[1] if kind == "sharded" else tmp_path / "released"
    assert _to_huggingface_alone(source, tmp_path / "hf", "--tensor-parallel-size", "4") == 1
    assert "not at tensor x pipeline x expert parallel sizes 4 x 1 x 1" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert _to_huggingface_alone(source, tmp_path / "hf", "--tensor-parallel-size", "1", "--dry-run") == 0


def test_damage_is_named_and_leaves_nothing(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = trained
    file = run / "iter_0000003" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert _to_huggingface(run, model, tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert "rank_00001.safetensors was altered" in error and "Traceback" not in error
    assert not (tmp_path / "hf").exists()
    # What takes no reading is found first; --dry-run finds both.
    command = shlex.split(f"--loader mixtral --saver mixtral --load-dir '{run}' --save-dir '{tmp_path}/m' --dry-run")
    for flags, message in ((["--target-tensor-parallel-size", "3"], "num-attention-heads"), ([], "was altered")):
        assert util.main([*command, *flags]) == 1
        assert message in capsys.readouterr().err


def test_a_weight_of_another_model_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = trained
    folder = run / "iter_0000003"
    (folder / "sharded.json").unlink()
    shard = TensorShard(kind="weight", name="decoder.surprise", shape=(2,), data=torch.zeros(2))
    args = load_torch(tmp_path / "released" / "release" / "mp_rank_00" / "model_optim_rng.pt")["args"]
    write_metadata(folder, [write_shards(folder, 5, [shard])], iteration=3, arguments=vars(args), state={})
    assert _to_huggingface(run, model, tmp_path / "hf") == 1
    assert "lacks decoder.final_layernorm.weight" in capsys.readouterr().err


def _gpt2_files(folder: Path) -> tuple[Path, Path]:
    """A vocabulary of 300 entries in GPT-2's two files, under names of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    text = " ".join(f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh")
    tokenizer.train_from_iterator([text], trainer)
    for name in ("vocabulary", "merges"):
        (folder / name).mkdir(parents=True)
    vocab_file, merge_file = tokenizer.model.save(str(folder), "gpt2")
    moved = folder / "vocabulary" / "my-vocab.json", folder / "merges" / "my-merges.txt"
    return Path(vocab_file).rename(moved[0]), Path(merge_file).rename(moved[1])


@pytest.mark.parametrize("given", ["by the checkpoint", "as a folder", "by nobody"])
def test_the_files_of_a_gpt2_tokenizer_go_with_a_config_that_is_made(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, given: str
) -> None:
    from transformers import AutoTokenizer

    from megatron.core.tokenizers.gpt2_bpe_tokenizer import GPT2BPETokenizer

    vocab_file, merge_file = _gpt2_files(tmp_path / "gpt2")
    ours = GPT2BPETokenizer(str(vocab_file), str(merge_file))
    run, again, target = tmp_path / "run", tmp_path / "again", tmp_path / "hf"
    command = ["--loader", "mixtral_hf", "--saver", "mixtral", "--load-dir", str(make_model(vocab=300))]
    assert util.main([*command, "--save-dir", str(run)]) == 0
    file = run / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_torch(file)
    vars(content["args"]).update(
        tokenizer_type="GPT2BPETokenizer", tokenizer_model=None, vocab_file=str(vocab_file), merge_file=str(merge_file)
    )
    save_torch(file, content)
    command = ["--loader", "mixtral", "--saver", "mixtral", "--load-dir", str(run), "--save-dir", str(again)]
    assert util.main(command) == 0, "the next conversion knows the files as well"
    flags: list[str] = []
    if given == "as a folder":
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        vocab_file, merge_file = vocab_file.rename(folder / "vocab.json"), merge_file.rename(folder / "merges.txt")
        flags = ["--huggingface-config-path", str(folder)]
    if given == "by nobody":
        merge_file.unlink()
    capsys.readouterr()
    assert _to_huggingface_alone(again, target, *flags) == 0
    if given == "by nobody":
        assert f"the checkpoint's tokenizer, {merge_file}, is not there" in capsys.readouterr().err
        return
    assert (target / "vocab.json").read_bytes() == vocab_file.read_bytes()
    assert (target / "merges.txt").read_bytes() == merge_file.read_bytes()
    theirs, text = AutoTokenizer.from_pretrained(target), "abba bad\n é 'll  x"
    assert theirs(text).input_ids == ours.tokenize(text) and theirs.decode(ours.tokenize(text)) == text
    assert theirs.eos_token_id == ours.eod == json.loads((target / "config.json").read_text())["eos_token_id"]
