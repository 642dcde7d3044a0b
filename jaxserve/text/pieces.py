"""What all tokenizers share: how the pieces of a vocabulary become bytes, and bytes text."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Collection, Sequence

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class PieceTokenizer(abc.ABC):
    """A vocabulary of pieces with their spelling; a `Tokenizer` but for `encode`.

    Args:
        spell: bytes of a piece, given its id and its text; asked once a token.
        special_ids: control tokens.
        strips_first_space, eos_token_ids, vocab_size: see `Tokenizer`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        spell: Callable[[int, str], bytes],
        special_ids: Collection[int],
        eos_token_ids: Sequence[int],
        strips_first_space: bool,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.strips_first_space = strips_first_space
        self._spell = spell
        self._special_ids = frozenset(special_ids)
        self._spelled: dict[int, bytes] = {}

    @abc.abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer`."""

    @abc.abstractmethod
    def token_text(self, token_id: int) -> str:
        """See `Tokenizer`."""

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer`."""
        spelled = self._spelled.get(token_id)
        if spelled is None:
            spelled = self._spell(token_id, self.token_text(token_id))
            if 0 <= token_id < self.vocab_size:  # others are all empty; keep the table bounded
                self._spelled[token_id] = spelled
        return spelled

    def is_special(self, token_id: int) -> bool:
        """See `Tokenizer`."""
        return token_id in self._special_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Tokenizer`."""
        if skip_special_tokens:
            special_ids = self._special_ids
            token_ids = [token for token in token_ids if token not in special_ids]
        text = b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text


def spell_byte_level(piece: str) -> bytes:
    """Bytes of a GPT-2 style piece, in which each byte is written as one printable character."""
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, piece))
    except KeyError:  # an added token, written as it is
        return piece.encode("utf-8", "replace")


def spell_sentence_piece(piece: str) -> bytes:
    """Bytes of a SentencePiece piece: "▁" is a space, "<0xNN>" a byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return piece.replace("▁", " ").encode("utf-8", "replace")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
