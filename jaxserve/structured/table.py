"""The model's vocabulary as llguidance wants it: a trie of all tokens' bytes.

Made once in each process that compiles grammars, from a `Vocabulary`; takes some tenths of a second
for a hundred thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from llguidance import LLTokenizer, TokenizerWrapper

from jaxserve.errors import GrammarError
from jaxserve.types import Vocabulary


class _Tokens:
    """What `TokenizerWrapper` asks for.

    Text is cut into the longest tokens, which need not be how the model's own tokenizer cuts it:
    only guesses of what comes next depend on it, and those are verified.
    """

    def __init__(
        self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        tokens = list(vocabulary.tokens[:vocab_size])
        self.tokens: Sequence[bytes] = tokens + [b""] * (vocab_size - len(tokens))
        # An end token is never text, even where the tokenizer does not say that it is special: it
        # would end the output in the middle.
        special = {*vocabulary.special_token_ids, *eos_token_ids}
        self.special_token_ids = sorted(i for i in special if i < vocab_size)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self.table: LLTokenizer | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        if self.table is None:
            return []
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self.table.greedy_tokenize(text)


def token_table(
    vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """The table of a model.

    Args:
        vocab_size: its logits, which may be more than its tokens.
        eos_token_ids: may follow what matches a grammar.

    Raises:
        GrammarError: there are none, so that nothing could end.
    """
    if not eos_token_ids:
        raise GrammarError("the model has no end token: its output cannot be held to a grammar")
    tokens = _Tokens(vocabulary, vocab_size, eos_token_ids)
    table = LLTokenizer(TokenizerWrapper(cast(object, tokens)), eos_token=list(eos_token_ids))
    tokens.table = table
    return table
