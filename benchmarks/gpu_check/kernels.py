"""The kernels on the device: right first, then how near the limits.

Correct: ‖out − ref‖/‖ref‖ against the reference in float32, on fresh random inputs; pages that
nobody may look at are NaN. Fast: decode attention in bytes of live pages a second, prefill
attention in operations of the causal half a second, as shares of the measured limits; JAX's own
deprecated paged kernel on the same decode batch beside it.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_check.limits import Limits, seconds_a_call
from benchmarks.gpu_check.parts import Check
from benchmarks.gpu_check.report import Finding
from pallas_kernels.kv_update import kv_update
from pallas_kernels.paged_attention import (
    RaggedBatch,
    paged_attention,
    reference,
    write_and_attend,
)
from pallas_kernels.quantized_pages import QuantizedPages, is_quantized, quantize

TOLERANCE = 1e-2
#: (query length, context length) of rows.
DECODE = [(1, 7), (1, 1), (0, 0), (1, 130), (0, 40), (1, 1300), (1, 64)]
MIXED = [(1, 33), (19, 50), (0, 0), (150, 400), (1, 130), (2, 2), (300, 300)]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the timed batches: Llama-3-8B's heads.

    Attributes:
        rows, context: of decode.
        prompt: tokens of prefill.
    """

    rows: int = 64
    context: int = 4096
    prompt: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16


def checks(backend: str, limits: Callable[[], Limits], sizes: Sizes) -> Iterator[Check]:
    """Every check of the kernels."""
    kinds = ("decode", DECODE), ("mixed", MIXED)

    def correct(name: str, lens: list[tuple[int, int]], **given: Any) -> Check:
        def find() -> list[Finding]:
            error = attention_error(backend, lens, **given)
            return [Finding(f"attention {name}: error", error, "<", TOLERANCE)]

        return Check(f"attention {name}", find)

    for head_dim, (name, lens) in itertools.product((64, 80, 96, 128, 256), kinds):
        yield correct(f"{name} H={head_dim}", lens, head_dim=head_dim)
    for name, lens in kinds:
        options = {"window": 70, "soft_cap": 5.0}
        yield correct(f"{name} window, cap, sinks", lens, sinks=True, **options)
        yield correct(f"{name} one KV head", lens, num_heads=8, num_kv_heads=1)
        yield correct(f"{name} pages of 128", lens, page_size=128)
        for dtype in ("int8", "float8_e4m3fn"):
            yield correct(f"{name} pages of {dtype}", lens, page_size=32, dtype=dtype)
    yield Check("cache update", lambda: [_update_is_right(backend)])
    for head_dim in (64, 96, 128):
        writes = partial(_decode_writes, backend, head_dim)
        yield Check(f"decode that writes H={head_dim}", lambda writes=writes: [writes()])
    yield Check("decode attention", lambda: _decode(backend, limits(), sizes), timed=True)
    yield Check("prefill attention", lambda: [_prefill(backend, limits(), sizes)], timed=True)


def _batch(
    lens: list[tuple[int, int]], page_size: int, rng: np.random.Generator
) -> tuple[RaggedBatch, int]:
    """A batch over pages in random order, and how many pages there are."""
    counts = [-(-context // page_size) for _, context in lens]
    order = iter(rng.permutation(np.arange(1, sum(counts) + 1)))
    table = np.zeros((len(lens), max(counts) + 1), np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(order) for _ in range(count)]
    batch = RaggedBatch(
        page_table=jnp.asarray(table),
        query_starts=jnp.asarray(np.cumsum([0, *(n for n, _ in lens)]), jnp.int32),
        context_lens=jnp.asarray([context for _, context in lens], jnp.int32),
        max_query_len=max(n for n, _ in lens),
    )
    return batch, sum(counts) + 1


def attention_error(
    backend: str,
    lens: list[tuple[int, int]],
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    page_size: int = 16,
    dtype: str = "bfloat16",
    sinks: bool = False,
    **options: Any,
) -> float:
    """Against the reference in float32, on fresh inputs; 1 where padding is not zero.

    Args:
        lens: query and context lengths of the rows.
        options: of attention.
    """
    rng = np.random.default_rng(secrets.randbits(32))
    batch, num_pages = _batch(lens, page_size, rng)
    num_tokens = sum(n for n, _ in lens)
    shape = (2, num_pages, num_kv_heads, page_size, 2 * head_dim)
    values = rng.standard_normal(shape, np.float32)
    values[:, 0] = np.nan
    for row, (_, context) in enumerate(lens):
        if context % page_size:
            last = int(batch.page_table[row, context // page_size])
            values[:, last, :, context % page_size :] = np.nan
    pages = _codes(values, dtype) if is_quantized(dtype) else jnp.asarray(values, dtype)
    q = jnp.asarray(2 * rng.standard_normal((num_tokens + 3, num_heads, head_dim)), jnp.bfloat16)
    q = q.at[num_tokens:].set(jnp.nan)
    given = {"layer": 1, "batch": batch, "scale": head_dim**-0.5, **options}
    if sinks:
        given["sinks"] = jnp.asarray(rng.standard_normal(num_heads), jnp.float32)
    exact = jax.jit(lambda q, pages: reference.paged_attention(q, pages, **given))
    expected = exact(q.astype(jnp.float32), pages)
    out = jax.jit(lambda q, pages: paged_attention(q, pages, backend=backend, **given))(q, pages)
    error = error_of(out[:num_tokens], expected[:num_tokens])
    padding = float(jnp.abs(out[num_tokens:].astype(jnp.float32)).sum())
    return error if padding == 0 else 1.0


def _codes(values: np.ndarray, dtype: str) -> QuantizedPages:
    """Pages of codes; what is NaN has NaN for its scale."""
    halves = jnp.asarray(values.reshape(*values.shape[:-1], 2, -1))
    codes, scales = quantize(jnp.nan_to_num(halves), dtype)
    scales = jnp.where(jnp.isnan(halves).any(-1), jnp.nan, scales)
    scales = jnp.swapaxes(scales, -1, -2).reshape(*values.shape[:3], -1)
    return QuantizedPages(codes.reshape(values.shape), scales, dtype)


def error_of(out: Any, expected: Any) -> float:
    """‖out − expected‖/‖expected‖."""
    ours, theirs = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _update_is_right(backend: str) -> Finding:
    rng = np.random.default_rng(secrets.randbits(32))
    batch, num_pages = _batch(MIXED, 16, rng)
    num_tokens = sum(n for n, _ in MIXED)
    pages = jnp.asarray(rng.standard_normal((2, num_pages, 2, 16, 256)), jnp.bfloat16)
    new = [jnp.asarray(rng.standard_normal((num_tokens, 2, 128)), jnp.bfloat16) for _ in "kv"]
    places = batch.token_places(num_tokens, 16)
    write = jax.jit(partial(kv_update, backend=backend, num_rows=len(MIXED)))
    got = np.asarray(write(pages, *new, 1, *places), np.float32)
    want = np.array(pages, np.float32)
    page, offset = map(np.asarray, places)
    want[1, page, :, offset] = np.concatenate([np.asarray(x, np.float32) for x in new], axis=-1)
    wrong = np.count_nonzero(got[:, 1:] != want[:, 1:])
    return Finding("cache update: wrong elements", float(wrong), "<", 1.0)


def _decode_writes(backend: str, head_dim: int) -> Finding:
    """A decode program's rows, some of them padding, whose last position is not in its page yet."""
    rng = np.random.default_rng(secrets.randbits(32))
    lens = [(1, 7), (1, 1), (1, 130), (1, 1300), (1, 64), (1, 65), (1, 16)]
    batch, num_pages = _batch(lens, 16, rng)
    batch = replace(batch, aligned=True)
    shape = (2, num_pages, 2, 16, 2 * head_dim)
    pages = rng.standard_normal(shape, np.float32)
    places = batch.token_places(len(lens), 16)
    page, offset = map(np.asarray, places)
    pages[1, page, :, offset] = np.nan
    pages = jnp.asarray(pages, jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((len(lens), 8, head_dim)), jnp.bfloat16)
    new = [jnp.asarray(rng.standard_normal((len(lens), 2, head_dim)), jnp.bfloat16) for _ in "kv"]
    scale = head_dim**-0.5
    want = pages.at[1, page, :, offset].set(jnp.concatenate(new, axis=-1))
    exact = jax.jit(partial(reference.paged_attention, layer=1, batch=batch, scale=scale))
    expected = exact(q.astype(jnp.float32), want)
    call = partial(write_and_attend, layer=1, batch=batch, scale=scale, backend=backend)
    run = jax.jit(lambda q, k, v, pages: call(q, k, v, pages, places=places), donate_argnums=3)
    out, got = run(q, *new, pages)
    wrong = int(jnp.count_nonzero(got[:, 1:] != want[:, 1:]))
    error = error_of(out, expected)
    name = f"decode that writes H={head_dim}: error"
    return Finding(name, 1.0 if wrong else error, "<", TOLERANCE)


def attention_inputs(sizes: Sizes, lens: list[tuple[int, int]]) -> tuple[Any, Any, RaggedBatch]:
    """Queries, pages of one layer, and a batch as programs have it: aligned where all decode."""
    batch, num_pages = _batch(lens, sizes.page_size, np.random.default_rng(0))
    batch = replace(batch, aligned=batch.max_query_len == 1)
    shape = (1, num_pages, sizes.num_kv_heads, sizes.page_size, 2 * sizes.head_dim)
    pages = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    num_tokens = sum(n for n, _ in lens)
    shape = (num_tokens, sizes.num_heads, sizes.head_dim)
    return jax.random.normal(jax.random.key(1), shape, jnp.bfloat16), pages, batch


def _decode(backend: str, limits: Limits, sizes: Sizes) -> Iterator[Finding]:
    q, pages, batch = attention_inputs(sizes, [(1, sizes.context)] * sizes.rows)
    attend = partial(paged_attention, layer=0, scale=sizes.head_dim**-0.5, backend=backend)
    run = jax.jit(lambda q, pages, batch: attend(q, pages, batch=batch))
    seconds = seconds_a_call(run, q, pages, batch)
    positions = sizes.rows * sizes.context
    num_bytes = positions * sizes.num_kv_heads * 2 * sizes.head_dim * 2
    share = num_bytes / seconds / limits.copy
    where = f"B={sizes.rows} S={sizes.context}"
    yield Finding(f"decode attention {where}: share of copy bandwidth", share, ">=", 0.85)
    yield Finding(
        f"decode attention {where}: times as fast as JAX's own", _jax_s(sizes, batch) / seconds
    )


def _jax_s(sizes: Sizes, batch: RaggedBatch) -> float:
    """Seconds of JAX's deprecated paged attention on such a batch; NaN where it does not run."""
    try:
        from jax.experimental.pallas.ops.gpu import paged_attention as deprecated

        num_pages = int(batch.page_table.max()) + 1
        shape = (sizes.num_kv_heads, num_pages, sizes.page_size, sizes.head_dim)
        k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))
        q = jnp.ones((sizes.rows, sizes.num_heads, sizes.head_dim), jnp.bfloat16)
        table = batch.page_table[:, : sizes.context // sizes.page_size]
        run = jax.jit(deprecated.paged_attention)
        return seconds_a_call(run, q, k, v, table, batch.context_lens)
    except Exception as error:  # a peer that does not run is no fault of ours
        print(f"gpu_check: JAX's own paged attention does not run: {str(error)[:200]}")
        return float("nan")


def _prefill(backend: str, limits: Limits, sizes: Sizes) -> Finding:
    q, pages, batch = attention_inputs(sizes, [(sizes.prompt, sizes.prompt)])
    attend = partial(paged_attention, layer=0, scale=sizes.head_dim**-0.5, backend=backend)
    run = jax.jit(lambda q, pages, batch: attend(q, pages, batch=batch))
    seconds = seconds_a_call(run, q, pages, batch)
    flops = 4 * sizes.num_heads * sizes.head_dim * sizes.prompt * (sizes.prompt + 1) // 2
    share = flops / seconds / limits.matmul
    return Finding(f"prefill attention {sizes.prompt}: share of matmul peak", share, ">=", 0.6)
