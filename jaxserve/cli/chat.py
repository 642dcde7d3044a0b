"""`jaxserve chat`: a conversation in the terminal.

Ctrl-C while the model speaks stops its answer; what was said stays part of the conversation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.offline import LLM
from jaxserve.text.request import make_request

GREETING = "/reset begins again, Ctrl-C stops an answer, Ctrl-D leaves.\n"
PROMPT = "> "
#: Tokens of an answer, where neither an option nor the context says less.
MAX_TOKENS = 2048


def converse(llm: LLM, system: str, options: Mapping[str, Any]) -> int:
    """Talks until Ctrl-D; returns the exit status.

    Raises:
        DeviceFailure: the engine failed.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing)
    opening = [{"role": "system", "content": system}] if system else []
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
            sys.stdout.write(f"({error.message}; /reset begins again)\n")
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": said})


def _answer(llm: LLM, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
    """Writes the model's next message as it comes, and returns it."""
    if "max_tokens" not in options:
        planned = llm.plan(make_request(messages=messages, **options))
        left = llm.model.max_context - len(planned.token_ids)
        options = {**options, "max_tokens": min(MAX_TOKENS, left)}
    said: list[str] = []
    with contextlib.closing(llm.stream(messages, **options)) as pieces:
        try:
            for piece in pieces:
                said.append(piece.text)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" …")
    sys.stdout.write("\n")
    return "".join(said)
