"""The fake engine, reciting: what it says after a prompt is a text that the test has written.

`SCRIPTS[seed]` is what a request of that seed is answered with, choice N by the Nth text (the last
one for all further choices), then the end token. Where a grammar does not let it say that, it ends
if it may, and else says the first token that it may.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from jaxserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.engine.thread import EngineThread
from tests.fakes.engine import EOS, GROUPS, VOCAB_SIZE, fake_parts
from tests.fakes.executor import FakeExecutor
from tests.fakes.tokenizer import ByteTokenizer

#: Room for prompts that tell of tools.
CONFIG = Config(
    model=ModelConfig(max_context=8192, served_name="fake"),
    cache=CacheConfig(page_size=4, num_pages=8000),
    scheduler=SchedulerConfig(max_rows=8, max_step_tokens=512, decode_steps=4, max_waiting=200),
)
#: Texts by seed; a seed that is not here gives the fake's own tokens.
SCRIPTS: dict[int, tuple[str, ...]] = {}


class Reciter(FakeExecutor):
    """See the module."""

    def _sample(self, slot: int, end: int, mask: np.ndarray | None) -> tuple[int, int]:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} was never joined"
        sampling, choice, prompt_len = state
        texts = SCRIPTS.get(sampling.seed)
        if texts is None:
            return super()._sample(slot, end, mask)
        text = texts[min(choice, len(texts) - 1)]
        tokens = ByteTokenizer().encode(text, add_special_tokens=False)
        place = end - prompt_len
        wanted = tokens[place] if place < len(tokens) else EOS
        if mask is None:
            return wanted, 0
        may = (token for token in (wanted, EOS, *range(VOCAB_SIZE)) if _allows(mask, token))
        return next(may), 0


def _allows(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token >> 5] >> (token & 31) & 1)


def reciting_parts(config: Config, progress: Progressing) -> Parts:
    """The fake's parts, its device reciting."""
    parts = fake_parts(config, progress)
    device = Reciter(
        GROUPS,
        page_size=config.cache.page_size,
        num_pages=parts.num_pages,
        max_rows=config.scheduler.max_rows,
        vocab_size=VOCAB_SIZE,
        max_context=parts.model.max_context,
        host_pages=parts.host_pages,
    )
    return dataclasses.replace(parts, executor=device)


#: Of the tool `get_weather`; and calls of it and of `get_time` as a model writes them.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@contextmanager
def reciting_engine() -> Iterator[EngineThread]:
    """An engine that recites."""
    with EngineThread(CONFIG, reciting_parts) as made:
        yield made
        SCRIPTS.clear()
