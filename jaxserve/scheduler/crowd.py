"""Which tenant of a level has most sequences waiting: buckets by count, each change is O(1)."""

from __future__ import annotations

from jaxserve.scheduler.accounts import Account


class Crowd:
    """Counts of waiting sequences by account."""

    def __init__(self) -> None:
        self._counts: dict[Account, int] = {}
        self._buckets: dict[int, dict[Account, None]] = {}
        self._most = 0

    def count(self, account: Account) -> int:
        """How many sequences of a tenant wait."""
        return self._counts.get(account, 0)

    def change(self, account: Account, by: int) -> None:
        """One more (1) or one fewer (-1) waits."""
        before = self._counts.get(account, 0)
        after = before + by
        if before:
            bucket = self._buckets[before]
            del bucket[account]
            if not bucket:
                del self._buckets[before]
        if after:
            self._counts[account] = after
            bucket = self._buckets.get(after)
            if bucket is None:
                bucket = self._buckets[after] = {}
            bucket[account] = None
        else:
            del self._counts[account]
        if after > self._most:
            self._most = after
        elif self._most not in self._buckets:
            self._most = after  # it was alone at the top, and is just below now

    def largest(self) -> Account | None:
        """A tenant with the most waiting sequences; the one that has had so many for longest."""
        bucket = self._buckets.get(self._most)
        return next(iter(bucket)) if bucket else None
