"""The child that compiles grammars for their sake alone: a hostile one takes nobody with it.

Started by `grammars.GrammarChecker` as `python -m jaxserve.http.grammar_process PARENT_PID`. Reads
pickles from stdin, from its parent alone: first `Setup`, then one `Grammar` after another. Answers
each on stdout with a length and a message: empty where all is well.

Invariants: never imports JAX; ends with its parent; takes no more memory than it may.
"""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
from dataclasses import dataclass

from llguidance import LLTokenizer

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError
from jaxserve.protocol.parent import follow_parent
from jaxserve.structured.matcher import compile_grammar
from jaxserve.structured.scrutiny import scrutinise
from jaxserve.structured.table import token_table
from jaxserve.types import Grammar, Vocabulary

#: An answer's length before it.
LENGTH = struct.Struct("<I")
#: So that the step loop goes before it.
_NICENESS = 10


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a child has to know.

    Attributes:
        vocab_size, eos_token_ids: the model's.
    """

    config: StructuredConfig
    vocabulary: Vocabulary
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def main() -> None:
    """The child's entry."""
    follow_parent(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    setup: Setup = pickle.load(sys.stdin.buffer)
    os.nice(_NICENESS)
    num_bytes = setup.config.check_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    table = token_table(setup.vocabulary, setup.vocab_size, setup.eos_token_ids)
    message = ""
    while True:
        answer = message.encode()
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()
        try:
            grammar: Grammar = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        message = _verdict(grammar, table, setup)


def _verdict(grammar: Grammar, table: LLTokenizer, setup: Setup) -> str:
    try:
        scrutinise(grammar)
        compile_grammar(grammar, table, setup.config, setup.vocab_size)
    except GrammarError as error:
        return error.message or "it is wrong"
    return ""


if __name__ == "__main__":
    main()
