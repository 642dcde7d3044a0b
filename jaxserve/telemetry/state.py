"""The directory of what outlives the server: SLO counts, the ledger, baselines, open incidents.

One server at a time holds it, by a lock on a file in it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from jaxserve.config import Config
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

_LOCK = "lock"
#: Faults of a disk, which no other setting mends while it lasts; a server serves without it.
_DISK_FAULTS = frozenset({errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO})
_HOME = "~/.local/state/jaxserve"


class StateDirectory:
    """The directory, made where it is missing, until `release`.

    Args:
        scratch: holds it where none is configured and the server listens on a port of the system's
            choice (nobody could find such a server's state again), or the usual one cannot be used,
            or the configured one's disk is read-only, full or broken.

    Attributes:
        path: of the directory.
        outlives: whether it will be there after this server.

    Raises:
        ConfigError: the configured one cannot be made or written for another reason, or another
            server holds it.
    """

    def __init__(self, config: Config, scratch: Path) -> None:
        configured = config.telemetry.state_dir
        self.outlives = bool(configured) or config.http.port != 0
        if configured:
            self.path = Path(configured).expanduser()
        elif config.http.port == 0:
            self.path = scratch / "state"
        else:
            self.path = Path(_HOME).expanduser() / f"port-{config.http.port}"
        try:
            self._lock = _hold(self.path)
        except ConfigError as error:
            if configured and getattr(error.__cause__, "errno", 0) not in _DISK_FAULTS:
                raise
            logger.warning("%s; until then nothing outlives this server", error.message)
            self.path = scratch / "state"
            self.outlives = False
            self._lock = _hold(self.path)

    def release(self) -> None:
        """Another server may have it."""
        os.close(self._lock)


def _hold(path: Path) -> int:
    """The descriptor of the lock of a directory, which is made."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the server's records in {path}: {error.strerror}; choose another "
            "directory with telemetry.state_dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"another server keeps its records in {path}; choose another directory with "
            "telemetry.state_dir"
        ) from None
    return lock
