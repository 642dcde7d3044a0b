"""Compiling beside the step loop: what is kept, and that its threads end with it."""

from __future__ import annotations

import gc
import threading

from jaxserve.config import StructuredConfig
from jaxserve.structured import grammars
from jaxserve.structured.compiler import Compiler
from jaxserve.types import ModelInfo
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary

MODEL = ModelInfo(
    name="fake",
    vocab_size=VOCAB_SIZE,
    max_context=64,
    eos_token_ids=(EOS,),
    cache_groups=(),
)


def test_what_is_kept_is_compiled_once_and_the_least_recent_goes() -> None:
    one, two, three = (grammars.regex(f"a{{{num}}}") for num in (1, 2, 3))
    compiler = Compiler(StructuredConfig(cached_grammars=2), MODEL)
    compiler.use(vocabulary())
    builds = {grammar: compiler.start(grammar) for grammar in (one, two)}
    assert compiler.start(one) is builds[one]
    compiler.start(three)  # in the place of `two`
    assert compiler.start(one) is builds[one]
    assert compiler.start(two) is not builds[two]
    assert builds[two].result().grammar == two, "who waits for it still gets it"


def test_the_threads_of_a_compiler_that_nobody_needs_end() -> None:
    before = set(threading.enumerate())
    compiler = Compiler(StructuredConfig(), MODEL)
    compiler.use(vocabulary())
    build = compiler.start(grammars.regex("a+"))
    assert build.result()
    own = set(threading.enumerate()) - before
    assert own
    del compiler, build
    gc.collect()
    for thread in own:
        thread.join(60)
        assert not thread.is_alive()
