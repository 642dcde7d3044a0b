"""Random adapters for the small checkpoints, and the same checkpoints with one merged in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxserve.formats.peft import Adapter, LoraModule
from jaxserve.formats.peft_config import PeftConfig

Targets = dict[str, tuple[int, int]]


def random_adapter(
    targets: Targets,
    rank: int,
    seed: int,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    ranks: dict[str, int] | None = None,
    rslora: bool = False,
    dtype: type = np.float32,
    scale: float = 0.1,
) -> Adapter:
    """With deltas of some modules.

    Args:
        targets: inputs and outputs of each module of the base.
        wanted: of which modules.
        ranks: other ranks, by the end of a module's name.
        scale: deviation of the matrices.
    """
    rng = np.random.default_rng(seed)
    names = [name for name in targets if wanted(name)]
    config = PeftConfig(
        rank=rank,
        alpha=2.0 * rank,
        rslora=rslora,
        target_modules=tuple(sorted({name.rsplit(".", 1)[-1] for name in names})),
        rank_pattern=ranks or {},
    )
    modules = {}
    for name in names:
        size_in, size_out = targets[name]
        own = config.rank_of(name)
        modules[name] = LoraModule(
            a=(scale * rng.normal(size=(own, size_in))).astype(dtype),
            b=(scale * rng.normal(size=(size_out, own))).astype(dtype),
            scale=config.scale_of(name),
            embedding=name.endswith("embed_tokens"),
        )
    return Adapter(config=config, modules=modules)


def merge(base: Path, adapter: Adapter, target: Path) -> Path:
    """The checkpoint with the adapter's deltas in its weights, and a head apart from its table."""
    config = json.loads((base / "config.json").read_text())
    tensors = {
        name: tensor.astype(np.float32)
        if tensor.dtype in (ml_dtypes.bfloat16, np.float16)
        else tensor
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    tables = [name for name in tensors if name.endswith("embed_tokens.weight")]
    head = tables[0].replace("model.embed_tokens", "lm_head")
    if head not in tensors:  # a delta of the one is none of the other, as in peft
        tensors[head] = tensors[tables[0]].copy()
        config["tie_word_embeddings"] = False
    for name, module in adapter.modules.items():
        delta = module.delta()
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + (
            delta.T if module.embedding else delta
        )
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


def ends_with(*parts: str) -> Callable[[str], bool]:
    """Modules of these last names."""
    return lambda name: name.rsplit(".", 1)[-1] in parts


def all_but(*parts: str) -> Callable[[str], bool]:
    """All others."""
    return lambda name: name.rsplit(".", 1)[-1] not in parts


def cut_to(targets: Targets, layers: Iterable[int]) -> Targets:
    """Targets of these layers only, and those of no layer."""
    kept = {f".{layer}." for layer in layers}
    return {
        name: sizes
        for name, sizes in targets.items()
        if ".layers." not in name or any(part in name for part in kept)
    }
