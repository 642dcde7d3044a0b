"""The adapters of a process that serves itself (`LLM`): by name, or straight from a directory.

An adapter is copied and checked when it is first asked for, as the server does it. A directory is
looked at each time: once its files have changed, what they hold now is another adapter.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from jaxserve.config import LoraConfig
from jaxserve.errors import AdapterNotFound, Overloaded
from jaxserve.lora.registry import Registry
from jaxserve.lora.sources import FILES
from jaxserve.types import AdapterBase

#: How often a copy that was just made may be removed again before it is held.
_TRIES = 3


class Copy(NamedTuple):
    """An adapter on the disk.

    Attributes:
        key: the hash of its content.
        path: where it is.
    """

    key: str
    path: Path


#: Of a directory's two files: when they were written, their sizes, and which they are.
_State = tuple[tuple[int, int, int], ...]


class LocalAdapters:
    """See the module. Used by one thread.

    Args:
        base: what adapters must fit.
    """

    def __init__(self, config: LoraConfig, base: AdapterBase) -> None:
        self._base = base
        self._scratch = TemporaryDirectory(prefix="jaxserve-adapters-")
        self._registry = Registry(config, Path(self._scratch.name))
        self._directories: dict[Path, tuple[_State, str]] = {}

    def hold(self, adapter: str | os.PathLike[str]) -> Copy:
        """Copies an adapter unless that has been done, and keeps it until `release`.

        Args:
            adapter: a name, or a directory; a name comes first.

        Raises:
            AdapterNotFound: neither.
            InvalidAdapter: it cannot be read, or does not fit the base model.
        """
        disk = self._registry.disk
        key = self._known(adapter)
        for _ in range(_TRIES):
            if key and disk.hold(key):
                return Copy(key, disk.path(key))
            key = self._copied(adapter)
        raise Overloaded(
            f"the copy of adapter {os.fspath(adapter)!r} is removed as soon as it is made: raise "
            "lora.cache_bytes"
        )

    def release(self, copy: Copy) -> None:
        """One user less."""
        self._registry.disk.release(copy.key)

    def close(self) -> None:
        """Removes the copies, unless they are kept in `lora.cache_dir`."""
        self._scratch.cleanup()

    def _name(self, adapter: str | os.PathLike[str]) -> str | None:
        """The name that is meant; None where it is a directory.

        Raises:
            AdapterNotFound: it is neither.
        """
        if not isinstance(adapter, str):
            return None
        try:
            self._registry.find(adapter)
        except AdapterNotFound:
            if Path(adapter).is_dir():
                return None
            known = ", ".join(sorted(self._registry.names())[:5]) or "none"
            raise AdapterNotFound(
                f"there is no adapter {adapter!r:.200}: it is neither a directory nor a known name "
                f"({known})",
                param="adapter",
            ) from None
        return adapter

    def _known(self, adapter: str | os.PathLike[str]) -> str:
        """Its key as far as that is known; empty where it has to be copied."""
        name = self._name(adapter)
        if name is not None:
            return self._registry.find(name).key
        directory = Path(adapter).absolute()
        state, key = self._directories.get(directory, ((), ""))
        return key if state == _state(directory) else ""

    def _copied(self, adapter: str | os.PathLike[str]) -> str:
        name = self._name(adapter)
        if name is not None:
            return self._registry.materialise(name, self._base)
        directory = Path(adapter).absolute()
        state = _state(directory)  # before: what changes meanwhile is seen the next time
        key = self._registry.copy(str(directory), self._base)
        self._directories[directory] = state, key
        return key


def _state(directory: Path) -> _State:
    found = []
    for name in FILES:
        try:
            status = (directory / name).stat()
        except OSError:
            continue  # copying it says what is wrong
        found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)
