"""A thousand adapters of a small real model over eight slots, through /v1 and onto the device.

Each name has content of its own, but the weights are of a few kinds, so that each answer can be
held against the merged model of its kind.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import (
    CacheConfig,
    Config,
    KernelsConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
)
from jaxserve.engine.load import load_parts
from jaxserve.engine.thread import EngineThread
from jaxserve.formats.peft import Adapter, write_adapter
from jaxserve.http.adapters import Adapters
from jaxserve.lora.registry import Registry
from jaxserve.models.adapters import AdapterLayout
from jaxserve.models.options import ModelOptions
from jaxserve.weights.load import load_model
from tests.device.rig import next_tokens
from tests.http.frontend import Front
from tests.http.metrics.exposed import Exposed
from tests.lora.adapters import ends_with, merge, random_adapter
from tests.models.loading import ORACLE, load_tiny

CASE = "llama3"
OPTIONS = ModelOptions(layers="scanned", matmul="cpu", attention="cpu")
NUM_ADAPTERS, NUM_SLOTS, NUM_KINDS, NUM_TOKENS = 1000, 8, 12, 5
#: Requests that are sent together, each batch when the one before it has been answered.
BATCHES = (1,) * 160 + (NUM_SLOTS,) * 30
NAMES = tuple(f"n{number}" for number in range(NUM_ADAPTERS))

CONFIG = Config(
    model=ModelConfig(path=str(ORACLE / CASE), served_name="tiny", max_context=64),
    cache=CacheConfig(page_size=4, num_pages=120, host_bytes=0),
    scheduler=SchedulerConfig(max_rows=4, max_step_tokens=16, decode_steps=2, draft_tokens=0),
    kernels=KernelsConfig(layers="scanned"),
    lora=LoraConfig(enabled=True, classes=(f"4x{NUM_SLOTS}",), host_bytes=1 << 20),
)


def kind_of(name: str) -> int:
    """Which weights a name stands for."""
    return NAMES.index(name) % NUM_KINDS


@pytest.fixture(scope="module")
def kinds() -> list[Adapter]:
    """Weights that differ."""
    targets = AdapterLayout(load_tiny(CASE, OPTIONS), vocabulary=False).targets
    wanted = ends_with("q_proj", "o_proj", "down_proj")
    return [random_adapter(targets, 2, seed, wanted=wanted, scale=0.4) for seed in range(NUM_KINDS)]


@pytest.fixture(scope="module")
def answers(kinds: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Greedy tokens of the model that each kind is merged into."""
    directory = tmp_path_factory.mktemp("merged")
    found = [
        next_tokens(
            load_model(merge(ORACLE / CASE, kind, directory / str(place)), options=OPTIONS),
            prompt(),
            NUM_TOKENS,
        )
        for place, kind in enumerate(kinds)
    ]
    assert len({tuple(tokens) for tokens in found}) == NUM_KINDS
    return found


@pytest.fixture(scope="module")
def written(kinds: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each name."""
    directory = tmp_path_factory.mktemp("adapters")
    for name in NAMES:
        kind = kinds[kind_of(name)]
        config = dataclasses.replace(kind.config, base_model=name)  # no two have the same content
        write_adapter(directory / name, Adapter(config=config, modules=kind.modules))
    return directory


@pytest.fixture(scope="module")
def front(answers: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """An application over a real engine, which would count what the merged models compile."""
    assert answers
    adapters = Adapters(Registry(CONFIG.lora, tmp_path_factory.mktemp("state")))
    with EngineThread(CONFIG, load_parts) as engine:
        made = Front(engine, adapters=adapters)
        try:
            yield made
        finally:
            made.close()


def prompt() -> list[int]:
    """All requests begin alike, so that a page of another adapter would be found if it could."""
    return np.load(ORACLE / CASE / "reference.npz")["tokens"].tolist()[:11]


def hits_of(batches: Sequence[Sequence[str]]) -> tuple[int, int]:
    """The fewest and the most hits of slots of which the least recently used gives way.

    Names of a batch may come in any order, those of one batch all come before the next's. A name
    whose last use was k others ago is there while k is below the number of slots; k is largest
    where all others of its last batch and of this one come between, smallest where none does. Once
    it has come its batch cannot push it out.
    """
    fewest = most = 0
    last: dict[str, int] = {}
    for number, batch in enumerate(batches):
        assert len(set(batch)) <= NUM_SLOTS
        for name in set(batch):
            again = batch.count(name) - 1
            fewest, most = fewest + again, most + again
            if name in last:
                between = {n for own in batches[last[name] + 1 : number] for n in own}
                around = between | set(batches[last[name]]) | set(batch)
                fewest += len(around - {name}) < NUM_SLOTS
                most += len(between - {name}) < NUM_SLOTS
            last[name] = number
    return fewest, most


def test_hits_are_counted_as_an_lru_of_single_requests_has_them() -> None:
    """The bounds meet where every batch is one request."""
    rng = random.Random(3)
    names = rng.choices(NAMES[:20], k=400)
    held: list[str] = []
    hits = 0
    for name in names:
        hits += name in held
        held = [*(n for n in held if n != name), name][-NUM_SLOTS:]
    assert hits_of([[name] for name in names]) == (hits, hits)
    fewest, most = hits_of([names[at : at + 4] for at in range(0, 400, 4)])
    assert fewest < hits < most


@pytest.mark.slow
def test_a_thousand_adapters_over_eight_slots(
    front: Front, written: Path, answers: list[list[int]]
) -> None:
    """Each request has its own adapter's tokens, nothing is compiled, and hits are an LRU's."""

    async def register(name: str, turns: asyncio.Semaphore) -> None:
        body = {"lora_name": name, "lora_path": str(written / name)}
        async with turns:
            response = await front.http.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == 200, response.text

    async def register_all() -> None:
        turns = asyncio.Semaphore(16)
        await asyncio.gather(*(register(name, turns) for name in NAMES))

    async def ask(name: str) -> None:
        body: dict[str, Any] = {
            "model": name,
            "prompt": prompt(),
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        response = await front.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["token_ids"] == answers[kind_of(name)], name

    async def ask_all(batches: list[list[str]]) -> None:
        for batch in batches:
            await asyncio.gather(*map(ask, batch))

    front.run(register_all())
    rows = front.get("/v1/models").json()["data"]
    assert {row["id"] for row in rows} == {"tiny", *NAMES}
    assert len({row["hash"] for row in rows if row["id"] != "tiny"}) == NUM_ADAPTERS

    rng = random.Random(4)
    popular = [1 / (1 + place) for place in range(NUM_ADAPTERS)]  # Zipf's law
    batches = [rng.choices(NAMES, popular, k=size) for size in BATCHES]
    singles, together = batches[:160], batches[160:]
    before = front.run(front.client.get_status())
    front.run(ask_all(singles))
    middle = front.run(front.client.get_status())
    front.run(ask_all(together))
    after = front.run(front.client.get_status())

    assert before.adapter_joins == before.adapter_loads == 0
    fewest, most = hits_of(singles)
    assert middle.adapter_hits == fewest == most > 10
    assert after.adapter_joins == sum(BATCHES)
    fewest, most = hits_of(batches)
    assert fewest <= after.adapter_hits <= most
    assert len({name for batch in batches for name in batch}) > 10 * NUM_SLOTS
    assert after.compiles_after_warmup == before.compiles_after_warmup == 0
    assert after.adapters_held == after.adapter_slots == NUM_SLOTS
    assert 0 < after.adapter_host_bytes <= CONFIG.lora.host_bytes
    assert after.waiting == after.running == 0
    page = Exposed(front.get("/metrics").text)
    assert page.value("jaxserve_adapter_joins_total") == after.adapter_joins
    assert page.value("jaxserve_adapter_hits_total") == after.adapter_hits
    assert page.value("jaxserve_adapter_loads_total") == after.adapter_loads
