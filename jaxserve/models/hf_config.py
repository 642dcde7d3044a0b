"""Reading a Hugging Face config: typed fields, and a refusal for what would change the result.

Absent and null fields take transformers' default for the architecture, given by the caller.
"""

from __future__ import annotations

import math
from typing import Any

from jaxserve.errors import UnsupportedModel
from jaxserve.models.rotary import Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_ROPE_TYPES = ("default", "linear", "llama3")


class HfConfig:
    """A config's fields.

    All methods raise UnsupportedModel, naming the field, its value and what is taken instead.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number, at least `least`."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UnsupportedModel(
                f"config: {name}={value!r} must be a whole number, at least {least}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModel(f"config: {name}={value!r} must be a number")
        if not (math.isfinite(value) and value > 0):
            raise UnsupportedModel(f"config: {name}={value!r} must be positive and finite")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """As `number`; None where absent or null."""
        return self.number(name) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config: {name}={value!r} must be true or false")
        return value

    def activation(self, name: str, default: str) -> str:
        """An activation function, in this package's word for it."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnsupportedModel(
                f"config: {name}={value!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def head_dim(self, default: int) -> int:
        """`head_dim`, which the rotary embedding splits into pairs."""
        value = self.count("head_dim", default)
        if value % 2:
            raise UnsupportedModel(f"config: head_dim={value} must be even")
        return value

    def refuse(self, name: str, *accepted: object) -> None:
        """Refuses any value but null and `accepted`."""
        value = self.fields.get(name)
        if value is not None and value not in accepted:
            remedy = f"only {', '.join(map(repr, accepted))}" if accepted else "leave it out"
            raise UnsupportedModel(f"config: {name}={value!r} is not supported, {remedy}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of them, or none."""
        value = self.fields.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise UnsupportedModel(f"config: {name}={value!r} must be token ids")
        return tuple(dict.fromkeys(ids))

    def layer_types(self, num_layers: int) -> tuple[str, ...] | None:
        """`layer_types`, checked; None where absent."""
        value = self.fields.get("layer_types")
        if value is None:
            return None
        known = ("full_attention", "sliding_attention")
        if not isinstance(value, list) or len(value) != num_layers:
            raise UnsupportedModel(f"config: layer_types={value!r} must name {num_layers} layers")
        for layer_type in value:
            if layer_type not in known:
                raise UnsupportedModel(
                    f"config: layer_types has {layer_type!r}; supported: {', '.join(known)}"
                )
        return tuple(value)

    def rope(self, default_theta: float, *, layer_type: str = "") -> Rope:
        """The rotary embedding.

        Transformers 5 writes `rope_parameters` (for each layer type, where there are several);
        before that there were `rope_theta` and `rope_scaling`. Both are read.

        Args:
            layer_type: which entry of `rope_parameters` is meant, where it is nested.
        """
        self.refuse("partial_rotary_factor", 1.0)
        theta = self.number("rope_theta", default_theta)
        name = "rope_parameters" if self.has("rope_parameters") else "rope_scaling"
        value = self.fields.get(name)
        if isinstance(value, dict) and isinstance(value.get("full_attention"), dict):
            name, value = (
                f"{name}.{layer_type or 'full_attention'}",
                value.get(layer_type or "full_attention", {}),
            )
        return rope_from(name, value or {}, theta, self.fields)

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModel(f"config: {name} is missing")
        return value


def rope_from(name: str, value: Any, theta: float, fields: dict[str, Any]) -> Rope:
    """A `Rope` from one dict of rotary parameters.

    Args:
        name: of the field, for messages.
        theta: the base, where `value` has none.

    Raises:
        UnsupportedModel: a scaling that is not implemented, or one that lacks a parameter.
    """
    if not isinstance(value, dict):
        raise UnsupportedModel(f"config: {name}={value!r} must be a mapping")
    scaling = value.get("rope_type", value.get("type", "default"))
    if scaling not in _ROPE_TYPES:
        raise UnsupportedModel(
            f"config: {name} of type {scaling!r} is not supported; "
            f"supported: {', '.join(_ROPE_TYPES)}"
        )
    inner = HfConfig({f"{name}.{key}": item for key, item in value.items()})
    inner.refuse(f"{name}.partial_rotary_factor", 1.0)
    inner.refuse(f"{name}.mrope_section")
    theta = inner.number(f"{name}.rope_theta", theta)
    if scaling == "default":
        return Rope(theta=theta)
    factor = inner.number(f"{name}.factor")
    if scaling == "linear":
        return Rope(theta=theta, scaling=scaling, factor=factor)
    low = inner.number(f"{name}.low_freq_factor")
    high = inner.number(f"{name}.high_freq_factor")
    if high <= low:
        raise UnsupportedModel(
            f"config: {name}.high_freq_factor={high} must be above low_freq_factor={low}"
        )
    return Rope(
        theta=theta,
        scaling=scaling,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=inner.count(
            f"{name}.original_max_position_embeddings", fields.get("max_position_embeddings")
        ),
    )
