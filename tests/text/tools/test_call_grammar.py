"""The grammar of calls, tried by the library that runs it: what it takes, and where it stops."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from jaxserve.errors import GrammarError
from jaxserve.structured.grammars import Tag, choice, context_free, json_schema, regex, tagged
from jaxserve.text.message import MessageReader, gather
from jaxserve.text.tools.call_grammar import call_grammar, thought_grammar
from jaxserve.text.tools.hermes import HERMES
from jaxserve.text.tools.llama3 import LLAMA3
from jaxserve.text.tools.mistral import MISTRAL, MISTRAL_NAMED
from jaxserve.text.tools.notation import Notation
from jaxserve.text.tools.plain_json import JSON
from jaxserve.text.tools.pythonic import PYTHONIC
from jaxserve.text.tools.tool import Tool, Toolbox
from jaxserve.types import Grammar

SPECIALS = {"<tool_call>": 257, "</tool_call>": 258}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/B"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"B": {"type": "string"}},
}
TOOLS = [Tool(name="f", parameters=PARAMETERS), Tool(name="g")]
F = '{"name": "f", "arguments": {"a": 1}}'
CALL = f"<tool_call>\n{F}\n</tool_call>"


class Bytes:
    """A vocabulary of bytes, as the library takes one."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>", *map(str.encode, SPECIALS))
    special_token_ids = (256, 257, 258)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(Bytes()))


def outcome(grammar: Grammar, text: str, special: bool = False) -> str | bool:
    """True if the text may end so, False if it must go on; else what is left at the first fault."""
    matcher = LLMatcher(TOKENIZER, LLMatcher.grammar_from_lark(grammar.text))
    assert not matcher.is_error(), (matcher.get_error(), grammar.text)
    tokens: list[int] = []
    rest = text
    while rest:
        marker = next((m for m in SPECIALS if special and rest.startswith(m)), "")
        tokens += [SPECIALS[marker]] if marker else rest[0].encode()
        rest = rest[len(marker) or 1 :]
    num_taken = matcher.validate_tokens(tokens)
    if num_taken < len(tokens):
        return bytes(token for token in tokens[num_taken:] if token < 256).decode()
    assert matcher.consume_tokens(tokens)
    return matcher.is_accepting()


def box(*names: str, **options: Any) -> Toolbox:
    """A toolbox of both tools."""
    return Toolbox(tools=TOOLS, callable=frozenset(names or ("f", "g")), **options)


P = F.replace("arguments", "parameters")
CASES: list[tuple[Notation, str, str | bool]] = [
    (HERMES, "Hello <b> <tool_", True),
    (HERMES, f"Hi {CALL}", True),
    (HERMES, f"{CALL}\n{CALL}", True),
    (HERMES, f"{CALL} more", " more"),
    (HERMES, "<tool_call>no", "no"),
    (HERMES, '<tool_call>\n{"name": "h', "h"),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"b"', 'b"'),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "', '"'),
    (HERMES, '<tool_call>\n{"name": "g", "arguments": {}}\n', False),
    (JSON, "Hello", True),
    (JSON, f"{F}\n{F}", True),
    (JSON, '{"answer": 1}', True),
    (JSON, '{"name": "Ann', "Ann"),
    (LLAMA3, P, True),
    (LLAMA3, f"{P}; {P}", True),
    (LLAMA3, f"I call <|python_tag|>{P}", True),
    (LLAMA3, "I call <|python_tag|>print", "print"),
    (MISTRAL, f"Hm[TOOL_CALLS][{F}, {F}]", True),
    (MISTRAL, f"Hm[TOOL_CALLS][{F}", False),
    (MISTRAL, "[TOOL_CALLS]f", "f"),
    (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', True),
    (MISTRAL_NAMED, "[TOOL_CALLS]h", "h"),
    (PYTHONIC, '[f(a=1, b="x"), g()]', True),
    (PYTHONIC, "[f(a=1)]", True),
    (PYTHONIC, "[f(b", "b"),
    (PYTHONIC, "[f()", ")"),
    (PYTHONIC, "[a link](http://b)", True),
    (PYTHONIC, "See\n```tool_code\nf(a=1)\ng()\n```", True),
    (PYTHONIC, "```tool_code\nprint", "print"),
]


@pytest.mark.parametrize(
    ("notation", "text", "wanted"),
    CASES,
    ids=[f"{i}-{n.name}" for i, (n, _, _) in enumerate(CASES)],
)
def test_words_are_free_and_calls_are_held_to(notation, text, wanted) -> None:
    assert outcome(call_grammar(notation, box(), special_tokens={}), text) == wanted


@pytest.mark.parametrize("notation", [HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, JSON, PYTHONIC])
@pytest.mark.parametrize("several", [False, True])
def test_a_call_is_required(notation, several) -> None:
    grammar = call_grammar(notation, box(required=True, several=several), special_tokens={})
    one, two = [notation.written([("f", '{"a": 1}')] * n) for n in (1, 2)]
    assert outcome(grammar, "Hello") == "Hello"
    assert outcome(grammar, "") is False
    assert outcome(grammar, one) is True
    assert (outcome(grammar, two) is True) == several


def test_only_tools_that_may_be_called() -> None:
    grammar = call_grammar(HERMES, box("g", required=True), special_tokens={})
    assert outcome(grammar, '<tool_call>\n{"name": "f') == "f"
    assert outcome(grammar, '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>') is True


def test_markers_that_are_special_tokens() -> None:
    grammar = call_grammar(HERMES, box(), special_tokens=SPECIALS)
    assert outcome(grammar, f"Hi {CALL}", special=True) is True
    assert outcome(grammar, "Hi <tool_call>no", special=True) == "no"
    assert outcome(grammar, "Hi <tool_call>no") is True, "as mere text they are text"


def test_reasoning_goes_before() -> None:
    required = call_grammar(HERMES, box(required=True), special_tokens={}, reasons=True)
    assert outcome(required, f"<think>\nHm <tool_call> </think>\n\n{CALL}") is True
    assert outcome(required, CALL) is True
    assert outcome(required, f"Hm</think>{CALL}") == f"Hm</think>{CALL}"
    opened = call_grammar(HERMES, box(required=True), special_tokens={}, reasons=True, opened=True)
    assert outcome(opened, f"Hm</think>\n{CALL}") is True
    assert outcome(opened, "Hm</think>\nHello") == "Hello"
    auto = call_grammar(HERMES, box(), special_tokens={}, reasons=True)
    assert outcome(auto, f"<think>a <tool_call> b</think>Hi {CALL}") is True
    assert outcome(auto, "<think>a</think><tool_call>no") == "no"
    assert outcome(auto, "Hello") is True
    assert outcome(auto, "<think>Hello") is False


def test_words_of_a_form_of_their_own() -> None:
    schema = json_schema({"type": "object", "properties": {"x": {"type": "integer"}}})
    grammar = call_grammar(HERMES, box(), special_tokens={}, content=schema)
    assert outcome(grammar, '{"x": 1}') is True
    assert outcome(grammar, CALL) is True
    assert outcome(grammar, "Hello") == "Hello"
    thoughtful = thought_grammar(schema, special_tokens={}, opened=False)
    assert outcome(thoughtful, '<think>Hm</think>{"x": 1}') is True
    assert outcome(thoughtful, '{"x": 1}') is True
    assert outcome(thoughtful, '<think>Hm</think>{"x": "') == '"'


TAG = Tag(begin="<f=a>", schema={"enum": [1]}, end="</f>", trigger="<f")


@pytest.mark.parametrize(
    ("content", "text", "wrong"),
    [
        (json_schema({"enum": [1]}), "1", "x"),
        (choice(["yes", "no}"]), "no}", "x"),
        (context_free('start: "a" x // }\nx: %json {"enum": [1]}'), "a1", "x"),
        (tagged([TAG]), "Hm <f=a>1</f> }", "<fx"),
        (regex(""), "", "x"),
        (regex("a//b"), "a//b", "x"),
        (regex(r"a/b\/c\\/d"), r"a/b/c\/d", "x"),
        (regex('(?x) [/}]+ "? # two\n'), '/}/"', "x"),
    ],
)
def test_every_grammar_stands_behind_a_thought(content: Grammar, text: str, wrong: str) -> None:
    grammar = thought_grammar(content, special_tokens={}, opened=True)
    assert outcome(grammar, f"Hm <f </think>\n{text}") is True
    assert outcome(grammar, f"Hm</think>{text}{wrong}") == wrong[-1]
    assert outcome(grammar, text) is False, "all of it is the thought"


def test_ebnf_is_not_translated_for_a_thought() -> None:
    with pytest.raises(GrammarError, match="Lark's syntax"):
        thought_grammar(context_free('root ::= "a"'), special_tokens={}, opened=True)


def test_as_many_tools_as_there_may_be() -> None:
    tools = [Tool(name=f"tool_{n}", parameters=PARAMETERS) for n in range(128)]
    toolbox = Toolbox(tools=tools, callable=frozenset(tool.name for tool in tools))
    grammar = call_grammar(HERMES, toolbox, special_tokens={})
    last = '<tool_call>\n{"name": "tool_127", "arguments": {"a": 5}}\n</tool_call>'
    assert outcome(grammar, last) is True
    assert outcome(grammar, last.replace("127", "128")) == last.partition("7")[2].replace(
        "", "8", 1
    )


def pythonic(**schema: Any) -> Grammar:
    """The grammar of one tool's calls as Python."""
    tool = Tool(name="f", parameters=schema, param="tools[0].parameters")
    toolbox = Toolbox(tools=[tool], callable=frozenset("f"), required=True)
    return call_grammar(PYTHONIC, toolbox, special_tokens={})


def test_keyword_arguments_may_be_left_out_where_the_schema_says_so() -> None:
    grammar = pythonic(properties={name: {"type": "integer"} for name in "abc"}, required=["b"])
    for arguments in ("a=1, b=2, c=3", "b=2", "a=1, b=2", "b=2, c=3"):
        assert outcome(grammar, f"[f({arguments})]") is True, arguments
    for arguments in ("", "a=1", "b=2, a=1", "a=1 b=2", "b=2, "):
        assert outcome(grammar, f"[f({arguments})]") is not True, arguments
    assert outcome(pythonic(properties={}), "[f()]") is True
    assert outcome(pythonic(properties={}), "[f(a=1)]") == "a=1)]"
    free = pythonic(type="object")
    for arguments in ("", 'a={"b": [1, true]}', 'a="x", b_2=null'):
        assert outcome(free, f"[f({arguments})]") is True, arguments


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{}]},
        {"properties": {}, "minProperties": 1},
        {"properties": 5},
        {"properties": {"a": 5}},
        {"properties": {"a b": {}}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "required": "a"},
        {"properties": {"a": {}}, "required": [["a"]]},
    ],
)
def test_what_keyword_arguments_cannot_say_is_refused(schema) -> None:
    with pytest.raises(GrammarError, match="as Python cannot be held to") as refused:
        pythonic(**schema)
    assert refused.value.param == "tools[0].parameters"


@pytest.mark.parametrize("notation", [HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, JSON, PYTHONIC])
def test_what_the_grammar_takes_the_reader_finds(notation: Notation) -> None:
    calls = [("f", '{"a": 1, "b": "é\\n\\"x"}'), ("g", "{}")]
    text = notation.forms[0].written(
        [(n, 'a=1, b="é\\n\\"x"' if n == "f" else "") for n, _ in calls]
        if notation.keyword_arguments
        else calls
    )
    assert outcome(call_grammar(notation, box(), special_tokens={}), text) is True
    reader = MessageReader(notation.reader(("f", "g"), lambda: "id"), None)
    message = gather(reader.add(text) + reader.finish())
    assert [(c.name, json.loads(c.arguments)) for c in message.calls] == [
        (name, json.loads(arguments)) for name, arguments in calls
    ]
    assert all(c.complete for c in message.calls) and not message.text
