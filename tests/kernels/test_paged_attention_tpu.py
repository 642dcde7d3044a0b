"""The TPU kernels against the reference, interpreted on the host.

`InterpretParams` simulates the chip's memories and copies: a copy happens when it is waited for,
and memory that nobody wrote is NaN, so that a missing wait shows.
"""

from __future__ import annotations

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import UnsupportedKernel
from pallas_kernels.kv_update import page_width, scales_width
from pallas_kernels.paged_attention import reference, tpu, tpu_block
from pallas_kernels.quantized_pages import values, widened
from tests.kernels.batches import Case, relative_error

#: By the pages' dtype; codes are multiplied in bfloat16.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-2, "float8_e4m3fn": 1e-2}
CODES = ("int8", "float8_e4m3fn")
MIXED = [(1, 33), (19, 50), (0, 0), (70, 90), (1, 130), (2, 2)]
DECODE = [(1, 7), (1, 1), (0, 0), (1, 130), (1, 16), (0, 40), (1, 300)]


def attend(case: Case, interpret: Any, layer: int = 1) -> tuple[jax.Array, jax.Array]:
    """The kernel's output and the reference's."""
    arrays = case.arrays(secrets.randbits(32))
    expected = reference.paged_attention(layer=layer, **arrays, **case.options)
    out = tpu.paged_attention(layer=layer, **arrays, **case.options, interpret=interpret)
    return out, expected


def check(case: Case, interpret: Any) -> None:
    out, expected = attend(case, interpret)
    live = sum(query_len for query_len, _ in case.lens)
    assert out.shape == expected.shape
    assert np.isfinite(np.asarray(out[:live])).all()
    assert not np.asarray(out)[live:].any(), "padding is not zero"
    assert relative_error(out[:live], expected[:live]) < TOLERANCES[case.dtype]


def wide(head_dim: int, **options: Any) -> Case:
    """A case whose pages are as wide as a TPU's."""
    unused = page_width(head_dim, "tpu") // 2 - head_dim
    page_size = options.pop("page_size", 32 if options.get("dtype") in CODES else 16)
    return Case(
        head_dim=head_dim, page_size=page_size, unused=unused, unused_value=0.0,
        scales_width=scales_width(page_size, "tpu"), **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lens", [DECODE, MIXED])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (40, 5.0)])
def test_matches_reference_with_simulated_copies(
    lens: list[tuple[int, int]], window: int | None, soft_cap: float | None
) -> None:
    case = wide(64, lens=lens, num_heads=4, num_kv_heads=2, window=window, soft_cap=soft_cap)
    check(case, pltpu.InterpretParams(dma_execution_mode="on_wait"))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 1), (9, 3)])
def test_heads(head_dim: int, num_heads: int, num_kv_heads: int) -> None:
    lens = [(1, 40), (19, 50), (1, 3)]
    check(wide(head_dim, lens=lens, num_heads=num_heads, num_kv_heads=num_kv_heads), True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [16, 32])
def test_pages(dtype: str, page_size: int) -> None:
    case = wide(64, lens=MIXED, dtype=dtype, page_size=page_size, window=50, padding=3)
    check(case, True)
    check(wide(128, lens=DECODE, num_heads=8, num_kv_heads=2, dtype=dtype), True)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("lens", [DECODE, MIXED])
def test_codes(dtype: str, lens: list[tuple[int, int]]) -> None:
    check(wide(64, lens=lens, dtype=dtype, padding=3), True)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("lens", [DECODE, MIXED])
def test_codes_in_a_window(dtype: str, lens: list[tuple[int, int]]) -> None:
    case = wide(
        128, lens=lens, dtype=dtype, page_size=96, num_heads=4, num_kv_heads=2, window=40,
        soft_cap=5.0,
    )  # fmt: skip
    check(case, True)


@pytest.mark.slow
def test_codes_with_simulated_copies() -> None:
    case = wide(64, lens=MIXED, num_heads=4, num_kv_heads=2, dtype="float8_e4m3fn")
    check(case, pltpu.InterpretParams(dma_execution_mode="on_wait"))


@pytest.mark.parametrize("dtype", CODES)
def test_every_code_is_widened_as_it_is(dtype: str) -> None:
    codes = jnp.arange(-128, 128, dtype=jnp.int8)
    expected = np.asarray(values(codes, dtype))
    is_number = np.isfinite(expected)  # of 256 bits, two are no number in float8_e4m3fn
    ours = np.asarray(widened(codes, dtype), np.float32)
    assert np.isfinite(ours).all(), "what nobody wrote is no number, and 0 times it neither"
    np.testing.assert_array_equal(ours[is_number], expected[is_number])
    assert is_number.sum() == (256 if dtype == "int8" else 254)


@pytest.mark.parametrize("lens", [DECODE, MIXED])
def test_sinks(lens: list[tuple[int, int]]) -> None:
    check(wide(64, lens=lens, sinks=True, padding=3), True)
    check(wide(128, lens=lens, sinks=True, num_heads=8, num_kv_heads=2, window=50), True)


def test_nobody_lives() -> None:
    check(wide(64, lens=[(0, 0), (0, 30)], padding=2), True)


@pytest.mark.parametrize("window", [None, 100])
def test_contexts_beyond_int16(window: int | None) -> None:
    case = wide(
        64, lens=[(1, 40_001), (3, 33_000)], num_heads=2, num_kv_heads=1, window=window,
        page_size=256, num_layers=2,
    )  # fmt: skip
    check(case, True)


@pytest.mark.slow
@pytest.mark.parametrize("lens", [[(1, 300), (1, 40)], [(40, 300)]])
@pytest.mark.parametrize(("dtype", "missing"), [("float32", 0), ("int8", 0), ("int8", 1)])
def test_a_missing_wait_is_seen(
    lens: list[tuple[int, int]], dtype: str, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation is worth something: without one wait the result is wrong.

    Of pages of codes the first copy brings codes, the second their scales.
    """

    class Impatient:
        """A copy that nobody waits for."""

        def __init__(self, copy: Any) -> None:
            self.start = copy.start
            self.wait = lambda: None

    copies = tpu_block.Block.copies

    def impatient(self: Any, *place: Any) -> list[Any]:
        found = copies(self, *place)
        found[missing] = Impatient(found[missing])
        return found

    case = wide(64, lens=lens, num_heads=4, num_kv_heads=2, dtype=dtype)
    interpret = pltpu.InterpretParams(dma_execution_mode="on_wait")
    check(case, interpret)
    monkeypatch.setattr(tpu_block.Block, "copies", impatient)
    out, expected = attend(case, interpret)
    assert not relative_error(out, expected) < 1e-2


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    def run(case: Case) -> Any:
        return attend(case, True)

    with pytest.raises(UnsupportedKernel, match="no multiple of 128: use page_width"):
        run(Case(lens=[(1, 3)], head_dim=80))
    with pytest.raises(UnsupportedKernel, match="give a multiple of 16"):
        run(wide(64, lens=[(1, 3)], page_size=8, dtype="bfloat16"))
    with pytest.raises(UnsupportedKernel, match="give a multiple of 32"):
        run(wide(64, lens=[(1, 3)], page_size=16, dtype="int8"))
    with pytest.raises(UnsupportedKernel, match="no multiple of 128: use scales_width"):
        run(Case(lens=[(1, 3)], page_size=32, dtype="int8"))
    reason = tpu.unsupported(head_dim=64, dtype=jnp.float16)
    assert reason is not None and "float16" in reason
    case = wide(64, lens=[(1, 3)])
    arrays = case.arrays(0)
    table = jnp.zeros((1, tpu.MAX_TABLE_ENTRIES + 1), jnp.int32)
    batch = arrays["batch"]
    arrays["batch"] = type(batch)(
        page_table=table, query_starts=batch.query_starts, context_lens=batch.context_lens,
        max_query_len=1,
    )  # fmt: skip
    with pytest.raises(UnsupportedKernel, match="lower max_rows or max_context"):
        tpu.paged_attention(layer=0, **arrays, **case.options, interpret=True)
