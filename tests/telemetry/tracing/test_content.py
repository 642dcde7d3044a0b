"""Contents of prompts and answers, as spans may have them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.telemetry.tracing.content import MAX_CHARACTERS, answered_content, asked_content


def text(content: str) -> dict:
    """A part of a message."""
    return {"type": "text", "content": content}


def test_messages_of_a_chat() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hé"}, {"type": "text", "text": "o"}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    assert json.loads(asked_content(messages, None)) == [
        {"role": "system", "parts": [text("Be brief.")]},
        {"role": "user", "parts": [text("hé"), text("o")]},
        {"role": "tool", "parts": [text("42")]},
        {"role": "assistant", "parts": []},
    ]


def test_prompts_of_a_completion() -> None:
    assert json.loads(asked_content(None, "a")) == [{"role": "user", "parts": [text("a")]}]
    both = [{"role": "user", "parts": [text("a")]}, {"role": "user", "parts": [text("b")]}]
    assert json.loads(asked_content(None, ["a", "b"])) == both
    assert json.loads(asked_content(None, [5, 6]))[0]["parts"] == [text("5"), text("6")]


def test_answers_have_their_reasons() -> None:
    assert json.loads(answered_content([("a", "stop"), ("b", "")])) == [
        {"role": "assistant", "parts": [text("a")], "finish_reason": "stop"},
        {"role": "assistant", "parts": [text("b")], "finish_reason": ""},
    ]


def test_what_is_long_is_cut_in_all() -> None:
    told = json.loads(asked_content([{"content": "x" * 10_000}] * 3, None))
    kept = [message["parts"][0]["content"] for message in told]
    assert kept[0] == "x" * 10_000
    assert kept[1] == "x" * (MAX_CHARACTERS - 10_000) + "…" and kept[2] == "…"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "output"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
def test_whatever_was_sent_harms_nobody(messages, prompt) -> None:
    told = asked_content(messages, prompt)
    assert told == "" or isinstance(json.loads(told), list)
