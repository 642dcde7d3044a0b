"""A grammar compiled, and how far one output has come in it.

`compile_grammar` is all that may take long; `Compiled.matcher` gives each sequence one of its own,
in microseconds. What a matcher has used up (`step_fuel`, or any other limit of llguidance) is a
`GrammarError`. Those of one `Compiled` share a lexer, which stays at a limit that one of them has
passed: the others need another (`compiler.renew`).
"""

from __future__ import annotations

import json
import re
import time

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError
from jaxserve.types import Grammar

#: Characters of the library's message that a client gets to see.
_MAX_MESSAGE = 400
#: States of one grammar's lexer, of 1 or 2 KB each.
_MAX_LEXER_STATES = 50_000
#: What the library complains of in words of its own, as the schema has it.
_KEYWORDS = {
    "intersection stack level": "of allOf, or of $ref beside other keywords, nested too deeply",
    "circular references": "of $ref",
    "schema too large": "of allOf, anyOf or $ref, multiplied out",
}
#: What follows the library's message: its state, or lines of a grammar, which a client's parameter
#: was made into and need not be the client's own.
_REST = re.compile(r"\n(?:<state>|<non-verbose/>|\s*\d+ \| ).*", re.DOTALL)
#: The library's word for an empty mask.
_NOTHING = "NoExtensionBias"


class Compiled:
    """A grammar that compiles, and admits something.

    Attributes:
        grammar: its source.
        seconds: that compiling it took.
    """

    def __init__(self, grammar: Grammar, first: LLMatcher, seconds: float) -> None:
        self.grammar = grammar
        self.seconds = seconds
        self._first = first

    def matcher(self) -> Matcher:
        """For one output, at its beginning."""
        return Matcher(self._first.deep_copy())


class Matcher:
    """One output's place in its grammar.

    Attributes:
        ll: llguidance's own; masks are made from it (`masks`).
        num_followed: output tokens that it has taken in.
    """

    __slots__ = ("ll", "num_followed")

    def __init__(self, ll: LLMatcher) -> None:
        self.ll = ll
        self.num_followed = 0

    def follow(self, tokens: list[int], prompt_len: int) -> None:
        """Takes in the output tokens that it has not.

        Args:
            tokens: the prompt's and the output's.

        Raises:
            GrammarError: one does not fit, or a limit was passed.
        """
        new = tokens[prompt_len + self.num_followed :]
        if new and not self.ll.consume_tokens(new):
            raise self.error()
        self.num_followed += len(new)

    def admitted(self, tokens: list[int]) -> int:
        """How many of these may come next, in order."""
        return self.ll.validate_tokens(tokens) if not self.ll.is_stopped() else 0

    def forced(self) -> list[int]:
        """Tokens that must come next, as long as there is one way to go on.

        They spell what must come; a model may cut the same text into other tokens.
        """
        return self.ll.compute_ff_tokens() if not self.ll.is_stopped() else []

    def error(self) -> GrammarError:
        """Why it cannot go on."""
        return GrammarError(f"the output cannot be held to its grammar any further: {self.fault()}")

    def fault(self) -> str:
        """The reason, in the library's words."""
        return _first_line(self.ll)


def compile_grammar(
    grammar: Grammar, table: LLTokenizer, config: StructuredConfig, vocab_size: int
) -> Compiled:
    """Compiles a grammar, and makes its first mask.

    Args:
        vocab_size: of the model's logits.

    Raises:
        GrammarError: it is wrong, not supported, too complex, or admits no output.
    """
    begun_s = time.monotonic()
    limits = LLParserLimits(
        step_lexer_fuel=config.step_fuel,
        max_lexer_states=_MAX_LEXER_STATES,
        verbose_errors=False,
    )
    matcher = LLMatcher(table, _source(grammar), log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(_named(_first_line(matcher)))
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    for _ in range(2):  # copies share a lexer: what it cannot do is only said to the second one
        trial = matcher.deep_copy()
        trial.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if trial.is_error() or not mask.any():
            reason = _first_line(trial) if trial.is_error() else "no token may come first"
            raise GrammarError(f"the grammar admits no output: {reason}")
    return Compiled(grammar, matcher, time.monotonic() - begun_s)


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance's JSON: a client's text never stands where options do."""
    match grammar.kind:
        case "json_schema":
            return '{"grammars":[{"json_schema":' + grammar.text + "}]}"
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark" | "ebnf":
            return json.dumps({"grammars": [{"lark_grammar": lark_of(grammar)}]})
    raise GrammarError(f"there is no kind of grammar {grammar.kind!r}")


def lark_of(grammar: Grammar) -> str:
    """A context-free grammar in Lark's syntax.

    Raises:
        GrammarError: it cannot be read.
    """
    if grammar.kind == "lark":
        return grammar.text
    try:
        return any_to_lark(grammar.text)
    except RecursionError:
        raise GrammarError("the grammar nests too deeply") from None
    except Exception as error:  # the library raises bare ones
        raise GrammarError(f"not a grammar in EBNF: {str(error)[:_MAX_MESSAGE]}") from None


def _named(message: str) -> str:
    """The library's message, with the keyword in it also where it does not name one."""
    for words, keywords in _KEYWORDS.items():
        if words in message:
            return f"{message} ({keywords})"
    return message


def _first_line(matcher: LLMatcher) -> str:
    """The library's message without what it shows of the grammar and the output."""
    message = _REST.sub("", matcher.get_error()).replace(_NOTHING, "no token may come")
    return " ".join(message.split())[:_MAX_MESSAGE] or "no reason is known"
