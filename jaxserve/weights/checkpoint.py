"""A checkpoint as the loader sees it, whatever its format: a Hugging Face config and tensors.

Hugging Face's config keys, tensor names and layouts are the common language; each other format is
presented in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxserve.errors import ConfigError, UnsupportedModel, WeightsError
from jaxserve.formats.safetensors import open_safetensors

#: What weights may be.
_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FORMATS = ("auto", "hf", "gguf", "orbax")


class Checkpoint(Protocol):
    """A config and tensors.

    Attributes:
        config: keys as in HF's config.json; `eos_token_id` as the generation config has it.
    """

    config: dict[str, Any]

    def names(self) -> frozenset[str]:
        """HF names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor: float32, float16 or bfloat16; dequantized if it was quantized."""
        ...


class HfCheckpoint:
    """A directory with config.json and safetensors files."""

    def __init__(self, directory: Path) -> None:
        self.config = read_config(directory)
        self._tensors = open_safetensors(directory)

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        """See `Checkpoint`; a view of the mapped file.

        Raises:
            UnsupportedModel: the tensor is of another dtype.
        """
        tensor = self._tensors.read(name)
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModel(
                f"tensor {name!r} is {tensor.dtype}; weights must be one of "
                f"{', '.join(str(dtype) for dtype in _DTYPES)}"
            )
        return tensor


def open_checkpoint(path: Path, format: str = "auto") -> Checkpoint:
    """Opens a checkpoint; only its headers are read.

    Args:
        path: a directory or a .gguf file.
        format: one of `FORMATS`; "auto" looks at what is there.

    Raises:
        WeightsError: there is none, or it is broken.
        UnsupportedModel: of a kind that is not implemented.
    """
    if format not in FORMATS:
        raise ConfigError(f"model.format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not path.exists():
        raise WeightsError(f"there is no model at {path}: no such file or directory")
    found = _detect(path) if format == "auto" else format
    if found == "gguf":
        from jaxserve.weights.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(_gguf_file(path))
    if not path.is_dir():
        raise WeightsError(f"{path} is a file; a model in {found} format is a directory")
    if found == "orbax":
        from jaxserve.weights.orbax_checkpoint import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    return HfCheckpoint(path)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, with the end tokens of generation_config.json where there is one.

    Raises:
        WeightsError: there is no config.json, or it is no JSON object.
    """
    config = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise WeightsError(f"{path} must hold a JSON object, not a {type(document).__name__}")
    return document


def _detect(path: Path) -> str:
    if path.is_file():
        return "gguf"
    if (path / "orbax").is_dir():
        return "orbax"
    has_gguf = any(path.glob("*.gguf"))
    return "gguf" if has_gguf and not any(path.glob("*.safetensors")) else "hf"


def _gguf_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise WeightsError(f"{path} must hold one .gguf file, it has {names}; give the file's path")
    return files[0]
