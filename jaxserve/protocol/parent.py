"""Processes that end: a child follows its parent, whatever way that ends; others are looked at.

A watching thread instead of PR_SET_PDEATHSIG, which fires when the parent's *thread* ends.
"""

from __future__ import annotations

import os
import select
import threading
import time

#: Exit status of a child whose parent is gone.
EXIT_ORPHANED = 1


def has_ended(pid: int) -> bool:
    """Whether no process of this pid runs, as far as can be told from here.

    A zombie has ended: its parent has not asked for its status yet.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except (AttributeError, OSError):  # not Linux, or not to be seen from here
        return False
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)


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
