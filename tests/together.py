"""Which tests stay in one process of several (`scripts/test --jobs`): those that share much work.

A file's tests share what its fixtures make; some files share a fixture of the session. The groups
are made here, since xdist's own (`--dist loadgroup`) are lost without a word on pytest 9.2: it
writes them into node ids, which pytest no longer reads back (pytest-xdist issue 1386).
"""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

#: Where tests share a fixture that takes a minute to make: the real server, the warm executor.
SHARED = {
    "tests/server/": "server",
    "tests/device/test_executor.py": "llama",
    "tests/device/test_host_store.py": "llama",
    "tests/device/test_masked.py": "llama",
    "tests/device/test_programs.py": "llama",
    "tests/device/test_speculation.py": "llama",
}


def group_of(nodeid: str) -> str:
    """The group that a test belongs to: a shared fixture's name, or its file."""
    path = nodeid.split("::", 1)[0]
    return next((name for place, name in SHARED.items() if path.startswith(place)), path)


class Together(LoadFileScheduling):
    """Hands out whole groups."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
