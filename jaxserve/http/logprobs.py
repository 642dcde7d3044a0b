"""Log-probabilities on the wire, in OpenAI's two formats and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.text.choice import ChoiceText
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import TokenLogprobs

#: What OpenAI reports for a token of probability zero; JSON has no infinity.
FLOOR = -9999.0


def token_string(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself as text; bytes that are not UTF-8 alone become U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """The `logprobs` of a chat choice or chunk."""
    content = []
    for entry in entries:
        one = _chat_token(tokenizer, entry.token_id, entry.logprob)
        one["top_logprobs"] = [_chat_token(tokenizer, *pair) for pair in entry.top[:num_top]]
        content.append(one)
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where each token of a completion begins in the text that is returned.

    A token that goes on with a character, or is left out of the text, begins where the text then
    stood: offsets never run beyond it, nor back.

    Args:
        prompt_ids: tokens before the first one, whose text is not counted.
        start: characters before it.
        limit: of the offsets; None for none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        start: int = 0,
        limit: int | None = None,
    ) -> None:
        self._text = ChoiceText(tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens)
        self._offset = start
        self._limit = limit

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._offset
        self._offset += len(self._text.add((token_id,)).text)
        return offset if self._limit is None else min(offset, self._limit)


def completion_logprobs(
    tokenizer: Tokenizer,
    entries: Sequence[TokenLogprobs | int],
    num_top: int,
    offset_of: Callable[[int], int],
) -> dict[str, Any]:
    """The `logprobs` of a completion choice or chunk.

    Args:
        entries: in order; a bare token id is the prompt's first token, which has none.
        offset_of: told each token, in order; where it begins (`TextOffsets.next`).
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        token_id = entry if isinstance(entry, int) else entry.token_id
        tokens.append(token_string(tokenizer, token_id))
        offsets.append(offset_of(token_id))
        if isinstance(entry, int):
            values.append(None)
            tops.append(None)
        else:
            values.append(max(entry.logprob, FLOOR))
            tops.append(_top_by_text(tokenizer, entry, num_top))
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops if num_top else None,
        "text_offset": offsets,
    }


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has them: null for the first token, then objects by token id."""
    listed: list[dict[str, Any] | None] = [None]
    for entry in entries:
        best = [(token, value, rank) for rank, (token, value) in enumerate(entry.top[:num_top], 1)]
        own = (entry.token_id, entry.logprob, entry.rank + 1)
        listed.append(
            {
                str(token): {
                    "logprob": max(value, FLOOR),
                    "rank": rank,
                    "decoded_token": token_string(tokenizer, token),
                }
                for token, value, rank in (*best, own)
            }
        )
    return listed


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": max(logprob, FLOOR),
        "bytes": list(raw),
    }


def _top_by_text(tokenizer: Tokenizer, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
    """The best tokens and the chosen one; of tokens that read alike, the likeliest."""
    by_text: dict[str, float] = {}
    for token_id, value in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        by_text.setdefault(token_string(tokenizer, token_id), max(value, FLOOR))
    return by_text
