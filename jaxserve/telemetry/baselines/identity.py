"""What a baseline is valid for: the deployment's fingerprint, and the device's name.

Found out without JAX, which the observer never imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jaxserve.config import Config

#: Sections whose settings decide how fast the engine is, and packages whose versions do.
_SECTIONS = ("model", "weights", "cache", "scheduler", "kernels", "parallel", "engine", "lora")
_PACKAGES = ("jaxserve", "jax", "jaxlib", "flax")


def fingerprint(config: Config, version_of: Callable[[str], str] | None = None) -> str:
    """12 hexadecimal digits: other ones after any change of model, settings or software."""
    version_of = version_of or _version
    settings = {
        name: {
            field.name: getattr(getattr(config, name), field.name)
            for field in dataclasses.fields(getattr(config, name))
            if not field.metadata.get("secret")
        }
        for name in _SECTIONS
    }
    parts = [settings, {name: version_of(name) for name in _PACKAGES}]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def device_name(root: Path = Path("/")) -> str:
    """The accelerators that this machine has, or its processor.

    Args:
        root: of the file system.
    """
    models = []
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError):
            models += _values(file, "Model")
    if models:
        return f"{len(models)} x {models[0]}"
    chips = [*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*")]
    if chips:
        return f"{len(chips)} x TPU"
    with contextlib.suppress(OSError):
        if names := _values(root / "proc/cpuinfo", "model name"):
            return f"{len(names)} x {names[0]}"
    return platform.machine()


def _values(file: Path, name: str) -> list[str]:
    lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    return [value.strip() for key, _, value in lines if key.strip() == name]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
