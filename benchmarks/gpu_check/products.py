"""The products of adapters and of experts on the device: right first, then against XLA's own.

Correct: ‖out − ref‖/‖ref‖ against the reference in float32, on fresh random inputs; what adapters
add is added to zeros, and rows that nobody may look at are NaN. Fast: what adapters add to all four
sites of Llama-3-8B's 32 layers, in milliseconds a step and in bytes of the adapters that are used a
second, kernel by kernel and in one CUDA graph as the engine runs them; one product of an expert
layer of Qwen3-30B-A3B and of Mixtral, as shares of the measured limits. XLA's way, which is what
runs unless the kernels are asked for, stands beside each.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_check.kernels import TOLERANCE, error_of
from benchmarks.gpu_check.limits import Limits, seconds_a_call
from benchmarks.gpu_check.parts import Check
from benchmarks.gpu_check.report import Finding
from jaxserve.device.compiles import CompilerOptions, compiler_options
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.traffic import grouped_matmul_bytes, grouped_matmul_flops
from pallas_kernels.lora_matmul import LoraWeights, block_tokens, lora_matmul
from pallas_kernels.lora_matmul.traffic import lora_matmul_bytes

NONE = -1
#: (rank, slots) of each class, where adapters are checked.
_CLASSES = ((8, 3), (16, 2), (128, 2))
#: Tokens' slots over all classes: few, and several tiles of which one is not full.
_SLOTS = {
    "few": [2, NONE, 0, 4, 2, 6, NONE, 3, 5, 0, 2],
    "many": [1] * 70 + [NONE, 4, 0, 2, 3, 6] * 8 + [NONE] * 90 + [5] * 9 + [0],
}
#: K, and the widths of the parts, which repeat.
_SITES = {"three parts": (256, (128, 64, 64), 3), "one part": (576, (576,), 1)}
#: Rows of each group, and rows of no group behind them.
_GROUPS = {
    "few rows": ([3, 0, 1, 40, 2, 0, 7, 11], 6),
    "many rows": ([100, 37, 0, 350, 64, 9], 30),
    "no rows": ([0, 0, 0], 9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A product of one expert layer: E, A, D and F."""

    num_experts: int
    top_k: int
    size: int
    wide: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is timed.

    Attributes:
        sites: of adapters: K, and the widths of the parts, which repeat to N.
        layers, rank, adapters: likewise.
        rows, prompt: tokens of decode and of a chunk.
    """

    sites: tuple[tuple[int, tuple[int, ...], int], ...] = (
        (4096, (512, 128, 128), 8),
        (4096, (4096,), 1),
        (4096, (14336, 14336), 1),
        (14336, (4096,), 1),
    )
    layers: int = 32
    rank: int = 16
    adapters: int = 8
    rows: int = 32
    prompt: int = 2048
    experts: tuple[tuple[str, Experts], ...] = (
        ("Qwen3-30B-A3B", Experts(num_experts=128, top_k=8, size=2048, wide=768)),
        ("Mixtral", Experts(num_experts=8, top_k=2, size=4096, wide=14336)),
    )


SMALL = Sizes(
    sites=((64, (64, 64, 64), 1), (128, (64,), 1)),
    layers=2,
    adapters=2,
    rows=4,
    prompt=16,
    experts=(("small", Experts(num_experts=4, top_k=2, size=64, wide=128)),),
)


def checks(backend: str, limits: Callable[[], Limits], sizes: Sizes) -> Iterator[Check]:
    """Every check of them."""
    for slots, site in itertools.product(_SLOTS, _SITES):
        right = partial(_adapters_are_right, backend, slots, site)
        yield Check(f"adapters, {slots} tokens, {site}", lambda right=right: [right()])
    for case in _GROUPS:
        yield Check(f"experts, {case}", lambda case=case: [_groups_are_right(backend, case)])
    yield Check("adapters", lambda: _adapters(backend, limits(), sizes), timed=True)
    yield Check("adapters in one graph", lambda: _in_one_graph(backend, sizes), timed=True)
    for name, experts in sizes.experts:
        fast = partial(_experts, backend, limits, name, experts, sizes)
        yield Check(f"experts, {name}", fast, timed=True)


def _adapters_are_right(backend: str, case: str, site: str) -> Finding:
    rng = np.random.default_rng(secrets.randbits(32))
    (depth, cycle, repeats), slots = _SITES[site], jnp.asarray(_SLOTS[case], jnp.int32)
    columns = sum(cycle) * repeats

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    weights = [
        LoraWeights(
            a=draw(2, count, rank * len(cycle), depth) / depth**0.5,
            b=draw(2, count, rank, columns),
        )
        for rank, count in _CLASSES
    ]
    x, y = draw(len(slots), depth), jnp.zeros((len(slots), columns), jnp.bfloat16)

    def add(which: str, x: jax.Array, y: jax.Array) -> jax.Array:
        blocks, first = [], 0
        for _, count in _CLASSES:
            blocks.append(block_tokens(slots - first, count))
            first += count
        return lora_matmul(x, y, weights, blocks, 1, cycle=cycle, backend=which)

    expected = add("reference", x, y.astype(jnp.float32))
    out = jax.jit(partial(add, backend))(x, y)
    wrong = float(jnp.abs(out[slots == NONE].astype(jnp.float32)).sum())
    error = error_of(out, expected)
    return Finding(
        f"adapters, {case} tokens, {site}: error", 1.0 if wrong else error, "<", TOLERANCE
    )


def _groups_are_right(backend: str, case: str) -> Finding:
    rng = np.random.default_rng(secrets.randbits(32))
    groups, padding = _GROUPS[case]
    live = sum(groups)
    x = rng.standard_normal((live + padding, 512), np.float32)
    x[live:] = np.nan
    w = rng.standard_normal((2 * len(groups), 512, 384), np.float32)
    w[: len(groups)] = np.nan
    given = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.asarray(groups)
    first = jnp.asarray(len(groups))
    call = jax.jit(lambda *given: grouped_matmul(*given, first_group=first, backend=backend))
    out = call(*given)
    exact = given[0].astype(jnp.float32), given[1].astype(jnp.float32), given[2]
    expected = grouped_matmul(*exact, first_group=first, backend="reference")
    wrong = jnp.any(out[live:] != 0)
    error = error_of(out[:live], expected[:live]) if live else 0.0
    return Finding(f"experts, {case}: error", 1.0 if wrong else error, "<", TOLERANCE)


def _adapters(backend: str, limits: Limits, sizes: Sizes) -> Iterator[Finding]:
    weights, cases = _weights(sizes), _decoding(sizes)
    cases[f"a chunk of {sizes.prompt}, one adapter"] = np.zeros(sizes.prompt, np.int64)
    for name, slots in cases.items():
        used = len({*slots.tolist()} - {NONE})
        slots = jnp.asarray(slots, jnp.int32)
        seconds = {
            which: seconds_a_call(_step(which, sizes), slots, weights) for which in (backend, "xla")
        }
        yield Finding(f"adapters, {name}: ms a step", 1e3 * seconds[backend])
        yield Finding(f"adapters, {name}: ms a step, XLA", 1e3 * seconds["xla"])
        if not used:
            continue
        num_bytes = sizes.layers * sum(
            lora_matmul_bytes(
                *(used, len(slots), sizes.rank, len(cycle), depth, sum(cycle) * repeats),
                weight_bytes=2,
                activation_bytes=2,
            )
            for depth, cycle, repeats in sizes.sites
        )
        share = num_bytes / seconds[backend] / limits.copy
        yield Finding(f"adapters, {name}: share of copy bandwidth", share)


def _in_one_graph(backend: str, sizes: Sizes) -> Iterator[Finding]:
    weights = _weights(sizes)
    options = compiler_options(jax.devices()[0].device_kind)
    step = _step(backend, sizes, unrolled=True, options=options)
    for name, slots in _decoding(sizes).items():
        seconds = seconds_a_call(step, jnp.asarray(slots, jnp.int32), weights)
        yield Finding(f"adapters, {name}, in one graph: ms a step", 1e3 * seconds)


def _decoding(sizes: Sizes) -> dict[str, np.ndarray]:
    """Slots of the rows, by what is said of them."""
    return {
        f"{sizes.rows} rows, {sizes.adapters} adapters": np.arange(sizes.rows) % sizes.adapters,
        f"{sizes.rows} rows, none": np.full(sizes.rows, NONE),
    }


def _weights(sizes: Sizes) -> list[LoraWeights]:
    """Of each site."""
    found = []
    for depth, cycle, repeats in sizes.sites:
        shape = sizes.layers, sizes.adapters, sizes.rank * len(cycle), depth
        columns = sum(cycle) * repeats
        found.append(
            LoraWeights(
                a=jnp.full(shape, 0.01, jnp.bfloat16),
                b=jnp.full((*shape[:2], sizes.rank, columns), 0.01, jnp.bfloat16),
            )
        )
    return found


def _step(
    backend: str, sizes: Sizes, *, unrolled: bool = False, options: CompilerOptions | None = None
) -> Any:
    """All sites of all layers, as a step has them: tokens grouped once, layers scanned or not."""

    def step(slots: jax.Array, weights: list[LoraWeights]) -> list[jax.Array]:
        blocks = [block_tokens(slots, sizes.adapters)]
        shape = slots.shape[0]
        xs = [jnp.ones((shape, depth), jnp.bfloat16) for depth, _, _ in sizes.sites]
        ys = [
            jnp.zeros((shape, sum(cycle) * repeats), jnp.bfloat16)
            for _, cycle, repeats in sizes.sites
        ]

        @jax.jit  # traced once for all layers
        def layer(ys: list[jax.Array], index: jax.Array) -> tuple[list[jax.Array], None]:
            return [
                lora_matmul(x, y, [own], blocks, index, cycle=cycle, backend=backend)
                for x, y, own, (_, cycle, _) in zip(xs, ys, weights, sizes.sites, strict=True)
            ], None

        if not unrolled:
            return jax.lax.scan(layer, ys, jnp.arange(sizes.layers))[0]
        for index in range(sizes.layers):
            ys, _ = layer(ys, jnp.int32(index))
        return ys

    return jax.jit(step, compiler_options=options)


def _experts(
    backend: str, limits: Callable[[], Limits], name: str, experts: Experts, sizes: Sizes
) -> Iterator[Finding]:
    rng = np.random.default_rng(0)
    shape = experts.num_experts, experts.size, experts.wide
    w = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    for tokens in (sizes.rows, sizes.prompt):
        picked = [
            rng.choice(experts.num_experts, experts.top_k, replace=False) for _ in range(tokens)
        ]
        counts = np.bincount(np.concatenate(picked), minlength=experts.num_experts)
        groups, num_rows = jnp.asarray(counts, jnp.int32), tokens * experts.top_k
        x = jax.random.normal(jax.random.key(1), (num_rows, experts.size), jnp.bfloat16)
        ways = {
            which: jax.jit(partial(grouped_matmul, backend=which)) for which in (backend, "xla")
        }
        ways["ragged_dot"] = jax.jit(jax.lax.ragged_dot)
        seconds = {which: seconds_a_call(way, x, w, groups, calls=5) for which, way in ways.items()}
        where = f"experts, {name}, {tokens} tokens"
        if tokens == sizes.rows:
            touched = int(np.count_nonzero(counts))
            num_bytes = grouped_matmul_bytes(
                touched, num_rows, *shape[1:], weight_bytes=2, activation_bytes=2
            )
            share = num_bytes / seconds[backend] / limits().copy
            yield Finding(f"{where}: share of copy bandwidth", share)
        else:
            flops = grouped_matmul_flops(num_rows, *shape[1:])
            yield Finding(
                f"{where}: share of matmul peak", flops / seconds[backend] / limits().matmul
            )
        for which in ("xla", "ragged_dot"):
            yield Finding(f"{where}: times as fast as {which}", seconds[which] / seconds[backend])
