"""Which adapters there are by name: configured, loaded at run time, or found under a root.

All HTTP processes share the names, as a small file that is replaced whole under a lock; each reads
it again when it has changed. An adapter is fetched and checked when it is first asked for (or at
once, when it is loaded by request), and from then on its name stands for the hash of its content:
reloading gives the name another hash, and nothing that runs under the old one notices.

The file lives as long as the server, so that names outlive the engine's restarts; what is in the
engine, and where, is no business of this.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import LoraConfig
from jaxserve.errors import AdapterInUse, AdapterNotFound, ConfigError, InvalidAdapter
from jaxserve.formats.peft import check_fits, read_adapter
from jaxserve.lora.disk import DiskAdapters
from jaxserve.lora.sources import (
    Missing,
    address_below,
    check_address,
    check_name,
    fetch,
    is_there,
)
from jaxserve.types import AdapterBase

_NAMES = "names.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A name.

    Attributes:
        source: where it comes from.
        key: the hash of its content; empty until it has been fetched.
    """

    source: str
    key: str = ""


def configured(config: LoraConfig, taken: Collection[str] = ()) -> dict[str, Entry]:
    """The names in `lora.adapters`.

    Args:
        taken: names that models have.

    Raises:
        ConfigError: one is malformed, taken, or there twice.
    """
    found: dict[str, Entry] = {}
    for text in config.adapters:
        name, equals, source = text.partition("=")
        name, source = name.strip(), source.strip()
        if not equals or not source:
            raise ConfigError(f"lora.adapters takes NAME=PATH, got {text!r}")
        if "://" not in source:
            source = str(Path(source).expanduser().absolute())
        try:
            check_name(name)
            check_address(source)
        except InvalidAdapter as error:
            raise ConfigError(f"lora.adapters: {error.message}") from error
        if name in taken:
            raise ConfigError(
                f"lora.adapters names {name!r}, which is the name of a model served here: choose "
                "another"
            )
        if name in found:
            raise ConfigError(f"lora.adapters names {name!r} twice")
        found[name] = Entry(source=source)
    return found


class Registry:
    """See the module.

    Args:
        config: which names there are from the start, and the root.
        directory: shared by this server's HTTP processes; made if need be.
        taken: names that models have, and no adapter.
    """

    def __init__(self, config: LoraConfig, directory: Path, taken: Collection[str] = ()) -> None:
        self._config = config
        self._taken = frozenset(taken)
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        cache = Path(config.cache_dir).expanduser() if config.cache_dir else directory / "cache"
        self.disk = DiskAdapters(cache, config.cache_bytes)
        self._seen: tuple[int, int] | None = None
        self._entries: dict[str, Entry] = {}
        with self._changing():
            if not self._file.exists():
                self._write(configured(config, taken))

    @property
    def _file(self) -> Path:
        return self._directory / _NAMES

    def names(self) -> dict[str, Entry]:
        """All that are known now."""
        status = self._file.stat()
        seen = status.st_ino, status.st_mtime_ns
        if seen != self._seen:
            rows = json.loads(self._file.read_text(encoding="utf-8"))
            self._entries = {name: Entry(source=s, key=key) for name, (s, key) in rows.items()}
            self._seen = seen
        return self._entries

    def find(self, name: str) -> Entry:
        """A name that is known, or that there is something of under the root.

        Raises:
            AdapterNotFound: neither.
        """
        entry = self.names().get(name)
        if entry is not None:
            return entry
        try:
            check_name(name)
        except InvalidAdapter as error:
            raise AdapterNotFound(error.message, param="model") from error
        if not self._config.root or name in self._taken:
            raise AdapterNotFound(f"there is no adapter {name!r} here", param="model")
        return Entry(source=address_below(self._config.root, name))

    def look_up(self, name: str) -> Entry:
        """As `find`, and sees to it that a root in a store has it, too. Blocks its thread.

        Raises:
            AdapterNotFound: there is none.
            InvalidAdapter: the store cannot be asked.
        """
        entry = self.find(name)
        if name not in self.names() and "://" in entry.source and not is_there(entry.source):
            raise _not_below(name)
        return entry

    def materialise(self, name: str, base: AdapterBase) -> str:
        """Fetches and checks what a name stands for; returns its key. Blocks its thread.

        Raises:
            AdapterNotFound: the name is not known (any more).
            InvalidAdapter: it cannot be fetched, or does not fit the base model.
        """
        known = self.names().get(name)
        entry = known or self.find(name)
        try:
            with _blaming("model"):
                key = self.copy(entry.source, base)
        except Missing as error:
            if known is None:
                raise _not_below(name) from error
            raise
        with self._changing():
            entries = dict(self.names())
            now = entries.get(name)
            if now is None and known is not None:
                raise AdapterNotFound(f"the adapter {name!r} was unloaded meanwhile", param="model")
            if now == known:  # else it was loaded anew meanwhile
                self._write(entries | {name: Entry(source=entry.source, key=key)})
        return key

    def load(self, name: str, source: str, base: AdapterBase, *, replace: bool) -> Entry:
        """Gives a name to what is at an address, after fetching and checking it.

        Raises:
            InvalidAdapter: a name or address that is none, a name that is taken (and not to be
                replaced), or as `materialise`.
        """
        check_name(name)
        if name in self._taken:
            raise InvalidAdapter(
                f"{name!r} is the name of a model served here: choose another", param="lora_name"
            )
        if not replace:
            self._check_free(name)
        with _blaming("lora_path"):
            check_address(source)
            entry = Entry(source=source, key=self.copy(source, base))
        with self._changing():
            if not replace:
                self._check_free(name)
            self._write(dict(self.names()) | {name: entry})
        return entry

    def unload(self, name: str, *, refuse_in_use: bool) -> Entry:
        """Takes a name away: what runs under it goes on, new requests are refused.

        Raises:
            AdapterNotFound: there is none.
            AdapterInUse: requests run with it, and that was to be refused.
        """
        with self._changing():
            entries = dict(self.names())
            entry = entries.pop(name, None)
            if entry is None:
                raise AdapterNotFound(f"there is no adapter {name!r:.200} here", param="lora_name")
            if refuse_in_use and entry.key and self.disk.is_used(entry.key):
                raise AdapterInUse(
                    f"requests run with the adapter {name!r}: try again later, or let the unload "
                    'wait with "in_use": "wait"',
                    param="lora_name",
                )
            self._write(entries)
        return entry

    def _check_free(self, name: str) -> None:
        if name in self.names():
            raise InvalidAdapter(
                f"there is an adapter {name!r}: set load_inplace to replace it", param="lora_name"
            )

    def copy(self, source: str, base: AdapterBase) -> str:
        """Fetches and checks what is at an address; returns its key.

        Raises:
            InvalidAdapter: it cannot be fetched, or does not fit the base model.
        """

        def check(directory: Path) -> None:
            adapter = read_adapter(directory, max_rank=base.max_rank)
            check_fits(adapter, base.targets(), base.table, base.settings)

        def bring(into: Path) -> None:
            fetch(source, into, max_bytes=self._config.max_bytes)

        try:
            return self.disk.add(bring, _without_paths(check, source))
        except OSError as error:
            raise InvalidAdapter(f"{source} cannot be copied: {error}") from error

    def _write(self, entries: dict[str, Entry]) -> None:
        rows = {name: (entry.source, entry.key) for name, entry in entries.items()}
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(rows), encoding="utf-8")
        partial.replace(self._file)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone among this server's processes and threads."""
        file = os.open(self._directory / "names.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def _not_below(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no adapter {name!r} under lora.root", param="model")


@contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Names the request's field that led to an adapter that cannot be used."""
    try:
        yield
    except InvalidAdapter as error:
        error.param = error.param or param
        raise


def _without_paths(check: Callable[[Path], None], source: str) -> Callable[[Path], None]:
    """The check, its message naming the source in place of the copy."""

    def run(directory: Path) -> None:
        try:
            check(directory)
        except InvalidAdapter as error:
            raise InvalidAdapter(error.message.replace(str(directory), source)) from error

    return run
