"""ChoiceText: characters whole, stop strings across tokens, linear time."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequest
from jaxserve.text.choice import ChoiceText, TextDelta
from tests.fakes.tokenizer import BOS, EOS, IM_END, IM_START, ByteTokenizer

TOKENIZER = ByteTokenizer()


def expected(text: str, stops: list[str], include_stop: bool = False) -> tuple[str, int | None]:
    """By brute force: what is shown, and the length of the text with the stop string, if any."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if include_stop else end - len(longest)], end
    return text, None


def run(groups: list[list[int]], **options: object) -> tuple[list[TextDelta], str]:
    choice = ChoiceText(TOKENIZER, [65], **options)  # type: ignore[arg-type]
    deltas = [choice.add(group) for group in groups]
    deltas.append(choice.finish())
    return deltas, "".join(delta.text for delta in deltas)


def groups_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def test_a_character_comes_whole_with_its_last_byte() -> None:
    deltas, _ = run([[byte] for byte in "é🙂".encode()])
    assert [delta.text for delta in deltas] == ["", "é", "", "", "", "🙂", ""]


def test_half_a_character_becomes_a_replacement_only_at_the_end() -> None:
    deltas, _ = run([list("a🙂".encode())[:-1]])
    assert [delta.text for delta in deltas] == ["a", "\ufffd"]


def test_bytes_that_are_no_character_are_replaced_at_once() -> None:
    deltas, _ = run([[0xE2, 0x82], [0x41], [0xFF]])
    assert [delta.text for delta in deltas] == ["", "\ufffdA", "\ufffd", ""]


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    start, end = list("🙂".encode())[:3], list("🙂".encode())[3:]
    assert ChoiceText(TOKENIZER, [65, *start]).add(end).text == "🙂"


def test_the_stop_string_is_found_across_tokens_and_not_shown() -> None:
    deltas, text = run(
        [list(b"Hello E"), list(b"N"), list(b"D and more"), list(b"never")], stop=["END"]
    )
    assert text == "Hello "
    assert [delta.text for delta in deltas] == ["Hello ", "", "", "", ""]
    assert [delta.num_tokens for delta in deltas] == [7, 1, 1, 0, 0]
    assert [delta.stopped for delta in deltas] == [False, False, True, True, True]


def test_the_stop_string_is_shown_if_asked_for_but_nothing_after_it() -> None:
    _, text = run([list(b"Hello END and")], stop=["END"], include_stop=True)
    assert text == "Hello END"


def test_a_token_that_runs_past_the_stop_string_is_cut() -> None:
    choice = ChoiceText(TOKENIZER, [], stop=["w30"])
    assert choice.add([300, 301]) == TextDelta(" ", 1, stopped=True)


def test_what_begins_a_stop_string_waits_until_it_does_not() -> None:
    deltas, _ = run([list(b"aab"), list(b"aa"), list(b"c")], stop=["aabaab"])
    assert [delta.text for delta in deltas] == ["", "", "aabaac", ""]


def test_what_waits_is_shown_at_the_end() -> None:
    deltas, _ = run([list(b"x<|im")], stop=["<|im_end|>"])
    assert [delta.text for delta in deltas] == ["x", "<|im"]


def test_the_stop_string_completed_first_counts() -> None:
    assert run([list(b"abcdef")], stop=["abcdef", "cd"])[1] == "ab"
    assert run([list(b"abcdef")], stop=["cd", "bcd", "d"])[1] == "a"


def test_a_replacement_at_the_end_may_complete_a_stop_string() -> None:
    deltas, text = run([[0x41, 0xE2]], stop=["\ufffd"])
    assert (text, deltas[-1].stopped) == ("A", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one character") as error:
        ChoiceText(TOKENIZER, [], stop=["a", ""])
    assert error.value.param == "stop"


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    assert run([[65, EOS, 66]])[1] == "AB"
    assert run([[65, EOS, 66]], skip_special_tokens=False)[1] == "A<|eos|>B"


@pytest.mark.parametrize(
    ("prompt", "text"), [([], "word"), ([BOS], "word"), ([BOS, 65], " word"), ([65], " word")]
)
def test_a_dummy_space_is_stripped_only_where_text_begins(prompt: list[int], text: str) -> None:
    tokenizer = ByteTokenizer(strips_first_space=True)
    choice = ChoiceText(tokenizer, prompt)
    assert choice.add([BOS]).text + choice.add(list(b" word")).text == text


def test_a_space_is_kept_where_the_tokenizer_has_no_dummy() -> None:
    assert ChoiceText(TOKENIZER, []).add(list(b" word")).text == " word"


@given(
    text=st.text(alphabet="ab🙂é", max_size=40),
    stops=st.lists(st.text(alphabet="ab🙂é", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=20),
    include_stop=st.booleans(),
)
def test_any_grouping_gives_the_brute_force_text(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    ids = list(text.encode())
    deltas, shown = run(groups_of(ids, cuts), stop=stops, include_stop=include_stop)
    wanted, end = expected(text, stops, include_stop)
    assert shown == wanted
    num_tokens = sum(delta.num_tokens for delta in deltas)
    assert num_tokens == len(ids if end is None else text[:end].encode())
    assert deltas[-1].stopped == (end is not None)


@given(
    data=st.binary(max_size=40),
    cuts=st.lists(st.integers(0, 200), max_size=20),
    stops=st.lists(st.text(alphabet="a\ufffd", min_size=1, max_size=3), max_size=2),
)
def test_any_bytes_in_any_grouping_give_the_same_text(
    data: bytes, cuts: list[int], stops: list[str]
) -> None:
    _, shown = run(groups_of(list(data), cuts), stop=stops)
    assert shown == expected(data.decode("utf-8", "replace"), stops)[0]


def seconds(num_tokens: int, stop: list[str], text: bytes) -> float:
    choice = ChoiceText(TOKENIZER, [], stop=stop)
    ids = (list(text) * (num_tokens // len(text) + 1))[:num_tokens]
    started = time.process_time()
    for start in range(0, num_tokens, 4):
        choice.add(ids[start : start + 4])
    choice.finish()
    return time.process_time() - started


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ([], b"word "),
        (["</s>"], b"word <"),
        (["a" * 1_000_000 + "b"], b"a"),
        ((["ab" * 500_000 + "c"]), b"ab" * 999 + b"aa"),
    ],
    ids=["none", "short", "one repeated", "two repeated"],
)
def test_time_grows_linearly(stop: list[str], text: bytes) -> None:
    short = min(seconds(10_000, stop, text) for _ in range(3))
    long = min(seconds(80_000, stop, text) for _ in range(2))
    assert long < 8 * short * 4  # quadratic would be 64 times
    assert long / 80_000 < 50e-6


def test_control_tokens_may_be_shown_one_by_one() -> None:
    """A notation's markers are part of the text, the model's other control tokens are not."""
    text = ChoiceText(ByteTokenizer(), [], shown=frozenset({IM_START}))
    assert text.add([IM_END, 97, IM_START, IM_END]).text == "a<|im_start|>"
