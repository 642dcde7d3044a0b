"""Directories that live as long as their process: for sockets and shared metrics.

A process that is killed cannot remove its own, so whoever makes the next one removes those that
nobody holds any more. A directory is held by a lock on a file in it, which the kernel gives up with
the process; the file gets its name only once it is locked, and a directory without it is left
alone, so that one that is just being made is never taken for a leftover.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from jaxserve.errors import ConfigError

PREFIX = "jaxserve-"
_LOCK = "lock"


class ScratchDirectory:
    """A new directory of this user's alone (mode 0700), held until `remove`.

    Attributes:
        path: absolute.
    """

    def __init__(self) -> None:
        """Makes it, and removes leftovers.

        Raises:
            ConfigError: there is no temporary directory that can be written.
        """
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._lock = os.open(self.path / "new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (self.path / "new").rename(self.path / _LOCK)
        except OSError as error:
            raise ConfigError(
                f"cannot make a temporary directory: {error}; set TMPDIR to one that can be written"
            ) from None
        for other in self.path.parent.glob(f"{PREFIX}*/{_LOCK}"):
            if other.parent != self.path:
                _remove_leftover(other)

    def remove(self) -> None:
        """Removes it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_leftover(lock: Path) -> None:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # another user's, or gone
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # in use
    else:
        shutil.rmtree(lock.parent, ignore_errors=True)
    finally:
        os.close(fd)
