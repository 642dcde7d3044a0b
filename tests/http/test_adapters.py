"""Adapters over HTTP, with the fake engine: its tokens tell what each position ran with."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EmbeddingsConfig, LoraConfig
from jaxserve.formats.peft import adapter_digest, write_adapter
from jaxserve.http.adapters import Adapters
from jaxserve.http.auth import Identity, KeyRing
from jaxserve.http.frontend import INLINE_CHARACTERS
from jaxserve.lora.registry import Registry
from jaxserve.types import AdapterBase, SamplingParams
from tests.fakes.engine import ADAPTER_BYTES, MODULES, oracle
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import CONFIG, Front, front
from tests.lora.adapters import random_adapter

MODULE = next(iter(MODULES)).replace("*", "0")
LORA = LoraConfig(enabled=True, classes=("4x2", "8x1"), host_bytes=4 * ADAPTER_BYTES)
PROMPT = list(range(10, 30))


def written(directory: Path, seed: int, rank: int = 4) -> str:
    """An adapter's files; returns its key."""
    write_adapter(directory, random_adapter({MODULE: (8, 8)}, rank, seed))
    return adapter_digest(directory)


def answer(adapter: str | None, num_tokens: int = 8, seed: int = 0) -> list[int]:
    """What must come with the adapter of this key."""
    sampling = SamplingParams(max_tokens=num_tokens, seed=seed)
    return oracle(PROMPT, sampling, adapter=adapter)


def body(model: str | None, num_tokens: int = 8, seed: int = 0) -> dict[str, Any]:
    """A completion that shows its tokens."""
    return {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": num_tokens,
        "seed": seed,
        "return_token_ids": True,
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With two adapters, of both classes, and a root with a third."""
    written(tmp_path / "one", 1)
    written(tmp_path / "two", 2, rank=8)
    written(tmp_path / "root" / "three", 3)
    return tmp_path


@pytest.fixture
def served(directory: Path) -> Iterator[Front]:
    """An application with both configured."""
    lora = dataclasses.replace(
        LORA,
        adapters=(f"one={directory / 'one'}", f"two={directory / 'two'}"),
        root=str(directory / "root"),
    )
    adapters = Adapters(Registry(lora, directory / "state"))
    config = dataclasses.replace(CONFIG, lora=lora)
    with front(config=config, adapters=adapters) as made:
        yield made


def tokens_of(served: Front, model: str | None, **options: int) -> list[int]:
    """A completion's tokens."""
    document = served.ok("/v1/completions", body(model, **options))
    assert document["model"] == (model or "fake")
    return document["choices"][0]["token_ids"]


def test_the_model_field_chooses(served: Front, directory: Path) -> None:
    """By the adapter's name, with the base's before it, from the root, or the base alone."""
    keys = {name: adapter_digest(directory / name) for name in ("one", "two")}
    keys["three"] = adapter_digest(directory / "root" / "three")
    assert len({tuple(answer(key)) for key in (None, *keys.values())}) == 4
    for _ in range(2):
        assert tokens_of(served, None) == tokens_of(served, "fake") == answer(None)
        for name, key in keys.items():
            assert tokens_of(served, name) == tokens_of(served, f"fake:{name}") == answer(key)
    response = served.post("/v1/completions", body("four"))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert served.post("/v1/completions", body("fake:../one")).status_code == 404
    chat = {"model": "two", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert served.ok("/v1/chat/completions", chat)["model"] == "two"
    assert served.ok("/tokenize", {"model": "one", "prompt": "hi"})["count"] == 2


def test_models_are_listed_with_their_parent(served: Front, directory: Path) -> None:
    """Those of the root once they were asked for."""
    rows = {row["id"]: row for row in served.get("/v1/models").json()["data"]}
    assert list(rows) == ["fake", "one", "two"]
    assert "parent" not in rows["fake"]
    assert rows["two"]["parent"] == "fake"
    assert rows["two"]["root"] == str(directory / "two")
    for name in ("three", "fake:three"):  # before anybody has asked for it
        card = served.get(f"/v1/models/{name}").json()
        assert (card["id"], card["parent"], card["hash"]) == ("three", "fake", None)
    assert "three" not in {row["id"] for row in served.get("/v1/models").json()["data"]}
    tokens_of(served, "three")
    assert served.get("/v1/models/three").json()["parent"] == "fake"
    assert served.get("/v1/models/fake:three").json()["id"] == "three"
    assert served.get("/v1/models/four").status_code == 404


def test_the_embedding_models_name_is_no_adapters(directory: Path) -> None:
    """`model` would mean two things."""
    embeddings = EmbeddingsConfig(model="fake", name="vectors")
    config = dataclasses.replace(CONFIG, lora=LORA, embeddings=embeddings)
    adapters = Adapters(Registry(LORA, directory / "state"))
    with front(config=config, adapters=adapters) as served:
        names = [row["id"] for row in served.get("/v1/models").json()["data"]]
        assert len(names) == 2
        source = {"lora_name": names[1], "lora_path": str(directory / "one")}
        response = served.post("/v1/load_lora_adapter", source)
        assert response.status_code == 400
        assert "the model that embeds" in response.json()["error"]["message"]


def test_load_and_unload(served: Front, directory: Path) -> None:
    """vLLM's bodies; a taken name needs load_inplace; what is gone is a 404."""
    source = {"lora_name": "new", "lora_path": str(directory / "one")}
    loaded = served.ok("/v1/load_lora_adapter", source)
    key = adapter_digest(directory / "one")
    assert (loaded["id"], loaded["parent"], loaded["hash"]) == ("new", "fake", key)
    assert tokens_of(served, "new") == answer(key)
    assert served.post("/v1/load_lora_adapter", source).status_code == 400
    other = written(directory / "one", 7)
    again = served.ok("/v1/load_lora_adapter", source | {"load_inplace": True})
    assert again["hash"] == other
    assert tokens_of(served, "new") == answer(other)
    assert served.ok("/v1/unload_lora_adapter", {"lora_name": "new"})["ended"] is True
    assert served.post("/v1/completions", body("new")).status_code == 404
    assert served.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 404


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lora_path": "/does/not/exist"}, "no directory"),
        ({"lora_path": "/tmp/../etc"}, "'..'"),
        ({"lora_path": "/tmp/a\0b"}, "zero byte"),
        ({"lora_path": ""}, "not empty"),
        ({"lora_name": "../x"}, "adapter name"),
        ({"lora_name": "fake"}, "base model"),
        ({"lora_name": None}, "lora_name"),
        ({"lora_int_id": 3}, "lora_int_id"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_refused_loads(served: Front, directory: Path, fields: dict[str, Any], says: str) -> None:
    """400, with what is wrong, and which field."""
    good = {"lora_name": "x", "lora_path": str(directory / "one")}
    response = served.post("/v1/load_lora_adapter", good | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"]
    assert error["param"] == next(iter(fields))


def test_a_broken_adapter_is_a_400(served: Front, directory: Path) -> None:
    """When it is loaded, and when it is first asked for; the others go on."""
    weights = directory / "root" / "three" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    response = served.post("/v1/completions", body("three"))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_adapter", "model")
    load = {"lora_name": "x", "lora_path": str(weights.parent)}
    response = served.post("/v1/load_lora_adapter", load)
    assert response.status_code == 400 and response.json()["error"]["param"] == "lora_path"
    assert tokens_of(served, "one") == answer(adapter_digest(directory / "one"))


def test_a_deadline_holds_while_an_adapter_is_fetched(
    served: Front, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """504 in time; the fetch goes on, and the next request finds its adapter."""
    arrives = threading.Event()
    registry = served.app.frontend.adapters.registry
    materialise = registry.materialise

    def slow(name: str, base: AdapterBase) -> str:
        assert arrives.wait(60)
        return materialise(name, base)

    monkeypatch.setattr(registry, "materialise", slow)
    response = served.post("/v1/completions", body("three") | {"timeout": 0.05})
    assert response.status_code == 504
    assert "adapter 'three'" in response.json()["error"]["message"]
    arrives.set()
    assert tokens_of(served, "three") == answer(adapter_digest(directory / "root" / "three"))


def test_others_do_not_wait_for_slow_adapters(
    served: Front, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for unloads that wait: long prompts are still tokenized, in threads as ever."""
    arrives = threading.Event()
    registry = served.app.frontend.adapters.registry
    monkeypatch.setattr(registry, "materialise", lambda name, base: arrives.wait(60) and "")
    monkeypatch.setattr(registry.disk, "is_used", lambda key: not arrives.is_set())
    num = min(32, (os.cpu_count() or 1) + 4)  # threads of the event loop's own
    for index in range(num):
        written(directory / "root" / f"slow{index}", 10 + index)
        load = {"lora_name": f"used{index}", "lora_path": str(directory / "one")}
        served.ok("/v1/load_lora_adapter", load)

    async def run() -> int:
        asks = [served.http.post("/v1/completions", json=body(f"slow{i}")) for i in range(num)]
        asks += [
            served.http.post("/v1/unload_lora_adapter", json={"lora_name": f"used{i}"})
            for i in range(num)
        ]
        waiting = [asyncio.create_task(ask) for ask in asks]
        await asyncio.sleep(0.2)
        long = {"model": "fake", "prompt": "x" * (INLINE_CHARACTERS + 1)}
        try:
            async with asyncio.timeout(20):
                return (await served.http.post("/tokenize", json=long)).status_code
        finally:
            arrives.set()
            await asyncio.gather(*waiting)

    assert served.run(run()) == 200


def test_unload_in_use(served: Front, directory: Path) -> None:
    """Refused with a 409, or waits; the running stream is whole either way."""
    key = adapter_digest(directory / "one")

    async def run() -> tuple[int, int, list[int]]:
        request = served.http.build_request(
            "POST", "/v1/completions", json=body("one", 200) | {"stream": True}
        )
        running = asyncio.create_task(served.http.send(request))
        while served.client.status is None or not served.app.frontend.client.num_streams:
            await asyncio.sleep(0)
        refused = await served.http.post(
            "/v1/unload_lora_adapter", json={"lora_name": "one", "in_use": "refuse"}
        )
        waited = await served.http.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
        assert waited.json()["ended"] is True
        response = await running
        chunks = [
            json.loads(line[6:]) for line in response.text.splitlines() if line[:7] == "data: {"
        ]
        tokens = [t for c in chunks for choice in c["choices"] for t in choice["token_ids"]]
        return refused.status_code, waited.status_code, tokens

    refused, waited, tokens = served.run(run())
    assert (refused, waited) == (409, 200)
    assert tokens == answer(key, 200)
    assert served.post("/v1/completions", body("one")).status_code == 404


@pytest.mark.parametrize("num_reloads", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_reloads_under_load(served: Front, directory: Path, num_reloads: int) -> None:
    """Each request has the tokens of one version that its name stood for while it came: no page
    of another is hit, and nothing is dropped."""
    versions = [written(directory / f"v{seed}", seed + 100) for seed in range(12)]
    rng = random.Random(1)
    served.ok("/v1/load_lora_adapter", {"lora_name": "live", "lora_path": str(directory / "v0")})
    begun, answered = [0], 1  # versions in order of their loads, and how many were answered
    done = asyncio.Event()

    async def reload() -> None:
        nonlocal answered
        for _ in range(num_reloads):
            number = rng.randrange(len(versions))
            load = {
                "lora_name": "live",
                "lora_path": str(directory / f"v{number}"),
                "load_inplace": True,
            }
            begun.append(number)
            response = await served.http.post("/v1/load_lora_adapter", json=load)
            assert response.status_code == 200, response.text
            answered += 1
        done.set()

    async def request() -> int:
        count = 0
        while not done.is_set():
            first = answered - 1
            response = await served.http.post("/v1/completions", json=body("live", 6))
            assert response.status_code == 200, response.text
            tokens = response.json()["choices"][0]["token_ids"]
            possible = {versions[number] for number in begun[first:]}
            assert tokens in [answer(key, 6) for key in possible], "stale, or a mix"
            count += 1
        return count

    async def run() -> list[int]:
        results = await asyncio.gather(reload(), *(request() for _ in range(4)))
        return [count for count in results if count is not None]

    counts = served.run(run())
    assert answered == 1 + num_reloads and all(count > 10 for count in counts)
    assert tokens_of(served, "live") == answer(versions[begun[-1]])
    status = served.run(served.client.get_status())
    assert status.running == status.waiting == status.pages_used == 0


def test_a_thousand_names(served: Front, directory: Path) -> None:
    """Random traffic over far more adapters than slots, host memory and disk hold at once."""
    keys = {}
    for number in range(1000):
        keys[f"n{number}"] = written(directory / "root" / f"n{number}", 1000 + number)
    rng = random.Random(2)
    popular = [name for number, name in enumerate(keys) for _ in range(1 + 400 // (1 + number))]

    async def one(name: str) -> None:
        response = await served.http.post("/v1/completions", json=body(name, 4))
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["token_ids"] == answer(keys[name], 4)

    async def run() -> None:
        for _ in range(25):
            await asyncio.gather(*(one(rng.choice(popular)) for _ in range(16)))

    served.run(run())
    status = served.run(served.client.get_status())
    assert status.adapter_joins == 400
    assert 0 < status.adapter_hits < 400
    assert status.adapter_host_bytes <= LORA.host_bytes
    assert status.adapters_held <= status.adapter_slots == 3


def test_only_an_admin_loads(directory: Path) -> None:
    """Others may use what is there."""
    keys = KeyRing(
        [
            (hashlib.sha256(b"admin").digest(), Identity(tenant="ops", admin=True)),
            (hashlib.sha256(b"user").digest(), Identity(tenant="a")),
        ]
    )
    adapters = Adapters(Registry(LORA, directory / "state"))
    load = {"lora_name": "x", "lora_path": str(directory / "one")}
    config = dataclasses.replace(CONFIG, lora=LORA)
    with front(config=config, keys=keys, adapters=adapters) as made:
        user, admin = ({"Authorization": f"Bearer {name}"} for name in ("user", "admin"))
        assert made.post("/v1/load_lora_adapter", load, headers=user).status_code == 403
        assert made.post("/v1/load_lora_adapter", load, headers=admin).status_code == 200
        assert made.post("/v1/completions", body("x"), headers=user).status_code == 200
        unload = {"lora_name": "x"}
        assert made.post("/v1/unload_lora_adapter", unload, headers=user).status_code == 403


def test_off_without_the_setting() -> None:
    """The name is not known, loading is refused, and the models are as before."""
    with front() as made:
        assert made.post("/v1/completions", body("one")).status_code == 404
        load = {"lora_name": "x", "lora_path": "/tmp"}
        response = made.post("/v1/load_lora_adapter", load)
        assert response.status_code == 400 and "lora.enabled" in response.text
        assert [row["id"] for row in made.get("/v1/models").json()["data"]] == ["fake"]


def test_text_comes_out_as_of_the_base(served: Front) -> None:
    """An adapter changes the tokens, not how they are read."""
    document = served.ok("/v1/completions", body("one"))
    choice = document["choices"][0]
    assert choice["text"] == ByteTokenizer().decode(choice["token_ids"])
