"""A choice's tokens as parts of a message, and which tokens each part took."""

from __future__ import annotations

import pytest

from jaxserve.text.choice import ChoiceText
from jaxserve.text.message import CallEnd, CallStart, CallText, MessageReader, Part, Text, Thought
from jaxserve.text.read_choice import TOOL_CALLS, ReadChoice, Took
from jaxserve.text.reasoning import ThinkReader
from jaxserve.text.tools.hermes import HERMES
from tests.fakes.tokenizer import ByteTokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def choice(*, stop: tuple[str, ...] = (), single: bool = False) -> ReadChoice:
    """Of a model that reasons, with one tool."""
    reader = MessageReader(
        HERMES.reader(frozenset({"f"}), lambda: "id"), ThinkReader(), single=single
    )
    return ReadChoice(ChoiceText(ByteTokenizer(), (), stop=stop), reader)


def read(
    text: str, size: int, reason: str = "stop", **options: bool | tuple[str, ...]
) -> tuple[list[tuple[Part, Took]], int, str]:
    """Parts and their tokens, tokens in all, and why it ended; taken in `size` tokens at a time."""
    own = choice(**options)  # pyright: ignore[reportArgumentType]
    tokens = ByteTokenizer().encode(text, add_special_tokens=False)
    pairs: list[tuple[Part, Took]] = []
    num_tokens = 0
    parts, counts = [], []
    for start in range(0, len(tokens), size):
        pairs += zip(parts, counts, strict=True)
        delta = own.add(tokens[start : start + size])
        num_tokens += delta.num_tokens
        parts, counts = [*delta.parts], [*delta.part_tokens]
        if delta.stopped:
            break
    else:
        tail = own.finish()
        parts, counts = [*parts, *tail.parts], [*counts, *tail.part_tokens]
    ending = own.close(parts, counts, reason)
    pairs += zip(ending.parts, ending.part_tokens, strict=True)
    return pairs, num_tokens, ending.reason


def taken(pairs: list[tuple[Part, Took]]) -> dict[type[Part], int]:
    """Tokens of each kind of part."""
    counts: dict[type[Part], int] = {}
    for part, took in pairs:
        counts[type(part)] = counts.get(type(part), 0) + took.own
    return counts


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_each_token_belongs_to_one_part(size: int) -> None:
    """However they come; words have none but their own."""
    text = f"<think>Hm.</think>Well.\n{CALL}"
    pairs, num_tokens, reason = read(text, size)
    assert num_tokens == len(text) and reason == TOOL_CALLS
    assert "".join(p.text for p, _ in pairs if isinstance(p, Text)) == "Well."
    counts = taken(pairs)
    assert counts[Thought] == len("<think>Hm.")
    assert counts[Text] == len("Well.")
    assert sum(took.before for _, took in pairs) == len("</think>")
    assert counts[CallStart] + counts[CallText] + counts[CallEnd] < len(f"\n{CALL}")
    assert sum(sum(took) for _, took in pairs) == text.index("\n</tool_call>")


@pytest.mark.parametrize("size", [1, 3])
def test_what_only_looked_like_a_call_is_text(size: int) -> None:
    text = "a <tool_call>\nno"
    pairs, num_tokens, reason = read(text, size)
    assert "".join(p.text for p, _ in pairs if isinstance(p, Text)) == text
    assert taken(pairs) == {Text: num_tokens} and reason == "stop"


def test_the_bytes_of_a_character_stay_together() -> None:
    pairs, _, _ = read("<think>x</think>éa", 1)
    assert taken(pairs)[Text] == len("éa".encode())


def test_one_call_ends_a_single_message() -> None:
    pairs, num_tokens, reason = read(CALL + "more", 5, single=True)
    assert num_tokens == CALL.index("\n</tool_call>") and reason == TOOL_CALLS
    assert isinstance(pairs[-1][0], CallEnd)


def test_a_stop_string_ends_it() -> None:
    pairs, num_tokens, reason = read("Well, no.", 4, stop=(", n",))
    assert num_tokens == len("Well, n") and reason == "stop"
    assert "".join(p.text for p, _ in pairs if isinstance(p, Text)) == "Well"


def test_what_is_cut_keeps_its_reason() -> None:
    text = CALL[:40]
    pairs, num_tokens, reason = read(text, 3, reason="length")
    assert reason == "length" and num_tokens == 40
    assert any(isinstance(part, CallStart) for part, _ in pairs)


def test_without_a_reader_there_is_text_only() -> None:
    own = ReadChoice(ChoiceText(ByteTokenizer(), ()))
    delta = own.add(list(b"abc"))
    assert (delta.text, delta.num_tokens, list(delta.parts)) == ("abc", 3, [])
    assert own.finish().text == ""
    assert own.close((), (), "length") == ((), (), "length")
