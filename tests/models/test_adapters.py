"""Adapters beside the base's matrices against the same base with them merged in, logits by logits.

Each architecture; batches that mix the base and adapters of different ranks, modules and classes,
in chunks of different lengths; all ways in which a step is computed on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxserve.device.adapters import AdapterSlots, RankClass
from jaxserve.device.sharding import make_mesh
from jaxserve.errors import InvalidAdapter
from jaxserve.formats.peft import Adapter, LoraModule
from jaxserve.models.adapters import AdapterLayout
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import ModelOptions
from jaxserve.weights.load import load_model
from tests.lora.adapters import all_but, cut_to, ends_with, merge, random_adapter
from tests.models.driver import Driver
from tests.models.loading import ORACLE, load_tiny, skip_without_native

TOLERANCE = 1e-3
CLASSES = (RankClass(rank=4, num_slots=3), RankClass(rank=16, num_slots=5))
XLA = ModelOptions()
SCANNED = ModelOptions(layers="scanned", lora="cpu")
NATIVE = ModelOptions(layers="scanned", matmul="cpu", attention="cpu", lora="cpu")
MIXTURE = ModelOptions(attention="cpu", lora="cpu")


def slots_with(model: Decoder, adapters: list[Adapter], places: list[int]) -> AdapterSlots:
    """Slots of both classes, with these adapters in them."""
    mesh = make_mesh(jax.devices()[:1])
    slots = AdapterSlots(AdapterLayout(model, vocabulary=True), CLASSES, mesh)
    programs = {key: jax.jit(write) for key, (write, _, _) in slots.programs().items()}
    for adapter, place in zip(adapters, places, strict=True):
        rank = CLASSES[slots.place(place)[0]].rank
        for part, index, content in slots.writes(place, slots.layout.arrays(adapter, rank)):
            write = programs["adapter", part, index]
            slots.arrays[index] = write(slots.arrays[index], content)
    return slots


def adapters_of(layout: AdapterLayout) -> list[Adapter]:
    """Eight, of ranks 2 to 16: all modules, some, some layers; with the vocabulary's or without."""
    targets = layout.targets
    return [
        random_adapter(targets, 3, 1, wanted=ends_with("q_proj", "v_proj")),
        random_adapter(targets, 4, 2, wanted=all_but("embed_tokens", "lm_head"), rslora=True),
        random_adapter(targets, 8, 3, ranks={"o_proj": 16, "down_proj": 5, "k_proj": 1}),
        random_adapter(cut_to(targets, [1]), 2, 4, wanted=all_but("embed_tokens")),
        random_adapter(targets, 16, 5, wanted=ends_with("embed_tokens", "gate_proj", "o_proj")),
        random_adapter(targets, 12, 6, wanted=all_but("embed_tokens", "lm_head", "v_proj")),
        random_adapter(cut_to(targets, [0]), 6, 7, wanted=all_but("lm_head"), rslora=True),
        random_adapter(targets, 5, 8, wanted=ends_with("up_proj", "down_proj", "lm_head")),
    ]


def check(case: str, options: ModelOptions, directory: Path, prompt_len: int = 24) -> None:
    """A mixed batch against each merged model."""
    skip_without_native(options)
    model = load_tiny(case, options)
    layout = AdapterLayout(model, vocabulary=True)
    adapters = adapters_of(layout)
    places = [0, 1, 6, 2, 3, 4, 7, 5]
    slots = slots_with(model, adapters, places)
    tokens = np.load(ORACLE / case / "reference.npz")["tokens"].tolist()[:prompt_len]
    count = len(adapters) + 1
    driver = Driver(model, count, 64, adapters=(slots.arrays, [*places, -1]))
    shape = {"num_rows": count + 1, "num_tokens": count * 8 + 8}
    rows: dict[int, list[np.ndarray]] = {row: [] for row in range(count)}
    # Pieces of different lengths in each step, the last of one token each: as a decode step.
    ends = [0] * count
    for turn in range(100):
        step = {}
        for row in range(count):
            size = 1 if ends[row] >= prompt_len - 2 else 1 + (turn + row) % 8
            part = tokens[ends[row] : ends[row] + size]
            if part:
                step[row] = part
                ends[row] += len(part)
        if not step:
            break
        last, _ = driver.step(step, **shape)
        for row, logits in zip(step, last, strict=True):
            rows[row].append((ends[row] - 1, logits))
    for row in range(count):
        base = ORACLE / case
        if row < len(adapters):
            base = merge(base, adapters[row], directory / f"{case}-{row}")
        plain = load_model(base, options=ModelOptions())
        alone = Driver(plain, 1, 64)
        _, hidden = alone.step({0: tokens})
        expected = alone.all_logits(hidden)
        for position, logits in rows[row]:
            np.testing.assert_allclose(logits, expected[position], atol=TOLERANCE, rtol=0)
        if row < len(adapters):  # the adapter does something
            _, hidden = Driver(model, 1, 64).step({0: tokens})
            assert np.abs(alone.all_logits(hidden) - expected).max() > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["llama3", "qwen2_tied", "gemma3"])
def test_native(case: str, tmp_path: Path) -> None:
    """What a CPU runs."""
    check(case, NATIVE, tmp_path)


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize("case", ["llama2", "llama_linear", "mistral", "qwen2", "qwen3", "gemma2"])
def test_other_architectures(case: str, tmp_path: Path) -> None:
    """The same."""
    check(case, NATIVE, tmp_path)


@pytest.mark.parametrize("case", ["qwen3_moe_mixed"])
def test_mixture(case: str, tmp_path: Path) -> None:
    """Attention everywhere, and the layers without experts."""
    check(case, MIXTURE, tmp_path)


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize("options", [XLA, SCANNED], ids=["unrolled", "scanned"])
def test_plain_xla(options: ModelOptions, tmp_path: Path) -> None:
    """Where there is no native matmul."""
    check("llama3", options, tmp_path)


def test_layout_names_every_linear_layer() -> None:
    """As transformers does."""
    layout = AdapterLayout(load_tiny("llama3", XLA), vocabulary=True)
    parts = {name.rsplit(".", 1)[-1] for name in layout.targets}
    assert parts == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("embed_tokens", "lm_head"),
    }
    without = AdapterLayout(load_tiny("llama3", XLA), vocabulary=False)
    assert {n.rsplit(".", 1)[-1] for n in without.targets} == parts - {"embed_tokens", "lm_head"}


def test_bytes_are_counted() -> None:
    """A slot takes what its arrays take."""
    layout = AdapterLayout(load_tiny("llama3", XLA), vocabulary=True)
    slots = AdapterSlots(layout, CLASSES, make_mesh(jax.devices()[:1]))
    flags = 2 * sum(own.num_slots for own in CLASSES)
    expected = sum(own.num_slots * layout.num_bytes(own.rank) for own in CLASSES)
    assert slots.num_bytes == expected + flags


def test_refuses_another_base() -> None:
    """Unknown modules, other shapes, and a rank above the class's, by name."""
    layout = AdapterLayout(load_tiny("llama3", XLA), vocabulary=True)
    good = random_adapter(layout.targets, 4, 0, wanted=ends_with("q_proj"))
    name, own = next(iter(good.modules.items()))

    def arrays(modules: dict[str, LoraModule], rank: int = 4) -> None:
        layout.arrays(Adapter(config=good.config, modules=modules), rank)

    with pytest.raises(InvalidAdapter, match="no module 'model.layers.77.mlp.up_proj'"):
        arrays({"model.layers.77.mlp.up_proj": own})
    wide = LoraModule(a=np.zeros((4, own.a.shape[1] + 2), np.float32), b=own.b, scale=1.0)
    with pytest.raises(InvalidAdapter, match="made for another base"):
        arrays({name: wide})
    with pytest.raises(InvalidAdapter, match="rank 4 is above"):
        arrays({name: own}, rank=2)


def test_bfloat16_files(tmp_path: Path) -> None:
    """Adapters stored in bfloat16 count as the values they hold."""
    skip_without_native(NATIVE)
    model = load_tiny("llama3", NATIVE)
    layout = AdapterLayout(model, vocabulary=True)
    wanted = all_but("embed_tokens", "lm_head")
    adapter = random_adapter(layout.targets, 4, 0, wanted=wanted, dtype=ml_dtypes.bfloat16)
    slots = slots_with(model, [adapter], [0])
    tokens = np.load(ORACLE / "llama3" / "reference.npz")["tokens"].tolist()[:9]
    last, _ = Driver(model, 1, 64, adapters=(slots.arrays, [0])).step({0: tokens})
    merged = load_model(merge(ORACLE / "llama3", adapter, tmp_path), options=NATIVE)
    expected, _ = Driver(merged, 1, 64).step({0: tokens})
    np.testing.assert_allclose(last, expected, atol=TOLERANCE, rtol=0)
