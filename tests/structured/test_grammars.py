"""From what a request says to a grammar, and what that admits."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError, InvalidRequest
from jaxserve.structured import grammars
from jaxserve.structured.grammars import Tag, tagged
from jaxserve.structured.matcher import compile_grammar
from jaxserve.structured.table import token_table
from jaxserve.types import Grammar, Vocabulary
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import TABLE
from tests.fakes.tokenizer import IM_END, IM_START

INTEGER = {"type": "integer"}
OBJECT = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
SPECIAL = {"<|im_start|>": IM_START, "<|im_end|>": IM_END}


def admits(grammar: Grammar, *pieces: str | int, table: LLTokenizer = TABLE) -> bool:
    """Whether a whole output, of texts and of special tokens' ids, matches."""
    matcher = compile_grammar(grammar, table, StructuredConfig(), VOCAB_SIZE).matcher().ll
    ids = [t for p in pieces for t in ([p] if isinstance(p, int) else p.encode())]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (grammars.json_object(), '{"x": [1, null]}', "[1]"),
        (grammars.json_schema(INTEGER), "-12", '"12"'),
        (grammars.json_schema(True), '["x"]', "x"),
        (grammars.json_schema(OBJECT, whitespace=False), '{"a":1}', '{"a": 1}'),
        (grammars.json_schema(OBJECT, whitespace_pattern=" ?"), '{"a": 1}', '{"a":  1}'),
        (grammars.regex("a+b"), "aab", "aabb"),
        (grammars.choice(['say "hi"', "new\nline", "/é\\"]), "/é\\", "say"),
        (grammars.choice(["new\nline", "b"]), "new\nline", "new line"),
        (grammars.choice(["a\x7fb", "c"]), "a\x7fb", "ab"),
        (grammars.context_free('start: "a" B\nB: /b+/'), "abb", "a"),
        (grammars.context_free('root ::= "a" ("b" | [0-9]+)'), "a12", "ab1"),
    ],
)
def test_what_grammars_admit(grammar: Grammar, good: str, bad: str) -> None:
    assert admits(grammar, good) and not admits(grammar, bad)


PRETTY = {"a": [1, {"b": []}], "c": 2}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PRETTY, separators=(",", ":")),
        json.dumps(PRETTY),
        json.dumps(PRETTY, indent=4),
        json.dumps(PRETTY, indent="\t"),
        json.dumps(PRETTY, indent=2).replace("\n", "\r\n"),
        "{" + " " * 8 + '"a"\t: 1}',
        "{\n" + " " * 64 + '"a": 1}',
    ],
)
def test_json_may_be_laid_out(text: str) -> None:
    assert admits(grammars.json_object(), text)


@pytest.mark.parametrize(
    "space", [" " * 9, "\n\n", "\n" + " " * 65, " \n", "\r", "\u00a0", "\n \n"]
)
def test_white_space_has_an_end(space: str) -> None:
    """Or a model could go on with it until its tokens end."""
    place = '{%s"a":%s[1%s,2]}'
    for index in range(3):
        text = place % tuple(space if index == other else "" for other in range(3))
        assert not admits(grammars.json_object(), text)
        plain = grammars.json_schema({"type": "object"}, whitespace_pattern=r"\s+")
        assert admits(plain, text), "where a client asks for it"


def test_false_admits_nothing() -> None:
    with pytest.raises(GrammarError):
        admits(grammars.json_schema(False), "")


def test_a_lark_text_is_never_options() -> None:
    """The library would take a text that begins with a brace for its own JSON."""
    sly = json.dumps({"grammars": [{"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}]})
    with pytest.raises(GrammarError):
        admits(Grammar(kind="lark", text=sly), "1")


TAG = Tag(begin="<fn=f>", trigger="<fn=", schema=OBJECT, end="</fn>")
OTHER = Tag(begin="<fn=g>", trigger="<fn=", schema=None, end="</fn>")
CALL = '<fn=f>{"a": 1}</fn>'


@pytest.mark.parametrize(
    ("options", "output", "admitted"),
    [
        ({}, "free", True),
        ({}, f"free {CALL} and {CALL}free", True),
        ({}, '<fn=f>{"a": "x"}</fn>', False),
        ({}, "free <fn=h>", False),
        ({}, "free <fn=", False),
        ({}, "<fn=g>anything <fn</fn>", True),
        ({"required": True}, "free", False),
        ({"required": True}, f"so {CALL}", True),
        ({"text": False}, f"so {CALL}", False),
        ({"text": False}, CALL + CALL, True),
        ({"text": False, "several": False}, CALL + CALL, False),
        ({"text": False, "required": True, "several": False}, "", False),
        ({"text": False, "required": True, "several": False}, CALL, True),
    ],
)
def test_tags_among_text(options: dict, output: str, admitted: bool) -> None:
    assert admits(tagged([TAG, OTHER], **options), output) is admitted


def test_special_tokens_in_tags() -> None:
    """The tokens are meant, not the texts that spell them."""
    tag = Tag(begin='<|im_start|>call\n{"x":', schema=INTEGER, end="}<|im_end|>")
    grammar = tagged([tag], special_tokens=SPECIAL)
    assert admits(grammar, "so ", IM_START, 'call\n{"x":3}', IM_END, " then")
    assert not admits(grammar, "so ", IM_START, "other")
    assert not admits(grammar, "so ", IM_END)
    assert admits(grammar, "so <|im_start|> as text")
    thinking = Tag(begin="<|im_start|>", schema=None, end="<|im_end|>")
    grammar = tagged([thinking], special_tokens=SPECIAL, text=False, required=True)
    assert admits(grammar, IM_START, "whatever it thinks", IM_END)
    assert not admits(grammar, IM_START, "whatever it thinks")


def test_a_trigger_begins_its_tag() -> None:
    with pytest.raises(ValueError, match="trigger"):
        tagged([Tag(begin="<f>", schema=True, end="", trigger="[")])


@pytest.mark.parametrize(
    "words",
    [
        {"json": OBJECT},
        {"regex": "a+"},
        {"choice": ["a", "b"]},
        {"grammar": 'start: "a"'},
        {"json_object": True},
    ],
)
def test_words_of_offline_requests(words: dict) -> None:
    assert isinstance(grammars.from_words(words), Grammar)


@pytest.mark.parametrize(
    "words",
    [{}, {"regex": "a", "choice": ["a"]}, {"yaml": "x"}, {"regex": 3}, {"choice": "ab"},
     {"choice": []}, {"choice": [1]}, {"json": "x"}],
)  # fmt: skip
def test_wrong_words(words: dict) -> None:
    with pytest.raises(InvalidRequest, match="grammar"):
        grammars.from_words(words)


def test_a_model_without_end_tokens_cannot_end() -> None:
    with pytest.raises(GrammarError, match="end token"):
        token_table(Vocabulary(tokens=(b"a",), special_token_ids=()), 1, ())


def test_a_vocabulary_that_is_smaller_than_the_logits() -> None:
    """The rest is never allowed."""
    table = token_table(Vocabulary(tokens=(b"a", b"b", b""), special_token_ids=(2,)), 70, (2,))
    compiled = compile_grammar(grammars.regex("[ab]+"), table, StructuredConfig(), 70)
    matcher: LLMatcher = compiled.matcher().ll
    assert EOS == 2 and matcher.consume_token(0)
    assert list(matcher.compute_bitmask()) == [0b111] + [0] * 11
