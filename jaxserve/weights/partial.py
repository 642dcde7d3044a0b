"""A file of a download: under another name until it is whole, written by one process at a time."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jaxserve.errors import WeightsError

#: Told how far a download is: "downloading", bytes done, of how many.
Progress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Nobody else on this machine is inside with the same file; a second one waits."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process downloads the same model: waiting for %s", lock)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def complete(local: Path, partial: Path, size: int, fetch: Callable[[BinaryIO], None]) -> None:
    """Goes on with a partial file where an earlier try stopped, and gives it its name at the end.

    Args:
        size: bytes of the whole file.
        fetch: appends what is missing; how much is there is the file's position.

    Raises:
        WeightsError: it is not of that size then.
        OSError: it cannot be written; what was written stays for the next try.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as sink:
        if sink.tell() > size:
            sink.seek(0)
            sink.truncate()
        if sink.tell() < size:
            fetch(sink)
        done = sink.tell()
    if done != size:
        raise WeightsError(
            f"{local.name} ended after {done} of {size} bytes: the connection broke, or the file "
            "changed; start again"
        )
    partial.replace(local)


def one_line(error: BaseException) -> str:
    """What a library raised, as a part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
