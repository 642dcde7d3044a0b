"""A vocabulary that needs no file: ids 0 … 255 are the bytes, then a few control tokens.

Ids that a model has beyond them (the fake engine's vocabulary is 512) are spelled as words, so that
all of its output is text. Note that the fake engine ends sequences at its own token 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxserve.errors import InvalidRequest

SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(256, 260)
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")

#: A chat template in this vocabulary.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteTokenizer:
    """See the module.

    Args:
        vocab_size: at least 260.
        add_bos: whether `encode` begins with the first special token.
        strips_first_space: as SentencePiece tokenizers do.
    """

    def __init__(
        self, vocab_size: int = 512, *, add_bos: bool = False, strips_first_space: bool = False
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids: tuple[int, ...] = (EOS,)
        self.strips_first_space = strips_first_space
        self._add_bos = add_bos

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """One token a byte; written-out control tokens become those."""
        ids = [BOS] if add_special_tokens and self._add_bos else []
        for part in _SPECIAL.split(text):
            try:
                ids += [256 + SPECIALS.index(part)] if part in SPECIALS else part.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"the text is not Unicode: {error}") from None
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The bytes, read as UTF-8."""
        kept = [t for t in token_ids if not (skip_special_tokens and self.is_special(t))]
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, the control token's name, or " wN"."""
        return bytes([token_id]) if 0 <= token_id < 256 else self.token_text(token_id).encode()

    def token_text(self, token_id: int) -> str:
        """Bytes as <0xNN>."""
        if not 0 <= token_id < self.vocab_size:
            return ""
        if token_id < 256:
            return f"<0x{token_id:02X}>"
        if token_id < 256 + len(SPECIALS):
            return SPECIALS[token_id - 256]
        return f" w{token_id}"

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token."""
        return 256 <= token_id < 256 + len(SPECIALS)
