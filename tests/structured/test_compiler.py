"""Compiling beside the step loop: its threads end with it."""

from __future__ import annotations

import gc
import threading

from jaxserve.config import StructuredConfig
from jaxserve.structured import grammars
from jaxserve.structured.compiler import Compiler
from jaxserve.types import ModelInfo
from tests.fakes.engine import EOS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary


def test_the_threads_of_a_compiler_that_nobody_needs_end() -> None:
    before = set(threading.enumerate())
    model = ModelInfo(
        name="fake",
        vocab_size=VOCAB_SIZE,
        max_context=64,
        eos_token_ids=(EOS,),
        cache_groups=(),
    )
    compiler = Compiler(StructuredConfig(), model)
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
