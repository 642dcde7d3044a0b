"""Runs embedding steps on the device: compiles every program, launches, reads back.

The model is an encoder, or the decoder that generates: its own layers then run over a scratch
cache that lives within the step, each sequence on pages of its own, so that it needs nothing of the
engine's cache. Sequences are pooled on the device: a vector a text comes back.

Owned by the engine's thread; its calls stand in line with the other steps' on the device. On one
device, whatever the mesh is: an encoder is small.

Invariant: after `warm_up` nothing is compiled any more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxserve.device.clock import DeviceClock
from jaxserve.device.embed_step import (
    EmbedBuckets,
    EmbedInput,
    EmbedInputs,
    EmbedOutputs,
    EmbedProgram,
    pack,
    packed_size,
)
from jaxserve.models.bert import Encoder
from jaxserve.models.context import GroupPages, KVCache, StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.models.pooling import pool, token_rows
from pallas_kernels.kv_update import empty_pages, page_width
from pallas_kernels.ragged import NULL_PAGE, RaggedBatch

logger = logging.getLogger(__name__)

#: Told how far warming up is: "compiling", programs done, of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LaunchedEmbed:
    """A step that runs: its vectors, which may not be there yet."""

    inputs: EmbedInputs
    vectors: Float32[Array, "R D"]
    launched_ns: int


class Embedder:
    """One model that embeds.

    Args:
        model: loaded, on one device.
        buckets: the programs to compile.
        page_size: tokens a page of a decoder's scratch cache.
        clock: of the device, where others launch calls on it too.
    """

    def __init__(
        self,
        model: Encoder | Decoder,
        buckets: EmbedBuckets,
        page_size: int = 16,
        clock: DeviceClock | None = None,
    ) -> None:
        self.buckets = buckets
        self._model = model
        self._params, self._structure = jax.tree.flatten(model)
        self._page_size = page_size
        self._compiled: dict[EmbedProgram, Callable[..., Float32[Array, "R D"]]] = {}
        self._clock = clock or DeviceClock()

    def warm_up(self, progress: Progress, threads: int = 0) -> None:
        """Compiles all programs, in threads, and runs each once without rows.

        Args:
            progress: told "compiling", programs done, of how many.
            threads: 0 takes the cores.
        """
        start = time.monotonic()
        programs = sorted(
            self.buckets.programs, reverse=True
        )  # longest first: threads end together
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, "jaxserve compile") as pool:
            futures = {pool.submit(self._compile, program): program for program in programs}
            for done, future in enumerate(as_completed(futures), 1):
                self._compiled[futures[future]] = future.result()
                progress("compiling", done, len(programs))
        for program in programs:
            self.collect(self._launch(pack(program, [])))
        logger.info(
            "%d embedding programs ready after %.1f s", len(programs), time.monotonic() - start
        )

    def launch(self, texts: Sequence[EmbedInput]) -> LaunchedEmbed:
        """Starts a step of texts that one program holds (`buckets.fit`); does not wait for it."""
        program = self.buckets.choose([len(text.token_ids) for text in texts])
        return self._launch(pack(program, texts))

    def collect(self, launched: LaunchedEmbed) -> EmbedOutputs:
        """Waits for a step's vectors."""
        vectors = np.asarray(launched.vectors)
        device_ns, idle_ns = self._clock.collected(launched.launched_ns)
        live = vectors[: len(launched.inputs.lengths)]
        return EmbedOutputs(vectors=live, device_ns=device_ns, idle_ns=idle_ns)

    def count_work(self, lengths: Sequence[int]) -> tuple[int, int]:
        """FLOPs and bytes of texts of such lengths, counted from shapes."""
        if isinstance(self._model, Encoder):
            return self._model.count_work(lengths)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return self._model.count_work(sum(lengths), 0, pairs)

    def _launch(self, inputs: EmbedInputs) -> LaunchedEmbed:
        launched_ns = time.monotonic_ns()
        vectors = self._compiled[inputs.program](self._params, inputs.packed)
        return LaunchedEmbed(inputs, vectors, launched_ns)

    def _compile(self, program: EmbedProgram) -> Callable[..., Float32[Array, "R D"]]:
        step = make_embed(self._structure, program, self._page_size)
        packed = jax.ShapeDtypeStruct((packed_size(program),), np.int32)
        return jax.jit(step).lower(self._params, packed).compile()


def make_embed(
    structure: Any, program: EmbedProgram, page_size: int
) -> Callable[[list[Array], Int[Array, "X"]], Float32[Array, "R D"]]:
    """The step of one program: parameters and `EmbedInputs.packed` to a vector (or score) a row.

    Args:
        structure: the PyTreeDef of the model, whose leaves are the step's first argument.
    """
    num_tokens, num_rows = program.num_tokens, program.num_rows

    def embed(params: list[Array], packed: Int[Array, "X"]) -> Float32[Array, "R D"]:
        model: Encoder | Decoder = jax.tree.unflatten(structure, params)
        token_ids = packed[:num_tokens]
        starts = packed[num_tokens : num_tokens + num_rows + 1]
        seconds, codes = packed[num_tokens + num_rows + 1 :].reshape(2, num_rows)
        if isinstance(model, Decoder):
            hidden = decoder_states(model, token_ids, starts, program.max_len, page_size)
            return pool(hidden, starts, codes)
        rows = jnp.minimum(token_rows(starts, num_tokens), num_rows - 1)
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        positions = jnp.where(tokens < starts[-1], tokens - starts[rows], 0)
        types = (positions >= seconds[rows]).astype(jnp.int32)
        hidden = model(token_ids, positions, types, starts, program.max_len)
        vectors = pool(hidden, starts, codes)
        return vectors if model.head is None else model.head(vectors.astype(hidden.dtype))

    return embed


def decoder_states(
    model: Decoder,
    token_ids: Int[Array, "T"],
    starts: Int[Array, "R+1"],
    max_len: int,
    page_size: int,
) -> Float[Array, "T D"]:
    """A decoder's hidden states of whole sequences, over pages that are forgotten afterwards."""
    num_tokens, num_rows = token_ids.shape[0], starts.shape[0] - 1
    lengths = starts[1:] - starts[:-1]
    held = -(-lengths // page_size)
    first = 1 + jnp.cumsum(held) - held
    index = jnp.arange(-(-max_len // page_size), dtype=jnp.int32)
    table = jnp.where(index < held[:, None], first[:, None] + index, NULL_PAGE)
    batch = RaggedBatch(
        page_table=table.astype(jnp.int32),
        query_starts=starts,
        context_lens=lengths,
        max_query_len=max_len,
    )
    num_pages, backend = 1 + num_tokens // page_size + num_rows, model.options.attention
    pages = []
    for group in model.cache_groups():
        width = page_width(group.head_dim, backend)
        shape = (len(group.layers), num_pages, group.num_kv_heads, page_size, width)
        empty = empty_pages(shape, jnp.dtype(model.options.activations), backend=backend)
        pages.append(GroupPages(kv=empty))
    context = StepContext.build((batch,) * len(pages), num_tokens, page_size)
    hidden, _ = model(token_ids, KVCache(groups=tuple(pages)), context)
    return hidden
