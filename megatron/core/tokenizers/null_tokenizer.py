"""Text that already is token ids."""

from collections.abc import Sequence

from megatron.core.tokenizers import Tokenizer


class NullTokenizer(Tokenizer):
    """Reads a text as integers separated by white space; the last id of the vocabulary ends documents."""

    kind, file_format = "NullTokenizer", "none"
    added_tokens = ()

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"--vocab-size must be positive, got {vocab_size}")
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text. Raises ValueError for anything but integers of the vocabulary."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            raise ValueError("NullTokenizer takes a text of integers separated by spaces") from None
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """The ids, separated by spaces."""
        return " ".join(map(str, ids))
