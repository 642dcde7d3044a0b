"""Adapters beside the base's matrices against the same base with them merged in, logits by logits.

Each architecture; batches that mix the base and adapters of different ranks, modules and classes,
in chunks of different lengths; all ways in which a step is computed on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxserve.device.adapters import AdapterSlots, RankClass, bytes_by_part
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


def layout_of(model: Decoder) -> AdapterLayout:
    """All that may take a delta does."""
    return AdapterLayout(model, vocabulary=True, experts=True)


def slots_with(model: Decoder, adapters: list[Adapter], places: list[int]) -> AdapterSlots:
    """Slots of both classes, with these adapters in them, written in this order."""
    mesh = make_mesh(jax.devices()[:1])
    slots = AdapterSlots(layout_of(model), CLASSES, mesh)
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


def of_experts(*experts: int) -> Callable[[str], bool]:
    """Modules of these experts."""
    return lambda name: any(f".experts.{expert}." in name for expert in experts)


def mixture_adapters_of(layout: AdapterLayout) -> list[Adapter]:
    """Eight: everything, experts and router alone, some experts, some matrices, attention only."""
    targets = layout.targets
    gate, up, down = ("w1", "w3", "w2") if any(n.endswith(".w1") for n in targets) else (
        *("gate_proj", "up_proj", "down_proj"),
    )  # fmt: skip
    return [
        random_adapter(targets, 4, 11, wanted=all_but("embed_tokens", "lm_head"), rslora=True),
        random_adapter(targets, 3, 12, wanted=ends_with("q_proj", "v_proj")),
        random_adapter(targets, 8, 13, ranks={gate: 2, r"experts\.1\..*": 16, "o_proj": 5}),
        random_adapter(targets, 2, 14, wanted=of_experts(0, 3)),
        random_adapter(targets, 16, 15, wanted=ends_with(down)),
        random_adapter(targets, 12, 16, wanted=ends_with(gate, up, "k_proj"), rslora=True),
        random_adapter(targets, 6, 17, wanted=ends_with("gate", "o_proj"), scale=0.3),
        random_adapter(cut_to(targets, [1]), 1, 18, wanted=ends_with(up, "gate"), scale=0.5),
    ]


def check(
    case: str,
    options: ModelOptions,
    directory: Path,
    prompt_len: int = 24,
    make: Callable[[AdapterLayout], list[Adapter]] = adapters_of,
) -> None:
    """A mixed batch against each merged model."""
    skip_without_native(options)
    model = load_tiny(case, options)
    layout = layout_of(model)
    adapters = make(layout)
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
    """Attention and routers everywhere, and the layers without experts."""
    check(case, MIXTURE, tmp_path)


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("case", "options"),
    [("mixtral", MIXTURE), ("qwen3_moe", SCANNED), ("qwen3_moe_mixed", SCANNED), ("mixtral", XLA)],
)
def test_experts(case: str, options: ModelOptions, tmp_path: Path) -> None:
    """Deltas of experts and of the router."""
    check(case, options, tmp_path, make=mixture_adapters_of)


def test_a_slot_forgets_the_experts_of_the_adapter_before(tmp_path: Path) -> None:
    """One that has none of its own is not given those that still lie there."""
    skip_without_native(MIXTURE)
    model = load_tiny("mixtral", MIXTURE)
    everything, _, _, _, _, _, attention, _ = mixture_adapters_of(layout_of(model))
    attention = replace(everything, modules={
        name: module for name, module in everything.modules.items() if ".self_attn." in name
    })  # fmt: skip
    slots = slots_with(model, [everything, attention], [1, 1])
    tokens = np.load(ORACLE / "mixtral" / "reference.npz")["tokens"].tolist()[:9]
    last, _ = Driver(model, 1, 64, adapters=(slots.arrays, [1])).step({0: tokens})
    merged = load_model(merge(ORACLE / "mixtral", attention, tmp_path), options=ModelOptions())
    expected, _ = Driver(merged, 1, 64).step({0: tokens})
    np.testing.assert_allclose(last, expected, atol=TOLERANCE, rtol=0)


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


def test_layout_names_experts_only_where_they_are_asked_for() -> None:
    """The router always."""
    model = load_tiny("mixtral", XLA)
    with_experts, without = layout_of(model), AdapterLayout(model, vocabulary=True)
    more = with_experts.targets.keys() - without.targets.keys()
    moe = "model.layers.{}.block_sparse_moe"
    assert more == {
        f"{moe.format(layer)}.experts.{expert}.w{number}"
        for layer in range(2) for expert in range(8) for number in (1, 2, 3)
    }  # fmt: skip
    assert without.targets[f"{moe.format(0)}.gate"] == (64, 8)
    assert with_experts.targets[f"{moe.format(1)}.experts.7.w2"] == (48, 64)
    assert (without.parts, with_experts.parts[1]) == (("layers", "vocabulary"), "experts")
    assert without.settings == {"experts": "lora.experts"} and not with_experts.settings
    adapter = random_adapter(with_experts.targets, 4, 0, wanted=of_experts(2))
    with pytest.raises(InvalidAdapter, match=r"and others with lora\.experts=true"):
        without.arrays(adapter, 4)


@pytest.mark.parametrize("case", ["llama3", "mixtral"])
def test_bytes_are_counted(case: str) -> None:
    """A slot takes what its arrays take."""
    layout, mesh = layout_of(load_tiny(case, XLA)), make_mesh(jax.devices()[:1])
    slots = AdapterSlots(layout, CLASSES, mesh)
    flags = 3 * sum(own.num_slots for own in CLASSES)
    expected = sum(own.num_slots * layout.num_bytes(own.rank) for own in CLASSES)
    assert slots.num_bytes == expected + flags
    by_part = bytes_by_part(layout, CLASSES, mesh)
    assert sum(by_part.values()) == expected
    apart = AbstractMesh((1, 4, 2), ("data", "expert", "model"))
    shared = bytes_by_part(layout, CLASSES, apart)
    if case == "mixtral":  # 2 layers of 8 experts of 3 matrices, 64 by 48
        ranks = sum(own.rank * own.num_slots for own in CLASSES)
        assert by_part["experts"] == 4 * ranks * 2 * 8 * 3 * (64 + 48)
        # Experts over 4 devices, and one side of each matrix over 2.
        assert shared["experts"] == 4 * ranks * 2 * 2 * 3 * (64 + 24)
    assert shared["layers"] < by_part["layers"]


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
