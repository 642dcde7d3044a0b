"""Where adapters come from: directories, and gs:// or s3:// addresses, copied file by file.

Only an adapter's two files are read, whatever else lies beside them, and never more than
`lora.max_bytes`. Addresses come from the configuration or from an admin; a name under `lora.root`
may come from anybody, so it is checked to lead nowhere else.
"""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from jaxserve.errors import AdapterNotFound, InvalidAdapter
from jaxserve.formats.peft import WEIGHTS_FILE
from jaxserve.formats.peft_config import CONFIG_FILE
from jaxserve.weights.buckets import PACKAGES

FILES = (CONFIG_FILE, WEIGHTS_FILE)
MAX_NAME = 128

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_CHUNK_BYTES = 8 << 20


class Missing(InvalidAdapter):
    """There is nothing at an address."""


def check_name(name: str) -> None:
    """Refuses what cannot be an adapter's name: it may become a path below `lora.root`.

    Raises:
        InvalidAdapter: it is too long, or has other characters, or "..".
    """
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidAdapter(
            f"adapter name {name[:MAX_NAME]!r} must be letters, digits, '.', '_', '-' and '/' "
            f"between them, at most {MAX_NAME} characters",
            param="lora_name",
        )


def check_address(address: str) -> None:
    """Refuses an address that climbs, or of a store that is not known.

    Raises:
        InvalidAdapter: it does.
    """
    scheme, separator, rest = address.partition("://")
    if separator and scheme not in PACKAGES:
        raise InvalidAdapter(f"{address!r:.200}: {scheme}:// is not supported; gs:// and s3:// are")
    if "\0" in address:
        raise InvalidAdapter(f"{address!r:.200} has a zero byte in it: no path has")
    if ".." in PurePosixPath(rest if separator else address).parts:
        raise InvalidAdapter(f"{address!r:.200} has '..' in it: give the path itself")
    if not separator and not _local(address).is_absolute():
        raise InvalidAdapter(f"{address!r:.200} must be an absolute path, or gs:// or s3://")


def _local(address: str) -> Path:
    try:
        return Path(address).expanduser()
    except RuntimeError as error:  # "~" of a user that there is not
        raise InvalidAdapter(f"{address!r:.200}: {error}") from error


def address_below(root: str, name: str) -> str:
    """The address of a name under `lora.root`.

    Raises:
        AdapterNotFound: there is nothing of that name, or it leads outside.
    """
    if "://" in root:
        return f"{root.rstrip('/')}/{name}"
    top = Path(root).expanduser().resolve()
    directory = top / name
    for file in (directory, *(directory / name for name in FILES)):
        if not file.exists() or not file.resolve().is_relative_to(top):
            raise AdapterNotFound(f"there is no adapter {name!r} under lora.root", param="model")
    return str(directory)


def fetch(address: str, into: Path, *, max_bytes: int) -> None:
    """Copies an adapter's files into a directory.

    Raises:
        InvalidAdapter: they are not there, cannot be read, or are too large.
        OSError: the directory cannot be written.
    """
    check_address(address)
    if "://" in address:
        _from_store(address, into, max_bytes)
        return
    directory = _local(address)
    if not directory.is_dir():
        raise InvalidAdapter(f"{address} is no directory")
    for name in FILES:
        source = directory / name
        if not source.is_file():
            others = name == WEIGHTS_FILE and (directory / "adapter_model.bin").is_file()
            raise InvalidAdapter(
                f"{source} is missing" + (": save the adapter with safetensors" if others else "")
            )
        _check_size(str(source), source.stat().st_size, max_bytes)
        try:
            reader = source.open("rb")
        except OSError as error:
            raise InvalidAdapter(f"cannot read {source}: {error.strerror}") from error
        with reader, (into / name).open("wb") as sink:
            shutil.copyfileobj(reader, sink, _CHUNK_BYTES)


def is_there(address: str) -> bool:
    """Whether a store, gs:// or s3://, has an adapter's files at an address.

    Raises:
        InvalidAdapter: it cannot be asked.
    """
    files = _store(address)
    try:
        return all(files.exists(f"{address.rstrip('/')}/{name}") for name in FILES)
    except Exception as error:  # each store has its own kinds
        raise _unreadable(address, error) from error


def _unreadable(source: str, error: Exception) -> InvalidAdapter:
    return InvalidAdapter(f"cannot read {source}: {type(error).__name__}: {error}")


def _store(address: str) -> Any:
    scheme = address.partition("://")[0]
    if find_spec(PACKAGES[scheme]) is None:
        raise InvalidAdapter(
            f"{address}: {scheme}:// needs the package {PACKAGES[scheme]}: pip install "
            f"{PACKAGES[scheme]}"
        )
    import fsspec

    # A file system of its own: others of this process would remember older listings.
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)


def _from_store(address: str, into: Path, max_bytes: int) -> None:
    files = _store(address)
    for name in FILES:
        source = f"{address.rstrip('/')}/{name}"
        try:
            _check_size(source, files.size(source), max_bytes)
            with files.open(source, "rb") as reader, (into / name).open("wb") as sink:
                shutil.copyfileobj(cast(BinaryIO, reader), sink, _CHUNK_BYTES)
        except InvalidAdapter:
            raise
        except FileNotFoundError as error:
            raise Missing(f"{source} is missing") from error
        except Exception as error:  # each store has its own kinds
            raise _unreadable(source, error) from error


def _check_size(source: str, size: int | None, max_bytes: int) -> None:
    if size is None or size > max_bytes:
        raise InvalidAdapter(
            f"{source} has {size} bytes, at most lora.max_bytes={max_bytes} are taken"
        )
