"""Tokenizers that are a sentencepiece model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron.core.tokenizers import Tokenizer


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: --tokenizer-model takes a sentencepiece tokenizer.model")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        _pieces(model)
    except (RuntimeError, UnicodeDecodeError) as error:  # the library gives bytes that are no UTF-8 to Python
        raise ValueError(f"{path} is not a sentencepiece model ({error})") from None
    return model


def _pieces(model: Any) -> list[str]:
    return model.id_to_piece(list(range(model.get_piece_size())))


def read_pieces(path: Path) -> list[str]:
    """The pieces of the model in a file, by id. Raises ValueError naming it if it is not a sentencepiece model."""
    return _pieces(_load(path))


class SentencePieceTokenizer(Tokenizer):
    """The sentencepiece model in a file, as Llama 2 and Mixtral use it.

    `eos_token` and `bos_token` name the pieces where the folder's configuration does; else the model's own are taken.
    Special tokens written out in a text ("</s>") are ordinary text.
    """

    kind, file_format = "SentencePiece", "tokenizer.model"

    def __init__(self, model_file: str | Path, eos_token: str | None = None, bos_token: str | None = None) -> None:
        self.paths = [Path(model_file)]
        self._model = _load(self.paths[0])
        self.vocab_size = self._model.get_piece_size()
        eod = self._piece(eos_token, self._model.eos_id())
        if eod is None:
            raise ValueError(f"{model_file} has no end-of-sequence token to end documents with")
        self.eod = eod
        self.bos = self._piece(bos_token, self._model.bos_id())

    @property
    def added_tokens(self) -> list[str]:
        ids = range(self.vocab_size)
        return [self._model.id_to_piece(i) for i in ids if self._model.is_control(i) or self._model.is_unused(i)]

    def _piece(self, token: str | None, default: int) -> int | None:
        if token is not None:
            piece = self._model.piece_to_id(token)
            if piece == self._model.unk_id() and token != self._model.id_to_piece(piece):
                raise ValueError(f"{self.paths[0]} has no piece {token!r}, which the configuration in its folder names")
            return piece
        return default if default >= 0 else None

    def tokenize(self, text: str) -> list[int]:
        return self._model.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(map(int, ids)))
