"""What an exported model has besides weights: config.json, from a folder or made, and the files around it."""

import json
import sys
from pathlib import Path
from typing import Any

from megatron.core.interchange.folder_kind import foreign_kind
from megatron.core.models.mixtral.hf_config import (
    check_config_matches,
    hf_config_from_model,
    model_config_from_hf,
    sliding_window_from_hf,
)
from megatron.core.tokenizers import Tokenizer
from tools.checkpoint.model_folder import CONFIG_FILE, companion_files, has_vocabulary, read_config, usable_file
from tools.checkpoint.stream import Description

_FAST, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_GPT2, _GPT2_FILES = "GPT2BPETokenizer", ("vocab.json", "merges.txt")


class ModelFiles:
    """The config and companion files of a model, read from `folder`, or found by what the checkpoint says of itself.

    A folder with tokenizer files but no config.json gives these; without a folder they are those that the checkpoint
    was trained with. Raises ValueError or OSError naming what cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        """Where the companion files are, or the first of them."""
        self.config: dict[str, Any] | None = None
        """The folder's config.json; None if it has none, and one is made."""
        self.paths: dict[str, Path] = {}
        """The files to copy, by the names that they get."""
        self.made: dict[str, str] = {}
        """Text of the files that are made beside config.json, by name."""
        if folder is None:
            return
        if not _is_tokenizer_folder(folder):
            self.config = read_config(folder)
        self._take(folder)

    def _take(self, folder: Path) -> None:
        self.folder = folder
        self.paths = {name: folder / name for name in companion_files(folder)}

    def config_for(self, description: Description) -> dict[str, Any]:
        """The config.json of the checkpoint that was opened, and its tokenizer where no folder was given.

        Raises ValueError if config or tokenizer are of another model. Prints what else contradicts the checkpoint.
        """
        if self.config is not None:
            config = {**self.config, **description.config_changes}
            check_config_matches(description.model, config)
            _tell_contradictions(config, description, self.folder)
            return config
        if self.folder is None:
            self._find_tokenizer(description)
        bos, eos = self._special_tokens(description)
        config = hf_config_from_model(description.model, sliding_window=description.sliding_window, bos=bos, eos=eos)
        check_config_matches(description.model, config)
        print(f"{CONFIG_FILE} is made from the arguments in {description.folder}")
        return config

    def _find_tokenizer(self, description: Description) -> None:
        """Takes the tokenizer that the checkpoint names, if it is on this machine."""
        gpt2 = description.tokenizer_type == _GPT2 and description.vocab_file is not None
        files = [description.vocab_file, description.merge_file] if gpt2 else [description.tokenizer_model]
        paths = [Path(file) for file in files if file is not None]
        missing = next((path for path in paths if not path.exists()), None)
        if missing is not None:
            _note(
                f"the checkpoint's tokenizer, {missing}, is not there: name its folder with --huggingface-config-path"
            )
        elif gpt2 and len(paths) == 2:
            # whose files may be anywhere, under any names
            self.folder = paths[0].parent
            self.paths = {name: usable_file(path.parent, path.name) for name, path in zip(_GPT2_FILES, paths)}
        elif paths:
            self._take(paths[0] if paths[0].is_dir() else paths[0].parent)

    def _open_tokenizer(self, description: Description) -> Tokenizer:
        if description.tokenizer_type != _GPT2 or set(_GPT2_FILES) - self.paths.keys() or _FAST in self.paths:
            from megatron.core.tokenizers.pretrained import build_pretrained_tokenizer

            return build_pretrained_tokenizer(str(self.folder))
        from megatron.core.tokenizers.gpt2_bpe_tokenizer import END_OF_TEXT, GPT2BPETokenizer, gpt2_tokenizer_json

        vocab_file, merge_file = (self.paths[name] for name in _GPT2_FILES)
        tokenizer = GPT2BPETokenizer(str(vocab_file), str(merge_file))
        # Beside a Mixtral config.json transformers does not read the two files for themselves.
        self.made[_FAST] = gpt2_tokenizer_json(vocab_file, merge_file, tokenizer.eod)
        if _SETTINGS not in self.paths:
            special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
            self.made[_SETTINGS] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}, indent=2)
        return tokenizer

    def _special_tokens(self, description: Description) -> tuple[int | None, int | None]:
        """Ids of the tokens that begin and end a text. Raises ValueError if the model has no place for all tokens."""
        if self.folder is None or not has_vocabulary(self.paths):
            _note(f"without a tokenizer the ids of the special tokens in {CONFIG_FILE} are null")
            return None, None
        try:
            tokenizer = self._open_tokenizer(description)
        except (ValueError, OSError, ImportError) as error:
            _note(f"the ids of the special tokens in {CONFIG_FILE} are null: {error}")
            return None, None
        size = description.model.vocab_size
        if size is not None and tokenizer.vocab_size > size:
            raise ValueError(
                f"the tokenizer in {self.folder} has {tokenizer.vocab_size} entries but the checkpoint's vocabulary "
                f"{size}: give the folder of the tokenizer it was trained with"
            )
        if tokenizer.vocab_size != size:
            _note(
                f"the tokenizer in {self.folder} has {tokenizer.vocab_size} entries, the checkpoint's vocabulary {size}"
            )
        return tokenizer.bos, tokenizer.eod


def _is_tokenizer_folder(folder: Path) -> bool:
    """Whether there are tokenizer files but no model, nor one of another kind."""
    if not folder.is_dir() or (folder / CONFIG_FILE).is_symlink() or (folder / CONFIG_FILE).exists():
        return False
    return foreign_kind(folder) is None and has_vocabulary(companion_files(folder))


def _tell_contradictions(config: dict[str, Any], description: Description, folder: Path | None) -> None:
    """Names fields that no weight depends on, but that are not what the checkpoint was trained with."""
    pairs = {
        "max_position_embeddings": (
            model_config_from_hf(config).max_position_embeddings, description.model.max_position_embeddings,
        ),
        "sliding_window": (sliding_window_from_hf(config), description.sliding_window),
    }  # fmt: skip
    for field, (theirs, ours) in pairs.items():
        if theirs != ours:
            _note(f"{field} is {theirs} in {folder}/{CONFIG_FILE}, which is kept, but {ours} in the checkpoint")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
