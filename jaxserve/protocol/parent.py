"""Ties a child process to its parent: the child ends when the parent does, whatever way.

A watching thread instead of PR_SET_PDEATHSIG, which fires when the parent's *thread* ends.
"""

from __future__ import annotations

import os
import select
import threading
import time

#: Exit status of a child whose parent is gone.
EXIT_ORPHANED = 1


def follow_parent(parent: int | None = None) -> None:
    """Ends this process at once when its parent ends.

    Args:
        parent: pid of the parent, where it told us: then one that ended before this call is
            noticed too.
    """
    if parent is None:
        parent = os.getppid()

    def watch() -> None:
        try:
            poll = select.poll()
            poll.register(os.pidfd_open(parent), select.POLLIN)
            if os.getppid() == parent:
                poll.poll()
        except (AttributeError, OSError):  # not Linux, or the parent is in another pid namespace
            while os.getppid() == parent:
                time.sleep(0.5)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="jaxserve parent watch", daemon=True).start()
