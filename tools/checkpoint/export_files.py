"""What an exported model has besides weights: config.json, from a folder or made, and the files around it."""

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
from tools.checkpoint.model_folder import CONFIG_FILE, companion_files, has_vocabulary, read_config
from tools.checkpoint.stream import Description


class ModelFiles:
    """The config and companion files of a model, read from `folder`, or found by what the checkpoint says of itself.

    A folder with tokenizer files but no config.json gives these; without a folder they are those that the checkpoint
    was trained with. Raises ValueError or OSError naming what cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        """Where the companion files are."""
        self.config: dict[str, Any] | None = None
        """The folder's config.json; None if it has none, and one is made."""
        self.companions: list[str] = []
        """Names of the files to copy."""
        if folder is None:
            return
        if not _is_tokenizer_folder(folder):
            self.config = read_config(folder)
        self.companions = companion_files(folder)

    def paths(self) -> dict[str, Path]:
        """Where each companion file is."""
        return {} if self.folder is None else {name: self.folder / name for name in self.companions}

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
            self._find_tokenizer(description.tokenizer_model)
        bos, eos = self._special_tokens(description)
        config = hf_config_from_model(description.model, sliding_window=description.sliding_window, bos=bos, eos=eos)
        check_config_matches(description.model, config)
        print(f"{CONFIG_FILE} is made from the arguments in {description.folder}")
        return config

    def _find_tokenizer(self, model: str | None) -> None:
        """Takes the tokenizer that the checkpoint names, if it is on this machine."""
        if model is None:
            return
        path = Path(model)
        if not path.exists():
            _note(f"the checkpoint's tokenizer, {model}, is not there: name its folder with --huggingface-config-path")
            return
        self.folder = path if path.is_dir() else path.parent
        self.companions = companion_files(self.folder)

    def _special_tokens(self, description: Description) -> tuple[int | None, int | None]:
        """Ids of the tokens that begin and end a text. Raises ValueError if the model has no place for all tokens."""
        if self.folder is None or not has_vocabulary(self.companions):
            _note(f"without a tokenizer the ids of the special tokens in {CONFIG_FILE} are null")
            return None, None
        from megatron.core.tokenizers.pretrained import build_pretrained_tokenizer

        try:
            tokenizer = build_pretrained_tokenizer(str(self.folder))
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
