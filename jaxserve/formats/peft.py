"""LoRA adapters in the files of the `peft` library: read, written, and hashed. Without JAX.

An adapter is a directory with adapter_config.json (`peft_config`) and adapter_model.safetensors.
A module's delta is scale · B·A, in the base's own names without peft's prefix:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [R, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [out, R]
    base_model.model.model.embed_tokens.lora_embedding_A             [R, V]
    base_model.model.model.embed_tokens.lora_embedding_B             [D, R]

    adapter = read_adapter(Path("my-adapter"), max_rank=128)
    adapter.modules["model.layers.0.self_attn.q_proj"].a             # [R, in], as stored
    write_adapter(Path("copy"), adapter)

Invariant: an adapter that was read is whole and finite: each module has both matrices, of the rank
that its config says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxserve.errors import InvalidAdapter, WeightsError
from jaxserve.formats.peft_config import CONFIG_FILE, PeftConfig, read_config
from jaxserve.formats.safetensors import SafetensorsFile, write_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_ENDINGS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
#: Where a table or head takes a delta, peft saves both themselves too, though they are the base's.
_FROZEN = re.compile(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$")
_DTYPES = ("float32", "float16", "bfloat16")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """The delta of one module's weight: scale · b @ a.

    Attributes:
        a, b: as stored; float32, float16 or bfloat16.
        embedding: it belongs to an embedding table: `in` is the vocabulary.
    """

    a: Float[np.ndarray, "R in"]
    b: Float[np.ndarray, "out R"]
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def delta(self) -> Float[np.ndarray, "out in"]:
        """What merging adds to the module's weight (to an embedding's, transposed)."""
        return np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter's config, and its deltas by module name ("model.layers.0.self_attn.q_proj")."""

    config: PeftConfig
    modules: Mapping[str, LoraModule]

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        return max(module.rank for module in self.modules.values())

    @property
    def num_bytes(self) -> int:
        """Of its matrices, as stored."""
        return sum(module.a.nbytes + module.b.nbytes for module in self.modules.values())


def read_adapter(directory: Path, *, max_rank: int) -> Adapter:
    """Reads and checks an adapter. Its arrays are views of the mapped file.

    Raises:
        InvalidAdapter: a file is missing, cut off or malformed; a module lacks a matrix, has more
            than `max_rank`, a rank that the config does not say, or values that are not finite;
            the config targets what the file does not hold, or asks for what is not done.
    """
    config, file = _open(directory)
    path = directory / WEIGHTS_FILE
    found: dict[str, dict[str, str]] = {}
    embeddings, frozen = set(), []
    for name in sorted(file.names()):
        place = _place(name)
        if place is None:
            frozen.append(name)
            continue
        module, part, embedding = place
        found.setdefault(module, {})[part] = name
        if embedding:
            embeddings.add(module)
    if not found:
        raise InvalidAdapter(f"{path} holds no LoRA matrices")
    modules = {
        module: _module(file, module, parts, config, max_rank, module in embeddings)
        for module, parts in found.items()
    }
    _check_targets(config, modules)
    _check_frozen({name: file.shape(name) for name in frozen}, modules)
    return Adapter(config=config, modules=modules)


def read_ranks(directory: Path) -> dict[str, int]:
    """The rank that an adapter's config says of each module; reads no matrices.

    Raises:
        InvalidAdapter: as `read_adapter`, as far as that shows.
    """
    config, file = _open(directory)
    places = (_place(name) for name in file.names())
    ranks = {place[0]: config.rank_of(place[0]) for place in places if place is not None}
    if not ranks:
        raise InvalidAdapter(f"{directory / WEIGHTS_FILE} holds no LoRA matrices")
    return ranks


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Writes an adapter as peft does; the directory is made.

    Raises:
        ValueError: a module's rank or scale is not what the config says.
        OSError: it cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, module in adapter.modules.items():
        said = adapter.config.rank_of(name), adapter.config.scale_of(name)
        if said != (module.rank, module.scale):
            raise ValueError(
                f"{name} has rank {module.rank} and scale {module.scale}, its config says {said}"
            )
        for ending, (part, embedding) in _ENDINGS.items():
            if embedding == module.embedding:
                tensors[f"{PREFIX}{name}{ending}"] = module.a if part == "a" else module.b
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS_FILE, tensors, {"format": "pt"})
    (directory / CONFIG_FILE).write_text(adapter.config.to_json(), encoding="utf-8")


def adapter_digest(directory: Path) -> str:
    """Hash of an adapter's two files: what its weights, and the KV made with them, are known by.

    Raises:
        InvalidAdapter: a file cannot be read.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = directory / name
        try:
            with path.open("rb") as file:
                digest.update(b"%d " % path.stat().st_size)
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise InvalidAdapter(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()[:32]


def check_fits(
    adapter: Adapter,
    targets: Mapping[str, tuple[int, int]],
    embedding: str,
    settings: Mapping[str, str],
) -> None:
    """Refuses an adapter for another base.

    Args:
        targets: of each module that may take a delta, its inputs and outputs.
        embedding: which of them is the table.
        settings: by a part of a module's name, the setting without which it takes no delta.

    Raises:
        InvalidAdapter: it has modules that the base has not, or of other shapes.
    """
    for name, module in adapter.modules.items():
        if name not in targets:
            last = sorted({target.rsplit(".", 1)[-1] for target in targets})
            wanted = next((settings[part] for part in name.split(".") if part in settings), None)
            raise InvalidAdapter(
                f"the base model has no module {name!r:.200} that takes a delta; {', '.join(last)} "
                "do" + (f", and others with {wanted}=true" if wanted else "")
            )
        shape = module.a.shape[1], module.b.shape[0]
        if shape != targets[name] or module.embedding != (name == embedding):
            raise InvalidAdapter(
                f"module {name} is {shape[0]} to {shape[1]} in the adapter, in the base model "
                f"{targets[name][0]} to {targets[name][1]}: it was made for another base"
            )


def _open(directory: Path) -> tuple[PeftConfig, SafetensorsFile]:
    config = read_config(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        others = (directory / "adapter_model.bin").is_file()
        raise InvalidAdapter(
            f"{path} is missing" + (": save the adapter with safetensors" if others else "")
        )
    try:
        return config, SafetensorsFile(path)
    except WeightsError as error:
        raise InvalidAdapter(error.message) from error


def _place(name: str) -> tuple[str, str, bool] | None:
    """Module, "a" or "b", and whether it is an embedding's; None for a frozen part of the base."""
    if name.startswith(PREFIX):
        for ending, (part, embedding) in _ENDINGS.items():
            if name.endswith(ending):
                return name.removeprefix(PREFIX).removesuffix(ending), part, embedding
        if _FROZEN.search(name):
            return None
    raise InvalidAdapter(
        f"the adapter holds {name!r:.200}, which is no LoRA matrix of a linear layer or embedding"
    )


def _module(
    file: SafetensorsFile,
    name: str,
    parts: dict[str, str],
    config: PeftConfig,
    max_rank: int,
    embedding: bool,
) -> LoraModule:
    if parts.keys() != {"a", "b"}:
        raise InvalidAdapter(f"module {name} lacks lora_{'AB'['a' in parts]}")
    a, b = file.read(parts["a"]), file.read(parts["b"])
    rank = config.rank_of(name)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise InvalidAdapter(
            f"module {name} has A {list(a.shape)} and B {list(b.shape)}; of rank {rank}, which "
            f"{CONFIG_FILE} says, they are [{rank}, in] and [out, {rank}]"
        )
    if rank > max_rank:
        raise InvalidAdapter(
            f"module {name} has rank {rank}, the limit is {max_rank}: train a smaller one, or add "
            "a class to lora.classes"
        )
    for matrix in (a, b):
        if matrix.dtype.name not in _DTYPES:
            raise InvalidAdapter(
                f"module {name} is {matrix.dtype.name}; {', '.join(_DTYPES)} are read"
            )
        if not np.isfinite(matrix).all():
            raise InvalidAdapter(f"module {name} holds values that are not finite")
    scale = config.scale_of(name)
    with np.errstate(over="ignore"):
        if not np.isfinite(b.astype(np.float32) * np.float32(scale)).all():
            raise InvalidAdapter(f"module {name} holds values that are not finite once scaled")
    return LoraModule(a=a, b=b, scale=scale, embedding=embedding)


def _check_targets(config: PeftConfig, modules: Mapping[str, LoraModule]) -> None:
    """What the config targets is there: a file that lost some of its tensors is not whole."""
    if isinstance(config.target_modules, str):
        return
    ends = {name[at:] for name in modules for at in _starts(name)}
    for target in config.target_modules:
        if target not in ends:
            raise InvalidAdapter(
                f"target_modules names {target!r:.80}, but {WEIGHTS_FILE} has no matrices for it"
            )


def _starts(name: str) -> list[int]:
    """Where the parts of a module's name begin."""
    return [0, *(at + 1 for at, character in enumerate(name) if character == ".")]


def _check_frozen(frozen: Mapping[str, tuple[int, ...]], modules: Mapping[str, LoraModule]) -> None:
    """A table that was saved whole is the base's: peft saves another where it was made larger."""
    sizes = {m.a.shape[1] for m in modules.values() if m.embedding}
    sizes |= {m.b.shape[0] for name, m in modules.items() if name.endswith("lm_head")}
    for name, shape in frozen.items():
        if set(shape[:1]) != sizes:
            raise InvalidAdapter(
                f"the adapter holds {name!r:.200} of shape {list(shape)}: a changed table or head "
                "is not served; target embed_tokens or lm_head with LoRA instead"
            )
