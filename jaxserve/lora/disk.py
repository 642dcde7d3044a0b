"""Copies of adapters on the disk, each in a directory named by the hash of its content.

So what a request was told is what it gets, whatever happens at the source meanwhile. All HTTP
processes share the directory, and the engine reads from it. A copy is *held* while requests use it,
by a shared lock on a file beside it that the kernel gives up with the process; those that nobody
holds are removed, the least recently used first, when `max_bytes` are exceeded.

    1f0c…/adapter_config.json  adapter_model.safetensors        1f0c….lock

What is being fetched lies in a directory `partial-…`, locked by whoever fetches it. Servers that
share the directory remove at their start what was left by one that was killed: what nobody locks.

Invariant: a directory under its final name is whole and was checked; it is never written again.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxserve.formats.peft import adapter_digest

_POLL_S = 0.05
_PARTIAL = "partial-"


class DiskAdapters:
    """See the module.

    Args:
        directory: made if need be.
        max_bytes: of all copies.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._held: dict[str, tuple[int, int]] = {}  # file and users, by key
        self._sizes: dict[str, int] = {}  # of the copies that were here when last looked at
        directory.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def path(self, key: str) -> Path:
        """Where a copy is, if it is here."""
        return self.directory / key

    def add(self, fetch: Callable[[Path], None], check: Callable[[Path], None]) -> str:
        """Fetches an adapter; returns its key.

        Args:
            fetch: writes its files into a directory; check: raises if they are no good.

        Raises:
            InvalidAdapter: as these do.
        """
        with self._partial() as partial:
            fetch(partial)
            check(partial)
            key = adapter_digest(partial)
            with self._locked(key, fcntl.LOCK_EX):
                if not self.path(key).exists():
                    partial.rename(self.path(key))
                os.utime(self.path(key))
        self._evict(key)
        return key

    def hold(self, key: str) -> bool:
        """Keeps a copy here until `release`; whether it is here at all."""
        if key in self._held:
            file, users = self._held[key]
            self._held[key] = file, users + 1
            return True
        file = self._open(key)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(self.path(key))
        except OSError:  # it is being removed, or is gone
            os.close(file)
            return False
        self._held[key] = file, 1
        return True

    def release(self, key: str) -> None:
        """One user less."""
        file, users = self._held.pop(key)
        if users > 1:
            self._held[key] = file, users - 1
        else:
            os.close(file)

    def is_used(self, key: str) -> bool:
        """Whether any process holds it."""
        file = self._open(key)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    async def await_unused(self, key: str, timeout_s: float) -> bool:
        """Waits until nobody holds it; whether that came within the time."""
        end_s = time.monotonic() + timeout_s
        while self.is_used(key):
            if time.monotonic() > end_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        """A directory for what is being fetched, locked; gone afterwards, unless it was renamed."""
        while True:
            path = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.directory))
            file = _lock_directory(path, fcntl.LOCK_EX)
            if file is not None:  # else it was swept before it could be locked
                break
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(file)

    def _sweep(self) -> None:
        """Removes what nobody is fetching any more."""
        for path in self.directory.glob(f"{_PARTIAL}*"):
            try:
                file = _lock_directory(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # somebody is at it
            if file is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(file)

    def _evict(self, newest: str) -> None:
        """Removes what nobody holds until the rest fits."""
        sizes = self._look()
        total = sum(sizes.values())
        if total <= self._max_bytes:
            return
        for key in sorted(sizes, key=self._used_ns):
            if key != newest and self._remove(key):
                total -= sizes[key]
                if total <= self._max_bytes:
                    return

    def _look(self) -> dict[str, int]:
        """Bytes of each copy that is here, whoever made it; each is looked into once."""
        names = set(os.listdir(self.directory))
        sizes: dict[str, int] = {}
        for key in names:
            if f"{key}.lock" not in names:
                continue
            size = self._sizes.get(key)
            with suppress(OSError):  # it is being removed
                sizes[key] = _size(self.path(key)) if size is None else size
        self._sizes = sizes
        return sizes

    def _used_ns(self, key: str) -> int:
        try:
            return self.path(key).stat().st_mtime_ns
        except OSError:
            return 0  # removed meanwhile

    def _remove(self, key: str) -> bool:
        file = self._open(key)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under another name first: nobody takes a half-removed one for a copy.
            gone = self.directory / f"{_PARTIAL}{key}"
            self.path(key).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        except OSError:
            return False
        finally:
            os.close(file)
        return True

    def _open(self, key: str) -> int:
        return os.open(self.directory / f"{key}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)

    @contextmanager
    def _locked(self, key: str, kind: int) -> Iterator[None]:
        """Held in that way, unless requests use it: then it is here and stays."""
        file = self._open(key)
        try:
            while True:
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if self.path(key).exists():
                        break
                    time.sleep(_POLL_S)
            yield
        finally:
            os.close(file)


def _size(directory: Path) -> int:
    with os.scandir(directory) as files:
        return sum(file.stat().st_size for file in files)


def _lock_directory(path: Path, kind: int) -> int | None:
    """A file that holds the lock; None where the directory is gone, or another by now.

    Raises:
        BlockingIOError: somebody has it, and `kind` is not to wait.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, kind)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except FileNotFoundError:
        pass
    except BlockingIOError:
        os.close(file)
        raise
    os.close(file)
    return None
