"""What a client reads of a grammar that is refused: the reason, in words, and nothing of ours."""

from __future__ import annotations

import pytest

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError
from jaxserve.structured import grammars
from jaxserve.structured.grammars import Tag
from jaxserve.structured.matcher import compile_grammar
from jaxserve.structured.table import token_table
from jaxserve.types import Grammar
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary


def refusal(grammar: Grammar) -> str:
    table = token_table(vocabulary(), VOCAB_SIZE, (EOS,))
    with pytest.raises(GrammarError) as caught:
        compile_grammar(grammar, table, StructuredConfig(), VOCAB_SIZE)
    return caught.value.message


@pytest.mark.parametrize(
    "grammar",
    [grammars.regex(r"[^\s\S]"), Grammar(kind="lark", text="start: X\nX: /a/ & /b/")],
)
def test_one_that_admits_nothing_says_so(grammar: Grammar) -> None:
    assert refusal(grammar) == "the grammar admits no output: no token may come"


def test_the_grammar_that_a_schema_was_made_into_is_not_shown() -> None:
    tag = Tag(begin="<f>", schema={"not": {}}, end="</f>", trigger="<f")
    message = refusal(grammars.tagged([tag]))
    assert message.endswith('failed to compile JSON schema: Unimplemented keys: ["not"]')


def test_a_pattern_s_fault_is_shown_where_it_is() -> None:
    assert refusal(grammars.regex("a(")).endswith("regex parse error: a( ^ error: unclosed group")
    message = refusal(Grammar(kind="lark", text='start: "a" b\nb: c\n'))
    assert message == 'at 2(4): unknown name: "c"'


def test_what_the_library_says_only_to_the_second_output_is_said_at_once() -> None:
    """Its first mask is made, though its lexer can do no more."""
    message = refusal(grammars.regex("(a|aa|aaa){200}"))
    assert message == (
        "the grammar admits no output: lexer error: too many expressions constructed"
    )
