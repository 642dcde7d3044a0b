"""What was asked and answered, in plain text, as the conventions want it in spans.

Only where `tracing.record_content` asks for it. Cut where it is long: it passes through the
observer's socket and the collector's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

#: Characters of a request's messages, and of its answers, in all.
MAX_CHARACTERS = 16_384


class _Budget:
    """Characters that may still be kept."""

    def __init__(self) -> None:
        self.left = MAX_CHARACTERS

    def cut(self, text: str) -> str:
        """The text, or what there is room for."""
        kept, self.left = text[: self.left], max(self.left - len(text), 0)
        return kept if len(kept) == len(text) else kept + "…"


def asked_content(messages: Any, prompt: Any) -> str:
    """The messages that came, as JSON; empty where there are none.

    Args:
        messages: of a chat, or a response's input; not checked.
        prompt: of a completion: a text, token ids, or a list of either.
    """
    budget = _Budget()
    if messages is None:
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        messages = [{"content": text} for text in (prompt if several else [prompt])]
    elif isinstance(messages, str):
        messages = [{"content": messages}]
    if not isinstance(messages, list):
        return ""
    told = [_message(message, budget) for message in messages if isinstance(message, dict)]
    return json.dumps(told, ensure_ascii=False)


def answered_content(choices: Iterable[tuple[str, str]]) -> str:
    """The answers as JSON.

    Args:
        choices: text and finish reason of each.
    """
    budget = _Budget()
    told = [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": budget.cut(text)}],
            "finish_reason": reason,
        }
        for text, reason in choices
    ]
    return json.dumps(told, ensure_ascii=False)


def _message(message: dict[str, Any], budget: _Budget) -> dict[str, Any]:
    role = message.get("role")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if content is None:
        texts = [message.get("output") or message.get("arguments")]
    return {
        "role": role if isinstance(role, str) else "user",
        "parts": [
            {"type": "text", "content": budget.cut(text if isinstance(text, str) else str(text))}
            for text in texts
            if text is not None
        ],
    }
