"""kv_update for TPUs, in Pallas (Mosaic TPU): tiles of pages are read, changed and written back.

Math: pages[layer, token_pages[t], :, token_offsets[t]] = (key[t], value[t]), each in its half.

Shapes: pages [L, P, K, Z, W] in HBM, W a multiple of 128; a tile is the SUBLANES positions of a
    page that lie in the same registers: 8 of float32, 16 of bfloat16, 32 of codes, of all K heads.
    A page of codes has one tile of scales besides, [K, C].

Grid: one step a tile. Tokens whose places follow each other within a tile are a run; runs are
    numbered on the device, and each brings its tile through VMEM once:

        tokens  |a|b|c c c c c c c c c|d|pad      runs: a; b; c to its tile's end; the rest of c; d
        step    HBM tile --> VMEM, where(run's positions, new, old) --> the same HBM tile

    Pallas' pipeline fetches the next tile meanwhile. Steps behind the last run stay on one tile of
    the null page, which is not moved again. Runs of one page follow each other and share its tile
    of scales, which the pipeline then leaves in VMEM: all but the first go on from what is there.

Traffic: each run's tile is read and written, K × SUBLANES × W elements, and the new rows once more
    than that, since XLA lays them out as tiles first; so are scales, K × C a run, read and written
    once a page. See traffic.py for the least.

Numerics: a cast to the pages' dtype, or codes, by `quantize`.

Limits: positions of one tile come together in the token order, and no other row writes to it, as
    in a `RaggedBatch` over pages that rows do not share while they write.

XLA's own scatter is no alternative here: it wants a layout of the pages in which all heads of a
position lie together, the attention kernel one in which a page's positions do, and between the two
XLA copies the whole cache in every layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.errors import UnsupportedKernel
from pallas_kernels.kv_update import xla
from pallas_kernels.quantized_pages import Pages, QuantizedPages, quantize

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
LANES = 128


def unsupported(*, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why it cannot run with such pages; None where it can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"pages are {name}, the kernel takes {', '.join(DTYPES)}"
    return None


def empty_pages(shape: tuple[int, ...], dtype: DTypeLike) -> Pages:
    """Zeros, with scales in whole registers."""
    return xla.empty_pages(shape, dtype, -(-2 * shape[3] // LANES) * LANES)


def kv_update(
    pages: Pages,
    k_new: Float[Array, "T K H"],
    v_new: Float[Array, "T K H"],
    layer: int | Int[Array, ""],
    token_pages: Int[Array, "T"],
    token_offsets: Int[Array, "T"],
    num_rows: int | None = None,
    interpret: Any = False,
) -> Pages:
    """See `api.kv_update`.

    Args:
        interpret: `pltpu.InterpretParams()` where there is no TPU.
    """
    num_tokens = k_new.shape[0]
    sublanes = 32 // pages.dtype.itemsize
    _check(pages, sublanes)
    most = num_tokens
    if num_rows is not None:
        most = max(1, min(num_tokens, num_tokens // sublanes + 2 * num_rows))
    with jax.named_scope("kv_update"):
        starts, lengths, count = _runs(token_pages, token_offsets, sublanes, most)
        offsets = token_offsets[starts] % sublanes
        tokens = starts[:, None] - offsets[:, None] + jnp.arange(sublanes, dtype=jnp.int32)
        tokens = jnp.clip(tokens, 0, num_tokens - 1)
        live = jnp.arange(most, dtype=jnp.int32) < count
        held, new, tiles, new_tiles = zip(*_moved(pages, k_new, v_new, tokens), strict=True)
        num_bytes = sum(x.size * x.dtype.itemsize for x in new)
        kernel = _kernel_of_codes if isinstance(pages, QuantizedPages) else _kernel
        out = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=(most,),
                in_specs=[*new_tiles, *tiles],
                out_specs=list(tiles),
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held],
            input_output_aliases={5 + len(new) + i: i for i in range(len(held))},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=3 * num_bytes),
            interpret=interpret,
            name="kv_update",
        )(
            jnp.asarray(layer, jnp.int32).reshape(1),
            jnp.where(live, token_pages[starts], 0),
            jnp.where(live, token_offsets[starts] // sublanes, 0),
            offsets,
            lengths,
            *new,
            *held,
        )
        if isinstance(pages, QuantizedPages):
            codes, scales = out
            return QuantizedPages(codes, scales, pages.kind)
        return out[0]


def _check(pages: Pages, sublanes: int) -> None:
    *_, page_size, width = pages.shape
    if width % LANES or page_size % sublanes:
        raise UnsupportedKernel(
            f"kv_update backend='tpu': pages {pages.shape} of {pages.dtype}: rows must be a "
            f"multiple of {LANES} (use page_width), pages of {sublanes} positions"
        )
    if isinstance(pages, QuantizedPages) and pages.scales.shape[-1] % LANES:
        raise UnsupportedKernel(
            f"kv_update backend='tpu': scales {pages.scales.shape}: rows must be a multiple of "
            f"{LANES} (use scales_width)"
        )


def _moved(
    pages: Pages,
    k_new: Num[Array, "T K H"],
    v_new: Num[Array, "T K H"],
    tokens: Int[Array, "X Y"],
) -> list[tuple[Array, Array, pl.BlockSpec, pl.BlockSpec]]:
    """Of each array of the pages: itself, each run's new tile, and the blocks of both.

    Args:
        tokens: of each run, those at the positions of its tile.
    """
    if not isinstance(pages, QuantizedPages):
        _, _, heads, _, width = pages.shape
        tile = heads, tokens.shape[1], width
        spec = pl.BlockSpec(
            (None, None, *tile), lambda i, layer, page, part, *_: (layer[0], page[i], 0, part[i], 0)
        )
        new_spec = pl.BlockSpec((None, *tile), lambda i, *_: (i, 0, 0, 0))
        return [(pages, _tiles(k_new[tokens], v_new[tokens], pages), spec, new_spec)]
    (k_new, k_scale), (v_new, v_scale) = (quantize(x, pages.kind) for x in (k_new, v_new))
    _, _, heads, width = pages.scales.shape
    spec = pl.BlockSpec(
        (None, None, heads, width), lambda i, layer, page, *_: (layer[0], page[i], 0, 0)
    )
    new_spec = pl.BlockSpec((None, heads, width), lambda i, *_: (i, 0, 0))
    scales = _scales_of_runs(k_scale[tokens], v_scale[tokens], pages.shape[3], width)
    return [*_moved(pages.codes, k_new, v_new, tokens), (pages.scales, scales, spec, new_spec)]


def _tiles(k_new: Num[Array, "X Y K H"], v_new: Num[Array, "X Y K H"], pages: Array) -> Array:
    """A run's keys and values as they lie in a page, [X, K, Y, W], Y positions of a tile."""
    unused = ((0, 0),) * 3 + ((0, pages.shape[-1] // 2 - k_new.shape[-1]),)
    halves = [jnp.pad(half.astype(pages.dtype), unused) for half in (k_new, v_new)]
    return jnp.swapaxes(jnp.concatenate(halves, axis=-1), 1, 2)


def _scales_of_runs(
    k_scale: Float[Array, "X Y K"], v_scale: Float[Array, "X Y K"], page_size: int, width: int
) -> Float[Array, "X K C"]:
    """Each run's scales in every part of a row: the kernel takes the part that the tile is."""
    repeats = page_size // k_scale.shape[1]
    unused = ((0, 0), (0, 0), (0, width // 2 - page_size))
    halves = [
        jnp.pad(jnp.tile(jnp.swapaxes(scale, 1, 2), repeats), unused)
        for scale in (k_scale, v_scale)
    ]
    return jnp.concatenate(halves, axis=-1)


def _runs(
    token_pages: Int[Array, "T"], token_offsets: Int[Array, "T"], sublanes: int, most: int
) -> tuple[Int[Array, "X"], Int[Array, "X"], Int[Array, ""]]:
    """First token and length of each run within a tile, and how many runs there are.

    Args:
        most: X; more runs there must not be.
    """
    num_tokens = token_pages.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    is_live = token_pages > 0
    follows = (token_pages == jnp.roll(token_pages, 1)) & (
        token_offsets == jnp.roll(token_offsets, 1) + 1
    )
    is_first = is_live & ~(follows & (token > 0) & (token_offsets % sublanes > 0))
    run = jnp.cumsum(is_first) - 1
    place = jnp.where(is_first, run, most)
    starts = jnp.zeros(most, jnp.int32).at[place].set(token, mode="drop")
    lengths = jnp.zeros(most, jnp.int32).at[jnp.where(is_live, run, most)].add(1, mode="drop")
    return starts, lengths, run[-1] + 1


def _kernel(layer, page, part, offsets, lengths, new_ref, old_ref, out_ref) -> None:
    index = pl.program_id(0)
    first = offsets[index]
    position = lax.broadcasted_iota(jnp.int32, old_ref.shape, 1)
    is_new = (position >= first) & (position < first + lengths[index])
    out_ref[...] = jnp.where(is_new, new_ref[...], old_ref[...])


def _kernel_of_codes(
    layer, page, part, offsets, lengths,
    new_ref, new_scales_ref, old_ref, old_scales_ref, out_ref, out_scales_ref,
) -> None:  # fmt: skip
    _kernel(layer, page, part, offsets, lengths, new_ref, old_ref, out_ref)
    index = pl.program_id(0)

    @pl.when((index == 0) | (page[index] != page[jnp.maximum(index - 1, 0)]))
    def _() -> None:
        out_scales_ref[...] = old_scales_ref[...]

    lane = lax.broadcasted_iota(jnp.int32, out_scales_ref.shape, 1)
    middle = out_scales_ref.shape[1] // 2
    position = jnp.where(lane < middle, lane, lane - middle)
    first = part[index] * old_ref.shape[1] + offsets[index]
    is_new = (position >= first) & (position < first + lengths[index])
    out_scales_ref[...] = jnp.where(is_new, new_scales_ref[...], out_scales_ref[...])
