"""Adapters of a mixture's experts at an engine's start: what they fit, what is refused, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.config import LoraConfig
from jaxserve.device.memory import Memory
from jaxserve.device.sharding import make_mesh
from jaxserve.engine.lora import adapter_base, make_slots, request_adapters, slot_bytes
from jaxserve.errors import ConfigError, InvalidAdapter
from jaxserve.formats.peft import Adapter, adapter_digest, write_adapter
from jaxserve.lora.registry import Registry
from jaxserve.models.adapters import AdapterLayout
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.types import AdapterBase
from tests.lora.adapters import all_but, random_adapter
from tests.models.loading import MIXTURES, load_tiny

CONFIG = LoraConfig(enabled=True, classes=("4x1", "8x2"), experts=True)
EXPERT = "model.layers.1.block_sparse_moe.experts.7"
ROOM = Memory(total_bytes=1 << 30, free_bytes=1 << 30)


@pytest.fixture(scope="module")
def mixtral() -> Decoder:
    """2 layers of 8 experts, 64 by 48."""
    return load_tiny("mixtral", ModelOptions())


def base_of(model: Decoder, config: LoraConfig = CONFIG) -> AdapterBase:
    """What the front end holds adapters against."""
    base = adapter_base(config, model)
    assert base is not None
    return base


@pytest.mark.parametrize("case", MIXTURES)
def test_the_front_end_knows_the_same_modules(case: str) -> None:
    """In a few words for all layers and experts, also where some layers have none."""
    model = load_tiny(case, ModelOptions())
    base, layout = base_of(model), AdapterLayout(model, vocabulary=False, experts=True)
    assert base.targets() == layout.targets
    assert any(".experts.1." in name for name in layout.targets)
    assert len(base.modules) < 40


def one(name: str, size_in: int, size_out: int, rank: int = 4) -> Adapter:
    """With a delta of one module."""
    return random_adapter({name: (size_in, size_out)}, rank, 0)


def with_nan() -> Adapter:
    """In one expert of many."""
    adapter = random_adapter({f"{EXPERT[:-1]}{e}.w1": (64, 48) for e in range(8)}, 4, 0)
    last = adapter.modules[f"{EXPERT}.w1"]
    b = last.b.copy()
    b[5, 1] = np.nan
    return replace(adapter, modules={**adapter.modules, f"{EXPERT}.w1": replace(last, b=b)})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: one(f"{EXPERT}.w1", 64, 50),
            "64 to 50 in the adapter, in the base model 64 to 48",
        ),
        (
            lambda: one(f"{EXPERT}.w2", 64, 48),
            "64 to 48 in the adapter, in the base model 48 to 64",
        ),
        (lambda: one(EXPERT.replace("experts.7", "experts.8") + ".w1", 64, 48), "has no module"),
        (
            lambda: one(f"{EXPERT}.w4", 64, 48),
            "gate, k_proj, o_proj, q_proj, v_proj, w1, w2, w3 do$",
        ),
        (lambda: one(EXPERT.replace("experts.7", "gate"), 64, 9), "in the base model 64 to 8"),
        (lambda: one(f"{EXPERT}.w1", 64, 48, rank=9), "has rank 9, the limit is 8"),
        (with_nan, "experts.7.w1 holds values that are not finite"),
    ],
)
def test_what_is_refused(
    make: Callable[[], Adapter], said: str, mixtral: Decoder, tmp_path: Path
) -> None:
    """When it is loaded, with the module's name; none of it comes to the engine."""
    registry, source = Registry(CONFIG, tmp_path / "registry"), tmp_path / "adapter"
    write_adapter(source, make())
    with pytest.raises(InvalidAdapter, match=said):
        registry.load("mine", str(source), base_of(mixtral), replace=False)
    assert registry.names() == {}


def test_experts_that_were_not_asked_for(mixtral: Decoder, tmp_path: Path) -> None:
    """The reason names the setting; the router takes a delta without it."""
    off = replace(CONFIG, experts=False)
    registry, base = Registry(off, tmp_path / "registry"), base_of(mixtral, off)
    write_adapter(tmp_path / "expert", one(f"{EXPERT}.w1", 64, 48))
    with pytest.raises(InvalidAdapter, match=r"and others with lora\.experts=true"):
        registry.load("mine", str(tmp_path / "expert"), base, replace=False)
    write_adapter(tmp_path / "router", one(EXPERT.replace("experts.7", "gate"), 64, 8))
    registry.load("mine", str(tmp_path / "router"), base, replace=False)
    assert "experts" not in slot_bytes(off, mixtral, make_mesh(jax.devices()[:1]))


def test_slots_that_do_not_fit(mixtral: Decoder) -> None:
    """Are refused before they are made, with what experts take of them."""
    mesh = make_mesh(jax.devices()[:1])
    need = slot_bytes(CONFIG, mixtral, mesh)
    ranks = 4 * 1 + 8 * 2
    assert need["experts"] == 4 * ranks * 2 * 8 * 3 * (64 + 48)
    total = sum(need.values())

    def room(free_bytes: int) -> Callable[[], Memory]:
        return lambda: Memory(total_bytes=1 << 30, free_bytes=free_bytes)

    with pytest.raises(ConfigError, match=f"{need['experts'] >> 20} of them for experts"):
        make_slots(CONFIG, mixtral, mesh, room(total - 1))
    slots = make_slots(CONFIG, mixtral, mesh, room(total))
    assert slots is not None and slots.num_bytes == total + 3 * 3  # a byte a flag


def test_a_write_leaves_the_slots_where_they_are(mixtral: Decoder) -> None:
    """So they stay in huge pages, which they were moved to when they were made."""
    slots = make_slots(CONFIG, mixtral, make_mesh(jax.devices()[:1]), lambda: ROOM)
    assert slots is not None

    def places(own: Any) -> list[int]:
        arrays = jax.tree.leaves(jax.block_until_ready(own.sites))
        return [array.unsafe_buffer_pointer() for array in arrays]

    for write, content, index in slots.programs().values():
        before = places(slots.arrays[index])
        slots.arrays[index] = jax.jit(write, donate_argnums=0)(slots.arrays[index], content)
        assert places(slots.arrays[index]) == before


def test_a_model_without_experts() -> None:
    """Is told apart at the start."""
    with pytest.raises(ConfigError, match=r"lora\.experts=true: LlamaForCausalLM has no experts"):
        adapter_base(CONFIG, load_tiny("llama3", ModelOptions()))


@pytest.mark.parametrize("wanted", ["attention", "everything"])
def test_bytes_of_the_host(mixtral: Decoder, tmp_path: Path, wanted: str) -> None:
    """Measured before the adapter is loaded, as they are then; experts only where it has some."""
    slots = make_slots(CONFIG, mixtral, make_mesh(jax.devices()[:1]), lambda: ROOM)
    requests = request_adapters(CONFIG, slots)
    host = requests._host
    assert slots is not None and host is not None
    of_experts = ("w1", "w2", "w3", "gate") if wanted == "attention" else ()
    adapter = random_adapter(slots.layout.targets, 5, 0, wanted=all_but(*of_experts))
    write_adapter(tmp_path, adapter)
    ready = host._load(adapter_digest(tmp_path), tmp_path)
    assert ready.rank_class == 1
    assert host._measure(tmp_path) == ready.num_bytes
    parts = ("layers",) if wanted == "attention" else ("layers", "experts")
    assert ready.num_bytes == slots.layout.num_bytes(8, parts)
