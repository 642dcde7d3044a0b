"""What a baseline is valid for: the deployment, and the device that the engine says it computes on.

Found out without JAX, which the observer never imports. A deployment is its software, what the
model's files hold, and the settings that decide how fast the engine is; where they are kept, what
they are called and who may ask for them decides nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from jaxserve.config import Config
from jaxserve.types import DeviceInfo

#: News of changes on purpose: of the software, the model or the device, and of settings.
DEPLOYED, CONFIGURED = "deployed", "configured"
#: Packages whose versions decide how fast the engine is.
_PACKAGES = (
    "jaxserve",
    "jax",
    "jaxlib",
    "flax",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
#: Sections whose settings do, but for these: a new setting counts until it is named here.
_SECTIONS = ("weights", "cache", "scheduler", "kernels", "parallel", "embeddings", "lora")
_IRRELEVANT = frozenset(
    {
        "weights.cache_dir",
        *("parallel.host", "parallel.coordinator"),
        *("parallel.connect_timeout_s", "parallel.lost_after_s"),
        # What the encoder's files hold counts as the model's do.
        *("embeddings.model", "embeddings.name", "embeddings.over_length"),
        *("embeddings.query_prefix", "embeddings.document_prefix", "embeddings.max_inputs"),
        *("lora.adapters", "lora.root", "lora.cache_dir", "lora.cache_bytes", "lora.max_bytes"),
    }
)
#: Of other sections.
_RELEVANT = ("model.max_context", "engine.batch_invariant", "http.workers")
#: Pieces of a file that are looked at, and how long each is.
_PIECES, _PIECE_BYTES = 16, 4096
#: Files of a model that are looked into; of more, the names and sizes.
_MAX_FILES = 1000
#: Changed settings that are told.
_MAX_TOLD = 8


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is deployed.

    Attributes:
        software: versions of packages, by name.
        model: digest of what its files hold.
        settings: by "section.key", as JSON.
        device: as `device_name` has it; empty before the engine has said.
    """

    software: dict[str, str]
    model: str
    settings: dict[str, str]
    device: str = ""

    @classmethod
    def of(cls, config: Config, version_of: Callable[[str], str] | None = None) -> Self:
        """By the configuration, whose addresses of models are resolved."""
        found = {
            f"{section}.{field.name}"
            for section in _SECTIONS
            for field in dataclasses.fields(getattr(config, section))
            if not field.metadata.get("secret")
        }
        names = sorted((found - _IRRELEVANT).union(_RELEVANT))
        return cls(
            software={name: (version_of or _version)(name) for name in _PACKAGES},
            model=_digest(
                *map(content, filter(None, (config.model.path, config.embeddings.model)))
            ),
            settings={name: json.dumps(_setting(config, name)) for name in names},
        )

    @classmethod
    def read(cls, state: dict[str, Any]) -> Self:
        """From `dataclasses.asdict`; raises KeyError, TypeError or ValueError where it is none."""
        return cls(
            software={str(k): str(v) for k, v in dict(state["software"]).items()},
            model=str(state["model"]),
            settings={str(k): str(v) for k, v in dict(state["settings"]).items()},
            device=str(state["device"]),
        )

    @property
    def version(self) -> str:
        """12 hexadecimal digits: other ones after any change but of the device."""
        return _digest(json.dumps([self.software, self.model, self.settings], sort_keys=True))

    def changes(self, before: Deployment) -> Iterator[tuple[str, str]]:
        """What is another than before: DEPLOYED or CONFIGURED, and a sentence for people."""
        deployed = _differences(before.software, self.software)
        if self.model != before.model:
            deployed.append("the model's files")
        if self.device != before.device:
            deployed.append(_difference("device", before.device, self.device))
        if deployed:
            yield DEPLOYED, ", ".join(deployed)
        if settings := _differences(before.settings, self.settings):
            told = settings[:_MAX_TOLD]
            if len(settings) > _MAX_TOLD:
                told.append(f"and {len(settings) - _MAX_TOLD} more")
            yield CONFIGURED, ", ".join(told)


def device_name(device: DeviceInfo | None, root: Path = Path("/")) -> str:
    """The devices that an engine computes on, as it says; a processor with its maker's name.

    Args:
        root: of the file system.
    """
    if device is None:
        return "unknown"
    name = device.kind
    if name == "cpu":  # which one JAX does not say
        with contextlib.suppress(OSError):
            lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
            name = f"cpu ({len(names)} x {names[0]})" if names else name
    return f"{device.count} x {name}"


def content(address: str) -> str:
    """Digest of what a model's files hold: their names, sizes, and pieces from all over each.

    A model is too large to be read whole at each start; weights that differ do so everywhere.

    Args:
        address: of a file or a directory; one that is not there stands for itself.
    """
    path = Path(address)
    files = [path]
    if path.is_dir():
        found = (each.relative_to(path) for each in path.rglob("*") if each.is_file())
        # What is hidden is a downloader's, and says when it was there.
        files = [path / name for name in sorted(found) if not name.as_posix().startswith(".")]
    parts = []
    for number, file in enumerate(files):
        name = str(file.relative_to(path)) if file != path else ""
        try:
            size = file.stat().st_size
            parts += [name, str(size), _pieces(file, size) if number < _MAX_FILES else ""]
        except OSError:
            parts.append(name or address)
    return _digest(*parts)


def _pieces(file: Path, size: int) -> str:
    step = max(_PIECE_BYTES, (size - _PIECE_BYTES) // (_PIECES - 1))
    digest = hashlib.sha256()
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for at in range(0, size, step):
            digest.update(os.pread(descriptor, _PIECE_BYTES, at))
        digest.update(os.pread(descriptor, _PIECE_BYTES, max(0, size - _PIECE_BYTES)))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _setting(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [
        _difference(name, before.get(name, ""), now.get(name, ""))
        for name in sorted(before.keys() | now.keys())
        if before.get(name, "") != now.get(name, "")
    ]


def _difference(name: str, before: str, now: str) -> str:
    return f"{name} from {before or 'nothing'} to {now or 'nothing'}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
