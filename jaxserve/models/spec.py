"""What an architecture is, as data: sizes and switches that the shared layers are built from.

Made by `Decoder.spec_from_hf` from a checkpoint's config; hashable, without arrays. Whatever in
the config changes the result stands here or was refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.models.rotary import Rope
from jaxserve.types import CacheGroup


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Attention of every layer.

    The checkpoint has num_heads query heads over num_kv_heads; the model holds them in groups, one
    KV head and its queries each, which are what tensor parallelism deals out (see `spread`).

    Attributes:
        num_heads, num_kv_heads, head_dim: N, K, H, of the checkpoint.
        scale: multiplies q·k.
        qkv_bias, output_bias: whether the projections have one.
        qk_norm: RMSNorm over H of each query and key head before the rotary embedding.
        soft_cap: of the scores; None for none.
        kv_copies: groups that each KV head is held in, its queries dealt out between them; those
            that come out short are filled up with query heads of zeros.
        kv_padding: groups of zeros behind the others.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    soft_cap: float | None = None
    kv_copies: int = 1
    kv_padding: int = 0

    @property
    def queries_per_kv(self) -> int:
        """Query heads of one group."""
        return -(-self.num_heads // self.num_kv_heads // self.kv_copies)

    @property
    def held_kv_heads(self) -> int:
        """Groups, those of zeros included: KV heads of the cache."""
        return self.num_kv_heads * self.kv_copies + self.kv_padding

    @property
    def held_heads(self) -> int:
        """Query heads of all groups."""
        return self.held_kv_heads * self.queries_per_kv

    def spread(self, num_shards: int) -> AttentionSpec:
        """The same attention in groups that so many devices share evenly.

        Each KV head is copied as often as makes a device read and hold the fewest KV heads, and
        then work on the fewest query heads; a head of zeros costs as much as any other.
        """
        group = self.num_heads // self.num_kv_heads

        def cost(copies: int) -> tuple[int, int, int]:
            held = -(-self.num_kv_heads * copies // num_shards)
            return held, held * -(-group // copies), copies

        copies = min(range(1, group + 1), key=cost)
        padding = -self.num_kv_heads * copies % num_shards
        return replace(self, kv_copies=copies, kv_padding=padding)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """In what layers of one model differ.

    Attributes:
        rope: its rotary embedding.
        window: sliding window in tokens, itself included; None for full attention.
        sparse: whether its MLP is a mixture of experts, `ModelSpec.moe`.
    """

    rope: Rope
    window: int | None = None
    sparse: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """The mixture of experts of every sparse layer.

    Attributes:
        num_experts: E.
        top_k: A, experts that a token goes to.
        feed_forward: F of one expert.
        norm_topk_prob: whether the weights of a token's experts sum to 1; else they are what the
            router's softmax over all experts gave them.
    """

    num_experts: int
    top_k: int
    feed_forward: int
    norm_topk_prob: bool


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder.

    Attributes:
        architecture: name in HF's config.
        vocab_size: V, number of logits.
        hidden_size: D.
        feed_forward: F of layers that are not sparse.
        max_context: positions the model was made for.
        eos_token_ids: end a sequence; may be empty.
        attention: of all layers.
        layers: kind of each layer, in order.
        activation: of the gated MLP: "silu", "gelu_tanh" or "gelu".
        mlp_bias: whether the MLP's projections have one.
        norm_eps: of all RMS norms.
        tied: whether the output head is the embedding table.
        embed_scale: multiplies the embeddings.
        logit_soft_cap: of the logits; None for none.
        tensor_prefix: what stands before `model.` in this checkpoint's tensor names.
        moe: of the sparse layers; None where there are none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    feed_forward: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    attention: AttentionSpec
    layers: tuple[LayerKind, ...]
    activation: str
    norm_eps: float
    tied: bool
    mlp_bias: bool = False
    embed_scale: float = 1.0
    logit_soft_cap: float | None = None
    tensor_prefix: str = ""
    moe: MoeSpec | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def spread(self, num_shards: int) -> ModelSpec:
        """The same model with its attention heads in groups for so many devices."""
        return replace(self, attention=self.attention.spread(num_shards))

    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Layers by window: full attention first, then each window, ascending."""
        windows = {kind.window for kind in self.layers}
        ordered = [w for w in (None, *sorted(w for w in windows if w is not None)) if w in windows]
        return tuple(
            CacheGroup(
                kind="full" if window is None else "sliding",
                layers=tuple(i for i, kind in enumerate(self.layers) if kind.window == window),
                num_kv_heads=self.attention.held_kv_heads,
                head_dim=self.attention.head_dim,
                window=window,
            )
            for window in ordered
        )


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """How one parameter is made of a checkpoint's tensors.

    Attributes:
        names: HF tensor names.
        shapes: what each of them must have, as HF stores it; to be checked before reading.
        build: from those tensors, in that order, to the parameter's dense, logical array, in the
            dtype of the tensors or float32. `Decoder.encode` turns that into what is held.
        layers: where the parameter is stacked, the rules of its layers, in order; `names` and
            `shapes` are theirs, one behind the other.
        experts: likewise, where it is one matrix of each of a layer's experts.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    build: Callable[[list[np.ndarray]], np.ndarray]
    layers: tuple[TensorRule, ...] = ()
    experts: tuple[TensorRule, ...] = ()
