"""LoRA adapters in the form in which a model holds them: which modules there are, and their arrays.

A *site* is a place in the model where a delta is added: the four matrices of a layer, which may be
several modules fused (q, k and v; gate and up), and the embedding table and the output head. Slots
of adapters come in classes by rank (`LoraConfig`); a class holds, of each site,

    a  [L, S, P R, K]      b  [L, S, R, *out]      (a layer's site)
    a  [1, S, V, R]        b  [1, S, R, D]         "embed": looked up by token
    a  [1, S, R, D]        b  [1, S, R, V]         "head"

with P the number of fused modules, and `out` as the base's matrix has it, so that devices share
both alike. An adapter's scale is multiplied into b, and smaller ranks are filled up with zeros.

On the host here, without a device: `AdapterLayout` says what a checkpoint's modules are and turns
a read adapter into arrays; `models.deltas` is what the step does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxserve.errors import InvalidAdapter
from jaxserve.formats.peft import Adapter, LoraModule, check_fits
from jaxserve.models.decoder import Decoder
from jaxserve.models.spec import TensorRule

#: Of a layer: path of the matrix that a site's delta belongs to.
LAYER_SITES: dict[str, tuple[str, str, str]] = {
    "qkv": ("attention", "qkv", "weight"),
    "out": ("attention", "out", "weight"),
    "gate_up": ("mlp", "gate_up", "weight"),
    "down": ("mlp", "down", "weight"),
}
VOCABULARY_SITES = ("embed", "head")

#: A site's a and b, as numpy arrays or shapes, without the axis of slots.
SiteArrays = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place of deltas, in all layers.

    Attributes:
        depth: K.
        out: the base's output axes; axes: their logical names, and before them K's.
        rules: of each layer, how the base's matrix is made; None where the layer has no such.
        modules: of each layer, the fused modules' names.
    """

    depth: int
    out: tuple[int, ...]
    axes: tuple[str | None, ...]
    rules: tuple[TensorRule | None, ...]

    @property
    def num_parts(self) -> int:
        """P."""
        return max(len(rule.names) for rule in self.rules if rule is not None)


class AdapterLayout:
    """The sites of one model.

    Args:
        model: may be abstract.
        vocabulary: whether the table and the head take deltas.

    Attributes:
        sites: of layers, by name.
        targets: of each module that may have a delta, its inputs and outputs (a table's: V and D).
    """

    def __init__(self, model: Decoder, *, vocabulary: bool) -> None:
        spec = self._spec = model.spec
        self.vocabulary = vocabulary
        self.dtype = jnp.dtype(model.options.activations)
        prefix = f"{spec.tensor_prefix}model"
        layers = [
            type(model).layer_tensors(spec, kind, f"{prefix}.layers.{i}")
            for i, kind in enumerate(spec.layers)
        ]
        sizes = spec.attention
        heads = (sizes.held_kv_heads, sizes.queries_per_kv + 2, sizes.head_dim)
        shapes: dict[str, tuple[int, tuple[int, ...], tuple[str | None, ...]]] = {
            "qkv": (spec.hidden_size, heads, ("embed", "kv_heads", None, None)),
            "out": (sizes.held_heads * sizes.head_dim, (spec.hidden_size,), ("heads", "embed")),
            "gate_up": (spec.hidden_size, (2, spec.feed_forward), ("embed", None, "mlp")),
            "down": (spec.feed_forward, (spec.hidden_size,), ("mlp", "embed")),
        }
        self.sites: dict[str, Site] = {}
        for name, path in LAYER_SITES.items():
            found = (layer.get(path) for layer in layers)  # experts take no deltas
            rules = tuple(None if rule is None or rule.experts else rule for rule in found)
            if any(rule is not None for rule in rules):
                depth, out, axes = shapes[name]
                self.sites[name] = Site(depth=depth, out=out, axes=axes, rules=rules)
        self._embed, self._head = f"{prefix}.embed_tokens", f"{spec.tensor_prefix}lm_head"
        self.targets = {
            module: (shape[1], shape[0])
            for site in self.sites.values()
            for rule in site.rules
            if rule is not None
            for module, shape in zip(_modules(rule), rule.shapes, strict=True)
        }
        if vocabulary:
            self.targets[self._embed] = (spec.vocab_size, spec.hidden_size)
            self.targets[self._head] = (spec.hidden_size, spec.vocab_size)

    @property
    def embedding(self) -> str:
        """The table's module name."""
        return self._embed

    def shapes(self, rank: int) -> SiteArrays:
        """Shapes of an adapter's arrays in a class of this rank; vocabulary sites last."""
        layers, spec = self._spec.num_layers, self._spec
        found: SiteArrays = {
            name: (
                (layers, site.num_parts * rank, site.depth),
                (layers, rank, *site.out),
            )
            for name, site in self.sites.items()
        }
        if self.vocabulary:
            size, vocab = spec.hidden_size, spec.vocab_size
            found["embed"] = (1, vocab, rank), (1, rank, size)
            found["head"] = (1, rank, size), (1, rank, vocab)
        return found

    def axes(self, site: str) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """Logical names of the axes of a site's a and b, in `shapes`' order."""
        if site == "embed":
            return (None, None, None), (None, None, "embed")
        if site == "head":
            return (None, None, "embed"), (None, None, "vocab")
        into, *out = self.sites[site].axes
        return ("layers", None, into), ("layers", None, *out)

    def num_bytes(self, rank: int) -> int:
        """Of one slot of a class."""
        elements = sum(int(np.prod(shape)) for pair in self.shapes(rank).values() for shape in pair)
        return elements * self.dtype.itemsize

    def arrays(self, adapter: Adapter, rank: int) -> SiteArrays:
        """An adapter's arrays for a slot of a class; vocabulary sites only if it has them.

        Raises:
            InvalidAdapter: it does not fit the model, or its rank the class.
        """
        check_fits(adapter, self.targets, self._embed)
        if adapter.rank > rank:
            raise InvalidAdapter(f"the adapter's rank {adapter.rank} is above its class's, {rank}")
        modules = adapter.modules
        found = {name: self._site(site, name, modules, rank) for name, site in self.sites.items()}
        if (own := modules.get(self._embed)) is not None:
            a, b = _padded(own, rank)
            found["embed"] = self._cast(a.T[None]), self._cast(b.T[None])
        if (own := modules.get(self._head)) is not None:
            a, b = _padded(own, rank)
            found["head"] = self._cast(a[None]), self._cast(b.T[None])
        return found

    def _site(
        self, site: Site, name: str, modules: Mapping[str, LoraModule], rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layers = len(site.rules)
        a = np.zeros((layers, site.num_parts * rank, site.depth), self.dtype)
        b = np.zeros((layers, rank, *site.out), self.dtype)
        for layer, rule in enumerate(site.rules):
            names = _modules(rule) if rule is not None else ()
            if rule is None or not any(module in modules for module in names):
                continue
            parts = [
                _padded(modules[module], rank)
                if module in modules
                else (
                    np.zeros((rank, shape[1]), np.float32),
                    np.zeros((shape[0], rank), np.float32),
                )
                for module, shape in zip(names, rule.shapes, strict=True)
            ]
            # The base's own way of laying rows out; of `out` it is the inputs that are laid out.
            if name == "out":
                a[layer] = rule.build([parts[0][0]]).T
                b[layer] = parts[0][1].T
            else:
                a[layer] = np.concatenate([part for part, _ in parts])
                b[layer] = rule.build([part for _, part in parts])
        return a, b

    def _cast(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array, self.dtype)


def _modules(rule: TensorRule) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in rule.names)


def _padded(
    module: LoraModule, rank: int
) -> tuple[Float[np.ndarray, "R in"], Float[np.ndarray, "out R"]]:
    """Its matrices at a class's rank, with the scale in b."""
    a = np.zeros((rank, module.a.shape[1]), np.float32)
    b = np.zeros((module.b.shape[0], rank), np.float32)
    a[: module.rank] = module.a
    b[:, : module.rank] = module.b.astype(np.float32) * np.float32(module.scale)
    return a, b
