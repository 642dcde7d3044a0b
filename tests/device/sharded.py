"""Serves the same requests on a mesh of simulated devices and on one of them; run as a program.

    python -m tests.device.sharded MODEL DATA EXPERT MODEL_AXIS [SETTING ...]

Prints JSON: what each request brought, on the mesh and on one device. In a process of its own,
since the number of CPU devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import jax

from jaxserve.config import Config
from jaxserve.engine import load
from jaxserve.engine.batches import Batches
from jaxserve.engine.loop import Engine
from jaxserve.engine.parts import Parts
from jaxserve.engine.process import build_engine
from jaxserve.protocol.messages import (
    GetStatus,
    Submit,
    TokenEvents,
    TokenSegment,
    UseVocabulary,
)
from jaxserve.settings import load_config
from jaxserve.structured.grammars import regex
from jaxserve.types import SamplingParams, Vocabulary
from tests.fakes.drafts import ToldDrafts

NUM_DEVICES = 8
#: Prompts of several lengths, some longer than a chunk, more than there are rows.
PROMPT_LENS = (3, 40, 17, 1, 25, 9, 33, 12, 5, 21)
SETTINGS = (
    "model.max_context=64",
    "cache.page_size=4",
    "cache.num_pages=70",
    "scheduler.max_rows=4",
    "scheduler.max_step_tokens=16",
    "scheduler.decode_steps=3",
    "scheduler.draft_tokens=0",
    "kernels.matmul=xla",
)
#: So many of them are served again, with drafts.
DRAFTING = 4
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"temperature": 0.9, "grammar": regex("([0-9]{2}[a-z]){9}"), "ignore_eos": False},
)
#: Every token is a byte.
BYTES = Vocabulary(tokens=tuple(bytes([i]) for i in range(256)), special_token_ids=())


class Pocket:
    """A server transport without a wire: what is sent is kept."""

    def __init__(self) -> None:
        self.events: list[TokenEvents] = []

    def receive(self, timeout_s: float) -> list[Any]:
        """Nothing ever comes."""
        return []

    def send(self, client: Any, message: Any) -> None:
        """Keeps what tokens it brings."""
        if isinstance(message, TokenEvents):
            self.events.append(message)

    def close(self) -> None:
        """Nothing to close."""


def serve(config: Config, parts: Parts) -> dict[str, Any]:
    """All requests at once, to their ends; what each brought, by number."""
    pocket: Any = Pocket()
    engine = build_engine(config, pocket, parts)
    engine.handle("client", UseVocabulary(vocabulary=BYTES))
    for number in range(len(PROMPT_LENS)):
        engine.handle("client", request(number, parts.model.vocab_size))
    while engine._grammars.num_held:
        engine.receive(0.0)
    found = answers(engine, pocket)
    found["compiles"] = parts.executor.compiles_after_warmup
    return found


def request(number: int, vocab_size: int) -> Submit:
    """One of them."""
    sampling = SamplingParams(
        **{"max_tokens": 12, "seed": number, "ignore_eos": True}
        | SAMPLINGS[number % len(SAMPLINGS)]
    )
    prompt = [(7 * number + 3 * i + 5) % vocab_size for i in range(PROMPT_LENS[number])]
    segments = [TokenSegment(token_ids=prompt)]
    return Submit(sequence_ids=[number], prompt=segments, sampling=sampling, arrived_ns=1)


def answers(engine: Engine, pocket: Any) -> dict[str, Any]:
    """Turns the loop to the end; what each request brought."""
    turn(engine)
    found: dict[str, Any] = {
        str(number): {"tokens": [], "logprobs": [], "prompt_logprobs": []}
        for number in range(len(PROMPT_LENS))
    }
    for events in pocket.events:
        for number, tokens in zip(events.sequence_ids, events.token_ids, strict=True):
            found[str(number)]["tokens"] += tokens
        for name in ("logprobs", "prompt_logprobs"):
            for number, entries in getattr(events, name).items():
                found[str(number)][name] += [[e.token_id, e.rank, e.logprob] for e in entries]
    found["pages_used"] = engine.scheduler.pages_used + engine.scheduler.host_pages_used
    found["swapped_tokens"] = sum(
        end.record.swapped_tokens for events in pocket.events for end in events.finished
    )
    return found


def draft(config: Config, parts: Parts, expected: dict[str, Any]) -> dict[str, Any]:
    """The first of these requests that draft, once more, a few at a time and with told drafts."""
    pocket: Any = Pocket()
    assert isinstance(parts.batch, Batches)
    batch = Batches(parts.batch.shapes, config.scheduler.max_rows, parts.copies)
    engine = build_engine(config, pocket, replace(parts, batch=batch))
    for number in range(DRAFTING):
        engine.handle("client", request(number, parts.model.vocab_size))
        sequence = engine._live.of("client")[number]
        ToldDrafts(sequence, expected[str(number)]["tokens"], wrong=5)
    found = answers(engine, pocket)
    ends = [finished for events in pocket.events for finished in events.finished]
    found["drafted"] = sum(finished.record.drafted_tokens for finished in ends)
    return found


def turn(engine: Engine) -> None:
    """Turns the loop until nothing is left to do."""
    engine.handle("client", GetStatus(stats=False))
    for _ in range(1000):
        if not engine.scheduler.has_work and engine.in_flight is None:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def on_both(
    words: Seq[str], settings: Seq[str], run: Callable[[Config, Parts], dict[str, Any]]
) -> None:
    """Loads on the mesh and on one device, and prints what ran there.

    Args:
        words: the model, and the mesh: data, expert, model.
        settings: beside these.
    """
    model, data, expert, model_axis = words
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    common = [f"model.path={model}", *SETTINGS, *settings]
    mesh = [f"parallel.data={data}", f"parallel.expert={expert}", f"parallel.model={model_axis}"]
    devices = jax.devices()
    found = {}
    for name, some, parallel in (("mesh", devices, mesh), ("one", devices[:1], [])):
        load.devices = lambda some=some: some
        config = load_config(None, [*common, *parallel], {})
        found[name] = run(config, load.load_parts(config, lambda *_: None))
    print(json.dumps(found))


def serve_and_draft(config: Config, parts: Parts) -> dict[str, Any]:
    """`serve`, and once more with drafts where there are some."""
    found = serve(config, parts)
    if config.scheduler.draft_tokens:
        found["with_drafts"] = draft(config, parts, found)
    return found


if __name__ == "__main__":
    on_both(sys.argv[1:5], sys.argv[5:], serve_and_draft)
