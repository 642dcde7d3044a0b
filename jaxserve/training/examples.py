"""Training examples: lines of a JSONL file as token ids, and which of them are learned.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]}
    {"prompt": "2 + 2 =", "completion": " 4"}
    {"text": "Once upon a time there was a shipwright."}

Learned are the assistant's messages, the completion, or the whole text, each with the token that
ends it, so that the model learns to stop. What stands before is only read.

Invariant: what is read is tokenized as the server tokenizes a prompt, and what is learned
continues it token by token: training sees the ids that serving will.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

#: Keys of a line, by its kind.
_FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
_OPTIONAL = {"messages": ("tools",)}
_NAMED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One sequence.

    Attributes:
        token_ids: at least two.
        is_learned: whether each of them is a target; at least one behind the first is.
    """

    token_ids: Int32[np.ndarray, "T"]
    is_learned: Bool[np.ndarray, "T"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns lines into examples.

    Attributes:
        tokenizer, template: the served model's; without a template no messages can be read.
        eos_token_ids: of the model; the first ends a completion or text, where there is one.
        max_tokens: of an example. A longer text is cut into several; anything else is refused.
        vocab_size: of the model.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    max_tokens: int
    vocab_size: int

    def read(self, path: Path) -> list[Example]:
        """All examples of a file, in its order. Blank lines are skipped.

        Raises:
            ConfigError: the file cannot be read.
            InvalidRequest: lines that cannot be learned from, by number; or there are none at all.
        """
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        examples: list[Example] = []
        faults: list[str] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                examples += self.examples(line)
            except InvalidRequest as error:
                faults.append(f"line {number}: {error.message}")
        if faults:
            more = f"; and {len(faults) - _NAMED} more lines" if len(faults) > _NAMED else ""
            raise InvalidRequest(f"{path}: {'; '.join(faults[:_NAMED])}{more}")
        if not examples:
            raise InvalidRequest(f"{path} holds no examples: write one JSON object a line")
        return examples

    def examples(self, line: bytes) -> list[Example]:
        """Those of one line: one, or several of a long text.

        Raises:
            InvalidRequest: what is wrong with it.
        """
        document = _document(line)
        end = self.eos_token_ids[:1]
        if "text" in document:
            ids = [*self.tokenizer.encode(_text(document, "text")), *end]
            windows = [ids[i : i + self.max_tokens] for i in range(0, len(ids), self.max_tokens)]
            whole = [window for window in windows if len(window) > 1] or windows
            return [self._example(window, [True] * len(window)) for window in whole]
        growing = _Growing(self.tokenizer, special="prompt" in document)
        if "prompt" in document:
            growing.read(_text(document, "prompt"))
            growing.learn(_text(document, "completion"), ())
            growing.end(end)
        else:
            self._converse(growing, document["messages"], document.get("tools"))
        if len(growing.ids) > self.max_tokens:
            raise InvalidRequest(
                f"it has {len(growing.ids)} tokens, a row has {self.max_tokens}: shorten it, or "
                "give more --row-tokens"
            )
        return [self._example(growing.ids, growing.is_learned)]

    def _converse(self, growing: _Growing, messages: Any, tools: Any) -> None:
        """A conversation: each of the assistant's messages behind the prompt that asks for it."""
        template = self.template
        if template is None:
            raise InvalidRequest("this model has no chat template; give model.chat_template a file")
        _check_messages(messages, tools)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = template.render(messages[:index], tools=tools)
            answered = template.render(
                messages[: index + 1], tools=tools, add_generation_prompt=False
            )
            if not (prompt.startswith(growing.text) and answered.startswith(prompt)):
                raise InvalidRequest(
                    "the chat template writes earlier messages otherwise once there are later "
                    "ones: give each answer a line of its own"
                )
            growing.read(prompt[len(growing.text) :])
            growing.learn(answered[len(prompt) :], self.eos_token_ids)

    def _example(self, ids: list[int], is_learned: list[bool]) -> Example:
        if max(ids, default=0) >= self.vocab_size:
            raise InvalidRequest(
                f"it has token {max(ids)}, the model's ids are below {self.vocab_size}: the "
                "tokenizer is another model's"
            )
        if not any(is_learned[1:]):
            raise InvalidRequest("it has no token to learn behind its first one")
        return Example(
            token_ids=np.asarray(ids, np.int32), is_learned=np.asarray(is_learned, np.bool_)
        )


class _Growing:
    """A sequence that grows piece by piece, tokenized as the whole text where that is the same."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.is_learned: list[bool] = []
        self._tokenizer = tokenizer
        self._special = special

    def read(self, piece: str) -> None:
        """Adds what is only read."""
        self._add(piece)
        self.is_learned += [False] * (len(self.ids) - len(self.is_learned))

    def learn(self, piece: str, ends: Sequence[int]) -> None:
        """Adds what is learned; behind the last of `ends` in it the model says nothing more."""
        start = len(self.ids)
        self._add(piece)
        places = [i for i in range(start, len(self.ids)) if self.ids[i] in ends]
        last = places[-1] if places else len(self.ids) - 1
        self.is_learned += [i <= last for i in range(start, len(self.ids))]

    def end(self, ids: Sequence[int]) -> None:
        """Adds tokens to be learned."""
        self.ids += ids
        self.is_learned += [True] * len(ids)

    def _add(self, piece: str) -> None:
        whole = self._tokenizer.encode(self.text + piece, add_special_tokens=self._special)
        start = len(self.ids)
        if whole[:start] == self.ids:
            self.ids += whole[start:]
        else:  # tokens would reach over the seam, where generation cannot
            self.ids += self._tokenizer.encode(piece, add_special_tokens=False)
        self.text += piece


def _document(line: bytes) -> dict[str, Any]:
    """A line's object, with the keys of one form."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"it is no JSON: {' '.join(str(error).split()):.100}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"it must be a JSON object, got {type(document).__name__}")
    for form in _FORMS:
        if all(key in document for key in form):
            extra = document.keys() - {*form, *_OPTIONAL.get(form[0], ())}
            if extra:
                raise InvalidRequest(f"{form[0]} goes with no {min(extra)!r:.80}; leave it out")
            return document
    raise InvalidRequest('it needs "messages", or "prompt" and "completion", or "text"')


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document[name]
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be text that is not empty, got {value!r:.80}")
    return value


def _check_messages(messages: Any, tools: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"each message needs a role and content, got {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise InvalidRequest(f"a message's content must be text, got {message!r:.80}")
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        raise InvalidRequest("the last message must be the assistant's, and the first must not be")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise InvalidRequest(f"tools must be a list of objects, got {tools!r:.80}")
