"""From Hugging Face's tensors to this package's parameters, as data.

Each function gives `TensorRule`s for one layer's parts, keyed by the path inside the layer. HF's
linear weights are [out, in]; here they are [in, *out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from jaxserve.models.spec import AttentionSpec, ModelSpec, TensorRule

Path = tuple[str | int, ...]
Rules = dict[Path, TensorRule]


def norm(name: str, size: int, offset: float = 0.0) -> TensorRule:
    """A norm's scale; Gemma's checkpoints hold scale − 1, so `offset` 1."""

    def build(tensors: list[np.ndarray]) -> np.ndarray:
        return tensors[0].astype(np.float32) + np.float32(offset)

    return TensorRule(names=(name,), shapes=((size,),), build=build)


def table(name: str, spec: ModelSpec) -> TensorRule:
    """The embedding table or the untied head, [V, D] as it is."""
    shape = (spec.vocab_size, spec.hidden_size)
    return TensorRule(names=(name,), shapes=(shape,), build=lambda tensors: tensors[0])


def attention(prefix: str, spec: ModelSpec, norm_offset: float = 0.0) -> Rules:
    """q_proj, k_proj, v_proj, o_proj, and q_norm and k_norm where the spec has them."""
    sizes = spec.attention
    heads, kv_heads = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    names = tuple(f"{prefix}.{part}_proj" for part in "qkv")
    rows = (heads, kv_heads, kv_heads)

    def build_weight(tensors: list[np.ndarray]) -> Float[np.ndarray, "D K G+2 H"]:
        return np.moveaxis(_by_kv_head(tensors, spec), -1, 0)

    def build_bias(tensors: list[np.ndarray]) -> Float[np.ndarray, "K G+2 H"]:
        return _by_kv_head([t[:, None] for t in tensors], spec)[..., 0]

    def build_out(tensors: list[np.ndarray]) -> Float[np.ndarray, "N*H D"]:
        return _queries(tensors[0].T, sizes).reshape(-1, tensors[0].shape[0])

    rules: Rules = {
        ("qkv", "weight"): TensorRule(
            names=tuple(f"{name}.weight" for name in names),
            shapes=tuple((n, spec.hidden_size) for n in rows),
            build=build_weight,
        ),
        ("out", "weight"): TensorRule(
            names=(f"{prefix}.o_proj.weight",),
            shapes=((spec.hidden_size, heads),),
            build=build_out,
        ),
    }
    if sizes.qkv_bias:
        rules["qkv", "bias"] = TensorRule(
            names=tuple(f"{name}.bias" for name in names),
            shapes=tuple((n,) for n in rows),
            build=build_bias,
        )
    if sizes.output_bias:
        rules["out", "bias"] = norm(f"{prefix}.o_proj.bias", spec.hidden_size)
    if sizes.qk_norm:
        for part in "qk":
            name = f"{prefix}.{part}_norm.weight"
            rules[f"{part}_norm", "scale"] = norm(name, sizes.head_dim, norm_offset)
    return rules


def gated_mlp(prefix: str, spec: ModelSpec) -> Rules:
    """gate_proj, up_proj and down_proj."""
    names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
    wide, narrow = spec.feed_forward, spec.hidden_size

    def build_weight(tensors: list[np.ndarray]) -> Float[np.ndarray, "D 2 F"]:
        return np.moveaxis(np.stack(tensors), -1, 0)

    rules: Rules = {
        ("gate_up", "weight"): TensorRule(
            names=tuple(f"{name}.weight" for name in names),
            shapes=((wide, narrow),) * 2,
            build=build_weight,
        ),
        ("down", "weight"): _transposed(f"{prefix}.down_proj.weight", (narrow, wide)),
    }
    if spec.mlp_bias:
        rules["gate_up", "bias"] = TensorRule(
            names=tuple(f"{name}.bias" for name in names), shapes=((wide,),) * 2, build=np.stack
        )
        rules["down", "bias"] = norm(f"{prefix}.down_proj.bias", narrow)
    return rules


def mixture(prefix: str, spec: ModelSpec, names: dict[str, str]) -> Rules:
    """The router, and each expert's gate, up and down, in `names`' words for them."""
    if spec.moe is None:
        raise ValueError(f"{spec.architecture} has no experts")
    experts, wide, narrow = spec.moe.num_experts, spec.moe.feed_forward, spec.hidden_size

    def of_experts(part: str, shape: tuple[int, int]) -> TensorRule:
        each = [
            _transposed(f"{prefix}.experts.{i}.{names[part]}.weight", shape) for i in range(experts)
        ]
        return replace(stacked(each), layers=(), experts=tuple(each))

    return {
        ("router",): _transposed(f"{prefix}.gate.weight", (experts, narrow)),
        ("gate", "weight"): of_experts("gate", (wide, narrow)),
        ("up", "weight"): of_experts("up", (wide, narrow)),
        ("down", "weight"): of_experts("down", (narrow, wide)),
    }


def within(path: Path, rules: Rules) -> Rules:
    """The same rules, a level deeper."""
    return {(*path, *inner): rule for inner, rule in rules.items()}


def stacked(rules: Sequence[TensorRule]) -> TensorRule:
    """One parameter with a leading layer axis, made of the same parameter of several layers.

    Experts of one layer are stacked alike.
    """
    counts = [len(rule.names) for rule in rules]

    def build(tensors: list[np.ndarray]) -> np.ndarray:
        parts, start = [], 0
        for rule, count in zip(rules, counts, strict=True):
            parts.append(rule.build(tensors[start : start + count]))
            start += count
        return np.stack(parts)

    return TensorRule(
        names=tuple(name for rule in rules for name in rule.names),
        shapes=tuple(shape for rule in rules for shape in rule.shapes),
        build=build,
        layers=tuple(rules),
    )


def _transposed(name: str, shape: tuple[int, int]) -> TensorRule:
    return TensorRule(names=(name,), shapes=(shape,), build=lambda tensors: tensors[0].T)


def _by_kv_head(tensors: list[np.ndarray], spec: ModelSpec) -> Float[np.ndarray, "K G+2 H D"]:
    """Query, key and value rows, group by group (`AttentionSpec.spread`)."""
    sizes = spec.attention
    parts = [_queries(tensors[0], sizes)]
    for tensor in tensors[1:]:
        heads = tensor.reshape(sizes.num_kv_heads, 1, sizes.head_dim, -1)
        parts.append(_padded(np.repeat(heads, sizes.kv_copies, axis=0), 0, sizes.held_kv_heads))
    return np.concatenate(parts, axis=1)


def _queries(
    rows: Float[np.ndarray, "N*H D"], sizes: AttentionSpec
) -> Float[np.ndarray, "K G H D"]:
    """Rows of the query heads, group by group, with heads of zeros where a group comes short."""
    heads = rows.reshape(sizes.num_kv_heads, -1, sizes.head_dim, rows.shape[-1])
    heads = _padded(heads, 1, sizes.kv_copies * sizes.queries_per_kv)
    groups = heads.reshape(-1, sizes.queries_per_kv, *heads.shape[2:])
    return _padded(groups, 0, sizes.held_kv_heads)


def _padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """With zeros behind, up to `size` along an axis; the array itself where it is that long."""
    missing = size - array.shape[axis]
    if not missing:
        return array
    shape = (*array.shape[:axis], missing, *array.shape[axis + 1 :])
    return np.concatenate([array, np.zeros(shape, array.dtype)], axis=axis)
