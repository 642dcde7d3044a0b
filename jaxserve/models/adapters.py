"""LoRA adapters in the form in which a model holds them: which modules there are, and their arrays.

A *site* is a place in the model where a delta is added: the matrices of a layer, which may be
several modules fused (q, k and v; gate and up), those of its experts, and the embedding table and
the output head. Slots of adapters come in classes by rank (`LoraConfig`); a class holds, of each
site,

    a  [L, S, P R, K]      b  [L, S, R, *out]      (a layer's site)
    a  [L, S, E, R, K]     b  [L, S, E, R, N]      (one matrix of each of a layer's experts)
    a  [1, S, V, R]        b  [1, S, R, D]         "embed": looked up by token
    a  [1, S, R, D]        b  [1, S, R, V]         "head"

with P the number of fused modules, and `out` as the base's matrix has it, so that devices share
both alike. An adapter's scale is multiplied into b, and smaller ranks are filled up with zeros.

The sites of a slot are written in parts: all layers' at once; those of experts, and of the
vocabulary, only for adapters that have such deltas, and a slot tells which it has.

On the host here, without a device: `AdapterLayout` says what a checkpoint's modules are and turns
a read adapter into arrays; `models.deltas` is what the step does with them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxserve.errors import InvalidAdapter
from jaxserve.formats.peft import Adapter, LoraModule, check_fits
from jaxserve.models.decoder import Decoder
from jaxserve.models.spec import ModelSpec, TensorRule

#: Of a layer: path of the matrix that a site's delta belongs to.
LAYER_SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("attention", "qkv", "weight"),
    "out": ("attention", "out", "weight"),
    "gate_up": ("mlp", "gate_up", "weight"),
    "down": ("mlp", "down", "weight"),
    "router": ("mlp", "router"),
}
#: Likewise, of the matrices that each expert has one of.
EXPERT_SITES: dict[str, tuple[str, ...]] = {
    "expert_gate": ("mlp", "gate", "weight"),
    "expert_up": ("mlp", "up", "weight"),
    "expert_down": ("mlp", "down", "weight"),
}
VOCABULARY_SITES = ("embed", "head")
#: What a slot's sites are written in: "layers" always, the others where an adapter has such.
PARTS: dict[str, tuple[str, ...]] = {
    "layers": tuple(LAYER_SITES),
    "experts": tuple(EXPERT_SITES),
    "vocabulary": VOCABULARY_SITES,
}

#: A site's a and b, as numpy arrays or shapes, without the axis of slots.
SiteArrays = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place of deltas, in all layers.

    Attributes:
        depth: K.
        out: the base's output axes; axes: their logical names, and before them K's.
        rules: of each layer, how the base's matrix is made; None where the layer has no such.
        num_experts: E; 0 where it is no expert's.
    """

    depth: int
    out: tuple[int, ...]
    axes: tuple[str | None, ...]
    rules: tuple[TensorRule | None, ...]
    num_experts: int = 0

    @property
    def num_parts(self) -> int:
        """P."""
        if self.num_experts:
            return 1
        return max(len(rule.names) for rule in self.rules if rule is not None)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a and b, without the axis of slots."""
        lead = (len(self.rules), self.num_experts) if self.num_experts else (len(self.rules),)
        return (*lead, self.num_parts * rank, self.depth), (*lead, rank, *self.out)


class AdapterLayout:
    """The sites of one model.

    Args:
        model: may be abstract.
        vocabulary: whether the table and the head take deltas.
        experts: whether those of a mixture do.

    Attributes:
        sites: of layers and experts, by name.
        targets: of each module that may have a delta, its inputs and outputs (a table's: V and D).
        parts: those of `PARTS` that a slot has.
        settings: as `AdapterBase` has them.
    """

    def __init__(self, model: Decoder, *, vocabulary: bool, experts: bool = False) -> None:
        spec = self._spec = model.spec
        self.vocabulary = vocabulary
        self.experts = experts and spec.moe is not None
        has = {"layers": True, "experts": self.experts, "vocabulary": vocabulary}
        self.parts = tuple(part for part in PARTS if has[part])
        self.settings: dict[str, str] = {}
        if not vocabulary:
            self.settings |= dict.fromkeys(("embed_tokens", "lm_head"), "lora.vocabulary")
        if spec.moe is not None and not experts:
            self.settings["experts"] = "lora.experts"
        self.dtype = jnp.dtype(model.options.activations)
        prefix = f"{spec.tensor_prefix}model"
        layers = [
            type(model).layer_tensors(spec, kind, f"{prefix}.layers.{i}")
            for i, kind in enumerate(spec.layers)
        ]
        shapes = _shapes(spec)
        self.sites: dict[str, Site] = {}
        for name, path in (LAYER_SITES | EXPERT_SITES).items():
            of_experts = name in EXPERT_SITES
            if of_experts and not self.experts:
                continue
            found = (layer.get(path) for layer in layers)
            rules = tuple(
                rule if rule is not None and bool(rule.experts) == of_experts else None
                for rule in found
            )
            if any(rule is not None for rule in rules):
                depth, out, axes = shapes[name]
                count = spec.moe.num_experts if of_experts and spec.moe is not None else 0
                self.sites[name] = Site(
                    depth=depth, out=out, axes=axes, rules=rules, num_experts=count
                )
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
        spec = self._spec
        found: SiteArrays = {name: site.shapes(rank) for name, site in self.sites.items()}
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
        lead = ("layers", "experts") if self.sites[site].num_experts else ("layers",)
        return (*lead, None, into), (*lead, None, *out)

    def num_bytes(self, rank: int, parts: Collection[str] = tuple(PARTS)) -> int:
        """Of one slot of a class.

        Args:
            parts: of `PARTS`, those that count.
        """
        shapes = self.shapes(rank)
        sites = [name for part in parts for name in PARTS[part] if name in shapes]
        elements = sum(math.prod(shape) for name in sites for shape in shapes[name])
        return elements * self.dtype.itemsize

    def parts_of(self, modules: Collection[str]) -> list[str]:
        """Those of `PARTS` that an adapter with these modules has arrays for."""
        has = {
            "layers": True,
            "experts": any(".experts." in name for name in modules),
            "vocabulary": self._embed in modules or self._head in modules,
        }
        return [part for part in self.parts if has[part]]

    def arrays(self, adapter: Adapter, rank: int) -> SiteArrays:
        """An adapter's arrays for a slot of a class; experts' and vocabulary's if it has such.

        Raises:
            InvalidAdapter: it does not fit the model, or its rank the class.
        """
        check_fits(adapter, self.targets, self._embed, self.settings)
        if adapter.rank > rank:
            raise InvalidAdapter(f"the adapter's rank {adapter.rank} is above its class's, {rank}")
        modules = adapter.modules
        found = {
            name: self._site(site, name, modules, rank)
            for name, site in self.sites.items()
            if name not in EXPERT_SITES
        }
        experts = {name: self.sites[name] for name in EXPERT_SITES if name in self.sites}
        if any(_touches(site, modules) for site in experts.values()):
            found |= {name: self._experts(site, modules, rank) for name, site in experts.items()}
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
        a, b = (np.zeros(shape, self.dtype) for shape in site.shapes(rank))
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

    def _experts(
        self, site: Site, modules: Mapping[str, LoraModule], rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Zeros for experts that it has no deltas of."""
        a, b = (np.zeros(shape, self.dtype) for shape in site.shapes(rank))
        for layer, rule in enumerate(site.rules):
            for expert, module in enumerate(_modules(rule) if rule is not None else ()):
                if module in modules:
                    own_a, own_b = _padded(modules[module], rank)
                    a[layer, expert], b[layer, expert] = own_a, own_b.T
        return a, b

    def _cast(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array, self.dtype)


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, tuple[int, ...], tuple[str | None, ...]]]:
    """K, `out` and the axes' names of each site that a layer may have."""
    sizes, size = spec.attention, spec.hidden_size
    heads = (sizes.held_kv_heads, sizes.queries_per_kv + 2, sizes.head_dim)
    found: dict[str, tuple[int, tuple[int, ...], tuple[str | None, ...]]] = {
        "qkv": (size, heads, ("embed", "kv_heads", None, None)),
        "out": (sizes.held_heads * sizes.head_dim, (size,), ("heads", "embed")),
        "gate_up": (size, (2, spec.feed_forward), ("embed", None, "mlp")),
        "down": (spec.feed_forward, (size,), ("mlp", "embed")),
    }
    if spec.moe is not None:
        wide = spec.moe.feed_forward
        found["router"] = size, (spec.moe.num_experts,), ("embed", None)
        found["expert_gate"] = found["expert_up"] = size, (wide,), ("embed", "expert_mlp")
        found["expert_down"] = wide, (size,), ("expert_mlp", "embed")
    return found


def _touches(site: Site, modules: Collection[str]) -> bool:
    """Whether an adapter with these modules has deltas of a site."""
    return any(
        module in modules for rule in site.rules if rule is not None for module in _modules(rule)
    )


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
