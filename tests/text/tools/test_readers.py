"""Readers of all notations: what they find, and that it does not depend on how the text was cut."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.message import (
    CallEnd,
    CallStart,
    CallText,
    Message,
    MessageReader,
    Part,
    Text,
    Thought,
    gather,
    joined,
)
from jaxserve.text.reasoning import ThinkReader, is_open
from jaxserve.text.tools.hermes import HERMES
from jaxserve.text.tools.llama3 import LLAMA3
from jaxserve.text.tools.mistral import MISTRAL, MISTRAL_NAMED, mistral_id
from jaxserve.text.tools.notation import Notation
from jaxserve.text.tools.plain_json import JSON
from jaxserve.text.tools.pythonic import PYTHONIC
from jaxserve.text.tools.reader import MAX_HELD

NAMES = ("f", "get_weather")
NOTATIONS = (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, JSON, PYTHONIC)


def read(notation: Notation | None, *pieces: str, thinks: bool | None = None) -> list[Part]:
    """The parts of a text in these pieces; thinks: whether the thought was opened, if there is."""
    calls = notation.reader(NAMES, lambda: "id") if notation else None
    thoughts = None if thinks is None else ThinkReader(opened=thinks)
    reader = MessageReader(calls, thoughts)
    return joined([part for piece in pieces for part in reader.add(piece)] + reader.finish())


def call(name: str, arguments: str) -> list[Part]:
    """A whole call."""
    return [CallStart("id", name), CallText(arguments), CallEnd()]


CASES: list[tuple[Notation, str, list[Part]]] = [
    (HERMES, "just text", [Text("just text")]),
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"<", "b": [{}]}}\n'
        '</tool_call>\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n',
        [Text("Let me see."), *call("f", '{"a": "}\\"<", "b": [{}]}'), *call("f", "{}")],
    ),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', call("f", '{"a": 1}')),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', call("f", "{}")),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', call("f", "{}")),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        call("f", '{"a": 1}'),
    ),
    (
        HERMES,
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "f", "parameters": {}}]</tool_call>',
        [*call("f", "{}"), *call("f", "{}")],
    ),
    (HERMES, "the <tool_call> tag", [Text("the <tool_call> tag")]),
    (HERMES, "a <tool_ b", [Text("a <tool_ b")]),
    (
        HERMES,
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        [Text('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": x}}</tool_call> more',
        [CallStart("id", "f"), CallText('{"a": x}'), Text("}</tool_call> more")],
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        [CallStart("id", "f"), CallText('{"a": NaN}'), Text("}</tool_call>")],
    ),
    # cut by max_tokens
    (HERMES, 'Well <tool_call>\n{"name": "f", "argu', [Text("Well ")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": ', [CallStart("id", "f")]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "b',
        [CallStart("id", "f"), CallText('{"a": "b')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}',
        [CallStart("id", "f"), CallText("{}")],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}\n</tool_ca', call("f", "{}")),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    (
        LLAMA3,
        'I call <|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}',
        [Text("I call"), *call("f", "{}"), *call("f", "{}")],
    ),
    (LLAMA3, "<|python_tag|>print(1)", [Text("<|python_tag|>print(1)")]),
    (LLAMA3, '{"name": "Ann", "age": 3}', [Text('{"name": "Ann", "age": 3}')]),
    (
        MISTRAL,
        'Hm [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]',
        [Text("Hm"), *call("f", '{"a": 1}'), *call("f", "{}")],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]f{}',
        [*call("f", '{"a": 1}'), *call("f", "{}")],
    ),
    (MISTRAL, "[TOOL_CALLS]f[AR", []),
    (MISTRAL, "[TOOL_CALLS]g[ARGS]{}", [Text("[TOOL_CALLS]g[ARGS]{}")]),
    (
        JSON,
        '[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {"a": 1}}]',
        [*call("f", "{}"), *call("f", '{"a": 1}')],
    ),
    (JSON, '{"answer": {"name": "f"}}', [Text('{"answer": {"name": "f"}}')]),
    (JSON, 'so: {"name": "f"}', [Text('so: {"name": "f"}')]),
    (JSON, " [1, 2]\n", [Text(" [1, 2]\n")]),
    (
        PYTHONIC,
        "[f(a=1, b='it\\'s \"é\"\\n', c=[True, None, -1.5e3], d={'k': (1, 2)}), get_weather()]",
        [
            *call(
                "f",
                '{"a": 1, "b": "it\'s \\"é\\"\\n", "c": [true, null, -1.5e3], "d": {"k": [1, 2]}}',
            ),
            *call("get_weather", "{}"),
        ],
    ),
    (
        PYTHONIC,
        'Sure.\n```tool_code\nget_weather(city="Paris")\nf()\n```\nThen.',
        [
            Text("Sure."),
            *call("get_weather", '{"city": "Paris"}'),
            *call("f", "{}"),
            Text("\nThen."),
        ],
    ),
    (PYTHONIC, "[a link](http://b)", [Text("[a link](http://b)")]),
    (PYTHONIC, "[f(a=1", [CallStart("id", "f"), CallText('{"a": ')]),
    (PYTHONIC, "[f(a='x", [CallStart("id", "f"), CallText('{"a": "x')]),
    (PYTHONIC, "[f(1)]", [CallStart("id", "f"), Text(")]")]),
    (PYTHONIC, "[f(a=b)]", [CallStart("id", "f"), CallText('{"a": '), Text(")]")]),
    (
        PYTHONIC,
        r"[f(a='\x41\u00e9\U0001F600\q\/')]",
        call("f", '{"a": "\\u0041\\u00e9\\ud83d\\ude00\\\\q/"}'),
    ),
]


@pytest.mark.parametrize(
    ("notation", "text", "parts"), CASES, ids=[f"{i}-{n.name}" for i, (n, _, _) in enumerate(CASES)]
)
def test_what_is_found(notation: Notation, text: str, parts: list[Part]) -> None:
    assert read(notation, text) == parts
    assert read(notation, *text) == parts, "one character at a time"


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        *(
            "```tool_code",
            "```",
            "<think>",
            "</think>",
            "<",
            "[",
            "]",
            "{",
            "}",
            "(",
            ")",
            ",",
            ";",
        ),
        *('"', "'", "\\", "\n", " ", ":", "=", "f", "get_weather", "a", "1", "true", "null"),
        *('{"name": "f", "arguments": ', '{"name": "f", "parameters": {"a": 1}}', "[f(", "f(a="),
        *('{"a": "b"}', '"name"', '"arguments"', "text", "é"),
    ]
)


@settings(max_examples=400)
@given(
    notation=st.sampled_from([*NOTATIONS, None]),
    fragments=st.lists(FRAGMENTS, max_size=14),
    thinks=st.sampled_from([None, False, True]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_however_the_text_is_cut_the_message_is_the_same(notation, fragments, thinks, cuts) -> None:
    text = "".join(fragments)
    whole = read(notation, text, thinks=thinks)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert read(notation, *pieces, thinks=thinks) == whole
    assert read(notation, *text, thinks=thinks) == whole
    for made in gather(whole).calls:
        assert made.name in NAMES
        assert not made.complete or isinstance(json.loads(made.arguments), dict)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
arguments_objects = st.dictionaries(
    st.from_regex(r"[a-z_]{1,6}", fullmatch=True), json_values, max_size=3
)


@given(
    notation=st.sampled_from(NOTATIONS),
    values=st.lists(st.tuples(st.sampled_from(NAMES), arguments_objects), min_size=1, max_size=3),
    cut=st.integers(0, 300),
)
def test_what_a_notation_writes_it_reads(notation, values, cut) -> None:
    text = notation.written([(name, json.dumps(value)) for name, value in values])
    message = gather(read(notation, text[:cut], text[cut:]))
    assert message.text == "" and all(made.complete for made in message.calls)
    assert [(made.name, json.loads(made.arguments)) for made in message.calls] == values


def test_arguments_come_as_they_are_written() -> None:
    reader = HERMES.reader(NAMES, lambda: "id")
    assert reader.add('<tool_call>{"name": "f", "arguments"') == []
    assert reader.add(': {"a": "on') == [CallStart("id", "f"), CallText('{"a": "on')]
    assert reader.add("e ") == [CallText("e ")]
    assert reader.add('two"}}') == [CallText('two"}'), CallEnd()]
    pythonic = PYTHONIC.reader(NAMES, lambda: "id")
    assert pythonic.add("[f(a='on") == [CallStart("id", "f"), *map(CallText, ('{"a": ', '"', "on"))]
    assert pythonic.add("e") == [CallText("e")]


def test_words_are_not_held_back() -> None:
    for notation in NOTATIONS:
        reader = notation.reader(NAMES, lambda: "id")
        assert joined(reader.add("Hello") + reader.add(" you")) == [Text("Hello you")]
        assert reader.add("\n") == [], "white space may stand before a call"
        assert reader.finish() == [Text("\n")]
    reader = JSON.reader(NAMES, lambda: "id")
    assert reader.add('{"answer":') == [Text('{"answer":')], "this is no call"


def test_what_may_be_a_call_is_not_held_for_ever() -> None:
    reader = HERMES.reader(NAMES, lambda: "id")
    held = '<tool_call>{"id": "' + "x" * (MAX_HELD + 10)
    assert joined(reader.add(held)) == [Text(held)]


@pytest.mark.parametrize("unit", ['<tool_call>{"id": "', "<tool_call>  ", "<", '{"name": "f"'])
def test_long_texts_of_almost_calls_take_linear_time(unit: str) -> None:
    def seconds(size: int) -> float:
        reader = HERMES.reader(NAMES, lambda: "id")
        text = unit * (size // len(unit))
        started = time.process_time()
        for start in range(0, len(text), 4):
            reader.add(text[start : start + 4])
        reader.finish()
        return time.process_time() - started

    seconds(1000)
    assert seconds(80_000) < 1.0 + 20 * seconds(8000)


def test_depth_is_no_danger() -> None:
    deep = "[" * 100_000
    message = gather(read(HERMES, '<tool_call>{"name": "f", "arguments": {"a": ' + deep))
    assert not message.calls[0].complete
    closed = deep + "]" * 100_000
    message = gather(read(HERMES, '<tool_call>{"name": "f", "arguments": {"a": ' + closed + "}}"))
    assert not message.calls[0].complete, "this is more than a JSON reader takes"
    message = gather(read(PYTHONIC, "[f(a=" + deep))
    assert not message.calls[0].complete


def test_reasoning_stands_before_the_answer() -> None:
    assert read(None, "<think>\nHm.\n\n</think>\n\nYes. ", thinks=False) == [
        Thought("Hm."),
        Text("Yes. "),
    ]
    assert read(None, "Hm.</think>Yes.", thinks=True) == [Thought("Hm."), Text("Yes.")]
    assert read(None, "<think>Hm.</think>Yes.", thinks=True) == [Thought("Hm."), Text("Yes.")]
    assert read(None, " Yes, no <think>.", thinks=False) == [Text(" Yes, no <think>.")]
    assert read(None, "<think>Hm", thinks=False) == [Thought("Hm")]
    thought = "<think>maybe <tool_call></think>" + '<tool_call>{"name": "f"}</tool_call>'
    assert read(HERMES, thought, thinks=False) == [Thought("maybe <tool_call>"), *call("f", "{}")]


def test_a_prompt_that_opens_the_thought() -> None:
    assert is_open("<|im_start|>assistant\n<think>\n")
    assert not is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_one_call_only() -> None:
    reader = MessageReader(HERMES.reader(NAMES, lambda: "id"), None, single=True)
    one = '<tool_call>{"name": "f", "arguments": {}}'
    assert joined(reader.add("a " + one + "</tool_call>" + one)) == [Text("a"), *call("f", "{}")]
    assert reader.done and reader.called
    assert reader.add("more") == reader.finish() == []


def test_only_whole_calls_make_a_message_of_calls() -> None:
    reader = MessageReader(HERMES.reader(NAMES, lambda: "id"), None)
    one = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader.add("text")
    assert not reader.called
    reader.add(one)
    assert reader.called
    reader.add(one[:-14])
    assert not reader.called


def test_an_empty_message() -> None:
    assert gather([]) == Message(text="", reasoning=None, calls=[])
    assert read(HERMES) == read(None, thinks=False) == []


def test_ids() -> None:
    ids = {HERMES.new_id() for _ in range(100)}
    assert len(ids) == 100 and all(made.startswith("call_") for made in ids)
    assert len(mistral_id()) == 9 and mistral_id().isalnum() and MISTRAL.new_id is mistral_id
