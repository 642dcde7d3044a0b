"""`jaxserve chat`: a conversation in the terminal.

Ctrl-C while the model speaks stops its answer; what was said stays part of the conversation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ContextTooLong, DeviceFailure, JaxserveError
from jaxserve.offline import LLM
from jaxserve.text.request import make_request

GREETING = "/reset begins again, Ctrl-C stops an answer, Ctrl-D leaves.\n"
PROMPT = "> "
#: Tokens of an answer, where neither an option nor the context says less.
MAX_TOKENS = 2048


def converse(llm: LLM, system: str, options: Mapping[str, Any]) -> int:
    """Talks until Ctrl-D; returns the exit status.

    Raises:
        InvalidRequest: the model has no chat template, or an option is wrong.
        DeviceFailure: the engine failed.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing)
    opening = [{"role": "system", "content": system}] if system else []
    first = [*opening, {"role": "user", "content": "Hello"}]
    llm.plan(make_request(messages=first, **_limited(llm, first, options)))  # refuses what is wrong
    messages = list(opening)
    sys.stdout.write(GREETING)
    while True:
        try:
            text = input(PROMPT).strip()
        except EOFError:
            sys.stdout.write("\n")
            return 0
        except KeyboardInterrupt:
            sys.stdout.write("\n" + GREETING)
            continue
        except UnicodeDecodeError:
            sys.stdout.write("(that was not UTF-8)\n")
            continue
        if not text:
            continue
        if text == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        try:
            said = _answer(llm, messages, options)
        except DeviceFailure:
            raise
        except JaxserveError as error:
            hint = "; /reset begins again" if isinstance(error, ContextTooLong) else ""
            sys.stdout.write(f"({error.message}{hint})\n")
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": said})


def _answer(llm: LLM, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
    """Writes the model's next message as it comes, and returns it."""
    said: list[str] = []
    try:
        with contextlib.closing(llm.stream(messages, **_limited(llm, messages, options))) as pieces:
            for piece in pieces:
                said.append(piece.text)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" …")
    sys.stdout.write("\n")
    return "".join(said)


def _limited(
    llm: LLM, messages: list[dict[str, str]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options, with max_tokens where none are given, and never more than the context has left.

    Raises:
        InvalidRequest, ContextTooLong: what is wrong with them or the messages.
    """
    free = llm.plan(make_request(messages=messages, **{**options, "max_tokens": None}))
    left = llm.model.max_context - len(free.token_ids)
    return {**options, "max_tokens": min(options.get("max_tokens", MAX_TOKENS), left)}
