"""Models in gs:// and s3:// buckets, copied through fsspec file by file.

The copy is a mirror: a file that is there with the object's size and time is not fetched again, one
that was replaced in the bucket is, and one that is gone from the bucket goes here too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from jaxserve.errors import WeightsError
from jaxserve.weights.partial import Progress, alone, complete, one_line

#: The package that each scheme needs.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}

_EXTRAS = {"gs": "gcs", "s3": "s3"}
_ENDINGS = (".json", ".safetensors", ".model", ".jinja", ".gguf")
_WEIGHTS = (".safetensors", ".gguf")
_CHUNK_BYTES = 8 << 20


def from_bucket(address: str, scheme: str, cache: Path, progress: Progress) -> Path:
    """A copy of the model below `cache`.

    Raises:
        WeightsError: there is none, it may not be read, or the download failed.
    """
    package = PACKAGES[scheme]
    if find_spec(package) is None:
        raise WeightsError(
            f"{address}: {scheme}:// needs the package {package}: "
            f"scripts/setup {_EXTRAS[scheme]}, or pip install {package}"
        )
    import fsspec

    # A file system of its own: others of this process would remember older listings.
    return download(fsspec.filesystem(scheme, skip_instance_cache=True), address, cache, progress)


def download(files: Any, address: str, cache: Path, progress: Progress) -> Path:
    """Copies a model's files from an fsspec file system.

    Args:
        files: the file system.
        address: of a directory, or of one .gguf file.

    Raises:
        WeightsError: there are no model files at the address, or they cannot be read or written.
    """
    try:
        return _mirror(files, address, cache, progress)
    except WeightsError:
        raise
    except FileNotFoundError as error:
        raise WeightsError(f"{address}: there is no such bucket or object ({error})") from error
    except Exception as error:  # each store has its own kinds: any of them ends start-up
        if isinstance(error, PermissionError) and error.filename is None:  # else a local file's
            raise WeightsError(
                f"{address}: access denied ({error}); check the store's credentials in the "
                "environment"
            ) from error
        raise WeightsError(
            f"downloading {address} failed: {one_line(error)}; start again to resume"
        ) from error


def _mirror(files: Any, address: str, cache: Path, progress: Progress) -> Path:
    root = files._strip_protocol(address).rstrip("/")
    found = {
        _name(path, root, address): row
        for path, row in files.find(root, detail=True).items()
        if row["type"] == "file" and not path.endswith("/")  # some tools keep "folders" as objects
    }
    found = {name: row for name, row in sorted(found.items()) if _is_wanted(name)}
    if not found:
        raise WeightsError(f"there are no model files at {address}")
    target = cache / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    with alone(target.with_name(f"{target.name}.lock")):
        total, done = sum(row["size"] for row in found.values()), 0
        for name, row in found.items():
            _fetch(
                files,
                row,
                target / name,
                lambda n, before=done: progress("downloading", before + n, total),
            )
            done += row["size"]
            progress("downloading", done, total)
        for local in target.rglob("*"):
            if local.is_file() and local.relative_to(target).as_posix() not in found:
                local.unlink()
    single = [name for name, row in found.items() if row["name"] == root]
    return target / single[0] if single else target


def _name(path: str, root: str, address: str) -> str:
    """An object's name below the address; its own, if the address is the object's."""
    name = path.removeprefix(root).lstrip("/") or path.rsplit("/", 1)[-1]
    if ".." in PurePosixPath(name).parts:
        raise WeightsError(f"{address}: an object's name leads outside of it: {path!r}")
    return name


def _is_wanted(name: str) -> bool:
    """Weights in subdirectories are other forms of the same model, but for Orbax's."""
    if name.startswith("orbax/"):
        return True
    return name.endswith(_ENDINGS) and not (name.endswith(_WEIGHTS) and "/" in name)


def _fetch(files: Any, row: dict[str, Any], local: Path, report: Callable[[int], None]) -> None:
    size, changed = row["size"], int(files.modified(row["name"]).timestamp())
    if local.is_file():
        have = local.stat()
        if (have.st_size, int(have.st_mtime)) == (size, changed):
            return

    def copy(sink: BinaryIO) -> None:
        with files.open(row["name"], "rb") as source:
            source.seek(sink.tell())
            while chunk := source.read(_CHUNK_BYTES):
                sink.write(chunk)
                report(sink.tell())

    # The time in the name: what is there of an older version is not gone on with.
    complete(local, local.with_name(f"{local.name}.{changed}.partial"), size, copy)
    os.utime(local, (changed, changed))
