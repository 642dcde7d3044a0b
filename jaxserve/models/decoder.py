"""A decoder: embed, layers over the paged cache, final norm; and the output head apart from it.

Every architecture derives from `Decoder` in its own file and adds how its config is read, which
layer it is made of, and which tensors it is loaded from. The forward pass is one function of
tokens, cache and context, for prefill and decode alike, without state of its own.

Layers run unrolled, traced once for each kind through an inner `jax.jit`; or scanned, over
weights stacked along the repeating pattern of kinds (Gemma's local and global layers), with the
cache as the scan's carry, so that it is updated in place. Packed weights and experts are not
scanned over, which would copy each layer's: their kernels get the stack and the layer's place in
it.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxserve.models import deltas as adapters
from jaxserve.models import hf_tensors
from jaxserve.models.context import GroupPages, KVCache, StepContext
from jaxserve.models.deltas import StepDeltas
from jaxserve.models.hf_tensors import Path, Rules
from jaxserve.models.layers import LayerInputs, PreNormLayer, RMSNorm, SandwichLayer
from jaxserve.models.linear import Embedding, encode, table_bytes, weight_bytes
from jaxserve.models.options import ModelOptions
from jaxserve.models.parallel import by_vocabulary
from jaxserve.models.rotary import rotary_table
from jaxserve.models.spec import LayerKind, ModelSpec
from jaxserve.types import CacheGroup
from pallas_kernels.grouped_matmul.traffic import touched_groups

Layer = PreNormLayer | SandwichLayer


@jax.jit
def _run_layer(
    layer: Layer, x: Float[Array, "T D"], pages: GroupPages, inputs: LayerInputs
) -> tuple[Float[Array, "T D"], GroupPages]:
    with jax.named_scope("layer"):
        return layer(x, pages, inputs)


def layer_stacks(spec: ModelSpec, options: ModelOptions) -> tuple[tuple[int, ...], ...]:
    """Which layers each entry of `Decoder.layers` holds.

    One each where unrolled. Where scanned, entries with several layers come first: entry j holds
    layers j, j + p, j + 2p … of a pattern with period p; the rest, if any, are alone.
    """
    num_layers, kinds = spec.num_layers, spec.layers
    period = next(
        p
        for p in range(1, num_layers + 1)
        if all(kinds[i] == kinds[i % p] for i in range(num_layers))
    )
    repeats = num_layers // period
    if options.layers == "unrolled" or repeats == 1:
        return tuple((i,) for i in range(num_layers))
    scanned = repeats * period
    return (
        *(tuple(range(j, scanned, period)) for j in range(period)),
        *((i,) for i in range(scanned, num_layers)),
    )


def _is_whole(path: Any, param: Any) -> bool:
    """Whether a parameter's kernel picks its layer out of the stack itself."""
    if not isinstance(param, nnx.Param):
        return False
    return bool(param.get_metadata("packed")) or bool(param.get_metadata("whole", False))


class Decoder(nnx.Module):
    """Base of all decoders; may be built abstractly, under `nnx.eval_shape`."""

    layer_class: ClassVar[type[Layer]] = PreNormLayer

    def __init__(self, spec: ModelSpec, options: ModelOptions, *, rngs: nnx.Rngs) -> None:
        """Builds it with random weights.

        Args:
            rngs: with a `params` stream (or a default one).
        """
        self.spec = spec
        self.options = options
        self.embed = Embedding(spec.vocab_size, spec.hidden_size, options, rngs)
        self.layers = nnx.List(
            [self._make_layers(indices, rngs) for indices in layer_stacks(spec, options)]
        )
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head = (
            None if spec.tied else Embedding(spec.vocab_size, spec.hidden_size, options, rngs)
        )

    def _make_layers(self, indices: tuple[int, ...], rngs: nnx.Rngs) -> Layer:
        kind = self.spec.layers[indices[0]]
        if len(indices) == 1:
            return self.layer_class(self.spec, kind, self.options, rngs)

        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> Layer:
            return self.layer_class(self.spec, kind, self.options, rngs)

        layers = make(rngs.split(len(indices)))
        for _, param in nnx.iter_graph(layers):
            if isinstance(param, nnx.Param):
                param.set_metadata("axes", ("layers", *param.get_metadata("axes")))
        return layers

    # --- what it is ---

    @classmethod
    def spec_from_hf(cls, config: dict[str, Any]) -> ModelSpec:
        """Reads a Hugging Face config.

        Raises:
            UnsupportedModel: a field is missing, malformed, or asks for what is not implemented.
        """
        raise TypeError(f"{cls.__name__} reads no config: take one of registry.ARCHITECTURES")

    @classmethod
    def layer_tensors(cls, spec: ModelSpec, kind: LayerKind, prefix: str) -> Rules:
        """Rules of one layer of a kind; `prefix` is the layer's in HF's names."""
        raise TypeError(f"{cls.__name__} has no tensors: take one of registry.ARCHITECTURES")

    @classmethod
    def hf_tensors(cls, spec: ModelSpec, options: ModelOptions) -> Rules:
        """How every parameter is made of HF's tensors, by its path in `params`."""
        rules: Rules = {
            ("embed", "table"): hf_tensors.table(
                f"{spec.tensor_prefix}model.embed_tokens.weight", spec
            ),
            ("norm", "scale"): cls.final_norm(spec),
        }
        if not spec.tied:
            rules["head", "table"] = hf_tensors.table(f"{spec.tensor_prefix}lm_head.weight", spec)
        for entry, indices in enumerate(layer_stacks(spec, options)):
            layers = [
                cls.layer_tensors(spec, spec.layers[i], f"{spec.tensor_prefix}model.layers.{i}")
                for i in indices
            ]
            rules |= hf_tensors.within(
                ("layers", entry),
                layers[0]
                if len(layers) == 1
                else {p: hf_tensors.stacked([layer[p] for layer in layers]) for p in layers[0]},
            )
        return rules

    @classmethod
    def final_norm(cls, spec: ModelSpec) -> hf_tensors.TensorRule:
        """Rule of the norm after the last layer."""
        return hf_tensors.norm(f"{spec.tensor_prefix}model.norm.weight", spec.hidden_size)

    def encode(self, path: Path, dense: np.ndarray) -> dict[Path, np.ndarray]:
        """A dense array, as `TensorRule.build` gives it, in the form in which it is held.

        Returns:
            By path, that parameter's array, and those of its scales where it is quantized.

        Raises:
            ValueError: the wrong shape, or values beyond the dtype's range.
            KeyError: the model has no such parameter.
        """
        return encode(self.params(), path, dense)

    def params(self) -> dict[Path, nnx.Param]:
        """Every parameter by its path; abstract ones take their arrays through `set_value`."""
        found = {path: p for path, p in nnx.iter_graph(self) if isinstance(p, nnx.Param)}
        return cast(dict[Path, nnx.Param], found)

    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Layers that share a page table; their order is that of `KVCache.groups`."""
        return self.spec.cache_groups()

    # --- what it does ---

    def __call__(
        self, token_ids: Int[Array, "T"], cache: KVCache, context: StepContext
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """Hidden states after the final norm, and the cache with the tokens' keys and values.

        Args:
            token_ids: anything below the vocabulary size for padding.
        """
        x = self.embed.lookup(token_ids)
        x = adapters.add_embedding(context.deltas, token_ids, x, self.options)
        if self.spec.embed_scale != 1.0:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        head_dim = self.spec.attention.head_dim
        tables = {
            rope: rotary_table(rope, head_dim, context.positions)
            for rope in dict.fromkeys(kind.rope for kind in self.spec.layers)
        }
        groups = self.cache_groups()
        group_of = {i: g for g, group in enumerate(groups) for i in group.layers}

        def run(
            layer: Layer,
            x: Array,
            pages: tuple[GroupPages, ...],
            example: int,
            index: Int[Array, ""],
            number: Int[Array, ""],
            stack_index: Int[Array, ""] | None = None,
        ) -> tuple[Array, tuple[GroupPages, ...]]:
            """Runs layer `number` of the model, of the kind of layer `example`."""
            group = group_of[example]
            inputs = LayerInputs(
                index=index,
                stack_index=stack_index,
                batch=context.batches[group],
                token_pages=context.token_pages[group],
                token_offsets=context.token_offsets,
                rotary=tables[self.spec.layers[example].rope],
                num_live=context.num_live,
                deltas=None if context.deltas is None else context.deltas.at(number),
            )
            x, new = _run_layer(layer, x, pages[group], inputs)
            return x, (*pages[:group], new, *pages[group + 1 :])

        stacks = layer_stacks(self.spec, self.options)
        place = [
            np.array([groups[group_of[i]].layers.index(i) for i in indices], np.int32)
            for indices in stacks
        ]
        numbers = [np.array(indices, np.int32) for indices in stacks]
        period = sum(len(indices) > 1 for indices in stacks)
        pages = cache.groups
        if period:
            parts = [nnx.split(layer, _is_whole, ...) for layer in self.layers[:period]]

            def body(
                carry: tuple[Array, tuple[GroupPages, ...]], block: Any
            ) -> tuple[tuple[Array, tuple[GroupPages, ...]], None]:
                x, pages = carry
                scanned, places, own, repeat = block
                for (kind, whole, _), rest, index, number, indices in zip(
                    parts, scanned, places, own, stacks, strict=False
                ):
                    layer = nnx.merge(kind, whole, rest)
                    x, pages = run(layer, x, pages, indices[0], index, number, repeat)
                return (x, pages), None

            repeats = np.arange(len(stacks[0]), dtype=np.int32)
            block = ([rest for _, _, rest in parts], place[:period], numbers[:period], repeats)
            (x, pages), _ = jax.lax.scan(body, (x, pages), block)
        for entry in range(period, len(stacks)):
            layer, example = self.layers[entry], stacks[entry][0]
            x, pages = run(layer, x, pages, example, place[entry][0], numbers[entry][0])
        return self.norm(x), KVCache(groups=pages)

    @property
    def output_head(self) -> Embedding:
        """What logits are computed with: the embedding table itself where they are tied."""
        return self.embed if self.head is None else self.head

    def logits(
        self,
        hidden: Float[Array, "B D"],
        num_live: Int[Array, ""] | None = None,
        deltas: StepDeltas | None = None,
        slots: Int[Array, "B"] | None = None,
    ) -> Float32[Array, "B V"]:
        """The output head over hidden states that `__call__` returned.

        Args:
            num_live: rows that matter, the first ones; the others may be anything finite.
            deltas: the step's adapters; None in programs without.
            slots: of each row's adapter, where there are deltas.
        """
        with jax.named_scope("logits"):
            logits = by_vocabulary(self.output_head.logits(hidden, num_live), self.options)
            if deltas is not None and slots is not None:
                logits = adapters.add_logits(deltas, slots, hidden, logits, self.options)
            cap = self.spec.logit_soft_cap
            return logits if cap is None else cap * jnp.tanh(logits / cap)

    def count_work(
        self,
        num_tokens: int,
        num_logit_rows: int,
        context_tokens: int,
        *,
        cache_dtype_bytes: int | None = None,
    ) -> tuple[int, int]:
        """Floating-point operations and bytes that one step cannot do without.

        Two operations a multiply-add; matmuls and attention only. Bytes: every weight once (an
        untied embedding by its rows), keys and values read and written. Sliding layers are
        counted up to their window, as if all rows were equally long; of experts, as many as tokens
        touch that pick each of them with equal chances.

        Args:
            num_tokens: live tokens.
            num_logit_rows: rows whose logits are computed.
            context_tokens: sum over rows of the KV length read. Attention is counted as one query
                a row, so a chunk's is undercounted.
            cache_dtype_bytes: of the cache's dtype; the activations' where None.
        """
        spec, sizes = self.spec, self.spec.attention
        if cache_dtype_bytes is None:
            cache_dtype_bytes = jnp.dtype(self.options.activations).itemsize
        table = spec.vocab_size * spec.hidden_size
        width = (2 * sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
        num_sparse = sum(kind.sparse for kind in spec.layers)
        num_dense = spec.num_layers - num_sparse
        matrices = spec.hidden_size * (spec.num_layers * width + num_dense * 3 * spec.feed_forward)
        multiplied, router_bytes, held = matrices, 0, float(matrices)
        if spec.moe is not None:
            router = num_sparse * spec.hidden_size * spec.moe.num_experts
            expert = num_sparse * spec.hidden_size * 3 * spec.moe.feed_forward
            multiplied += router + spec.moe.top_k * expert
            router_bytes = 4 * router
            held += touched_groups(spec.moe.num_experts, num_tokens, spec.moe.top_k) * expert
        rows = max(1, num_logit_rows)
        read = sum(
            context_tokens if kind.window is None else min(context_tokens, rows * kind.window)
            for kind in spec.layers
        )
        flops = 2 * multiplied * num_tokens + 2 * table * num_logit_rows
        flops += 4 * sizes.num_heads * sizes.head_dim * read
        rows_read = table if num_logit_rows else 0
        rows_read += 0 if spec.tied and num_logit_rows else num_tokens * spec.hidden_size
        weights = held * weight_bytes(self.options) + rows_read * table_bytes(self.options)
        weights += router_bytes
        entry = 2 * sizes.num_kv_heads * sizes.head_dim * cache_dtype_bytes
        return flops, round(weights) + entry * (read + spec.num_layers * num_tokens)
