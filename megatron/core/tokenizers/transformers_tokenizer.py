"""Tokenizers that only transformers can run."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron.core.text_files import read_text
from megatron.core.tokenizers import Tokenizer
from megatron.core.tokenizers.settings import checked_size

_FILES = (
    "tokenizer.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json", "vocab.json", "merges.txt",
)  # fmt: skip


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or one like it if Windows editors put marks (BOM) before texts, which transformers cannot read."""
    texts = [*folder.glob("*.json"), *folder.glob("*.txt")]
    marked = [path for path in texts if path.read_bytes()[:3] == codecs.BOM_UTF8]
    if not marked:
        yield folder
        return
    with TemporaryDirectory() as name:
        for path in folder.iterdir():
            (Path(name) / path.name).symlink_to(path.resolve())
        for path in marked:
            (Path(name) / path.name).unlink()
            (Path(name) / path.name).write_text(read_text(path), encoding="utf-8")
        yield Path(name)


class TransformersTokenizer(Tokenizer):
    """transformers' AutoTokenizer on a local folder; slow to start, for folders that need its code."""

    kind, file_format = "PretrainedTokenizerFromHF", "transformers"

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        self._folder = folder
        try:
            from transformers import AutoTokenizer

            with _without_marks(folder) as readable:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(readable), trust_remote_code=trust_remote_code, local_files_only=True
                )
            self.detokenize(self.tokenize("a b"))  # some settings of a wrong type show only here
        except Exception as error:  # of files that it did not expect, transformers raises whatever comes of them
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"transformers cannot load the tokenizer in {folder}: {reason}") from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {folder} has no eos_token to end documents with")
        self.eod = self._tokenizer.eos_token_id
        self.bos = self._tokenizer.bos_token_id
        self.vocab_size = checked_size(folder, self._tokenizer.get_vocab().values())

    def _files(self) -> Iterable[Path]:
        return (path for path in self._folder.iterdir() if path.name in _FILES or path.suffix == ".py")

    @property
    def added_tokens(self) -> list[str]:
        return list(self._tokenizer.get_added_vocab())

    def backend_json(self) -> str | None:
        """The tokenizer.json of what gives the ids, as transformers has put it together; None if there is none."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or self._tokenizer.split_special_tokens:
            return None
        return backend.to_str()

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(map(int, ids))))
