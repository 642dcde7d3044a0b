"""The prefix cache: sequences that begin alike share the pages of what they have in common.

Every full page whose tokens are known is registered in its pool under its digest
(`scheduler.digests`). A sequence that is let in looks for its own digests and holds the pages that
are there instead of computing them; while its prompt is being computed it looks again before each
chunk, since another may be ahead with the same prompt. A page that two sequences have computed at
once is registered once: the later one gives its own back and holds the registered one.

A page that the device had to give up may be on the host (`scheduler.spill`). It is found there too,
where loading it is measured to be faster than computing it and a page of the device is free for it.

Invariants:
- A page is registered only when the step that fills it has been launched, and found only by later
  plans: device calls form one chain, so whoever shares it reads what was written.
- A registered page is full, so nobody writes it. A sequence's last known token is never found: it
  is computed, to sample from it.
- Where all positions are seen, who holds a registered page holds all registered pages before it.
  Since the last ones are released first, a page is never evicted before those that follow it.
- With window groups a hit needs their pages from the first position that the next query sees.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from jaxserve.config import CacheConfig
from jaxserve.scheduler.digests import extend_digests, root_digest
from jaxserve.scheduler.pages import PageAllocator, PageTable
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.sequence import Sequence, SequenceState
from jaxserve.scheduler.spill import Spill
from jaxserve.scheduler.swap_costs import SwapCosts

#: Pages hashed at a time while they are looked for, of known tokens that were not hashed before.
_BLOCK = 16
_IN_SLOT = (SequenceState.PREFILLING, SequenceState.DECODING, SequenceState.DRAFTING)


class PrefixCache:
    """Finds and registers pages; see the module. With `cache.prefix` off it does neither.

    Args:
        pages: where they are.
        spill: those that the device had to give up.
        costs: whether loading them pays.
        config: whether, and who shares with whom.
        model: the name of what computes the pages.

    Attributes:
        num_lookup_tokens: known tokens of the sequences that joined, so far.
        num_hit_tokens: of these, those found instead of computed.
    """

    def __init__(
        self,
        pages: PageAllocator,
        spill: Spill,
        costs: SwapCosts,
        config: CacheConfig,
        model: str,
    ) -> None:
        self.num_lookup_tokens = 0
        self.num_hit_tokens = 0
        self._pages = pages
        self._spill = spill
        self._costs = costs
        self._is_on = config.prefix
        self._by_tenant = config.isolation == "tenant"
        self._extra = model.encode()
        self._windowed = [group for group, window in enumerate(pages.windows) if window]
        self._moved: list[tuple[Sequence, int, int, int]] = []

    def root(self, tenant: str, cache_salt: str, adapter: str = "") -> bytes:
        """What the digests of a request begin with: only equal roots share pages.

        Args:
            adapter: hash of its adapter's content, so that another version shares nothing.
        """
        if not self._is_on:
            return b""
        tenant = tenant if self._by_tenant else ""
        texts = (text.encode("utf-8", "surrogatepass") for text in (tenant, cache_salt, adapter))
        return root_digest(self._extra, *texts)

    def digests_of(self, prompt: Seq[int], root: bytes) -> list[bytes]:
        """Of all full pages of a prompt: hashed when it comes, so that no plan has to."""
        digests: list[bytes] = []
        if self._is_on:
            self._extend(digests, root, prompt, len(prompt) // self._pages.page_size)
        return digests

    def num_cached(self, prompt: Seq[int], root: bytes) -> int:
        """Tokens of a prompt that could be found on the device now."""
        if not self._is_on:
            return 0
        limit = (len(prompt) - 1) // self._pages.page_size
        return self._reach(self._pages.new_table(), [], root, prompt, 0, limit) * (
            self._pages.page_size
        )

    def num_cached_of(self, sequence: Sequence) -> int:
        """Known tokens of a waiting sequence that it has, or could find on the device now."""
        if not self._may_look(sequence):
            return sequence.num_computed
        size = self._pages.page_size
        start = sequence.num_computed // size
        limit = (len(sequence.token_ids) - 1) // size
        if limit <= start:
            return sequence.num_computed
        digests = sequence.digests
        end = self._reach(sequence.table, digests, sequence.root, sequence.token_ids, start, limit)
        return max(end * size, sequence.num_computed)

    def find(self, sequence: Sequence) -> list[tuple[int, int, int]]:
        """Has a sequence hold the cached pages that follow those it has computed.

        Its `num_computed` goes on to their end. Costs one look-up more than there are pages found
        (with window groups only: one for each page of its known tokens).

        Returns:
            (group, index, page) of each new entry of its table.
        """
        if not self._may_look(sequence):
            return []
        size = self._pages.page_size
        start = sequence.num_computed // size
        limit = (len(sequence.token_ids) - 1) // size
        if limit <= start:
            return []
        digests, table = sequence.digests, sequence.table
        known = table, digests, sequence.root, sequence.token_ids, start
        end = self._reach(*known, limit)
        if self._spill.is_on and end < limit:
            further = self._reach(*known, limit, on_host=True)
            if further > end and self._may_load(digests, max(end, start), start, further):
                end = further
        if end <= start:
            return []
        sequence.num_computed = end * size
        return self._hold(table, digests, start, end)

    def catch_up(self, sequence: Sequence) -> list[tuple[int, int, int]]:
        """As `find`, for a sequence that has a slot: another may be ahead with the same prompt.

        The caller has the sequence `count_found`.
        """
        if sequence.looks_back:
            return []  # its slot must see every token from where it joined
        before = sequence.num_computed
        entries = self.find(sequence)
        self.num_hit_tokens += sequence.num_computed - before
        return entries

    def joined(self, sequence: Sequence) -> None:
        """Counts what a sequence that takes a slot looked for and found."""
        if self._may_look(sequence):
            self.num_lookup_tokens += len(sequence.token_ids)
            self.num_hit_tokens += sequence.num_computed

    def register(self, sequence: Sequence, num_positions: int) -> None:
        """Makes a sequence's full pages findable.

        Args:
            num_positions: positions whose tokens are known and whose step has been launched.
        """
        if not self._is_on:
            return
        table = sequence.table
        num_pages = num_positions // self._pages.page_size
        if num_pages <= table.num_registered:
            return
        digests = sequence.digests
        if num_pages > len(digests):
            self._extend(digests, sequence.root, sequence.token_ids, num_pages)
        for group, pages in enumerate(table.pages):
            pool = self._pages.pools[group]
            first = max(table.num_registered, table.num_behind[group])
            new = pages[first:num_pages], digests[first:num_pages]
            for place, found in pool.register_several(*new):
                index = first + place
                pool.share(found)
                pool.release(pages[index])
                pages[index] = found
                self._moved.append((sequence, group, index, found))
        table.num_registered = num_pages

    def tell(self, plan: Plan) -> None:
        """Puts into a plan the entries of running sequences that `register` changed before it.

        Those of the plan's own chunks are for the next one: this step still writes the old pages.
        """
        if not self._moved:
            return
        joined = {join.slot for join in plan.joins}  # their whole tables are in the plan
        for sequence, group, index, page in self._moved:
            pages = sequence.table.pages[group]
            if sequence.state not in _IN_SLOT or sequence.slot in joined:
                continue
            if index < len(pages) and pages[index] == page:
                plan.enter(sequence.slot, [(group, index, page)])
        self._moved.clear()

    def _may_look(self, sequence: Sequence) -> bool:
        """Not for pages that come back from the host, which are written, or that must be run."""
        return self._is_on and sequence.host_table is None and not sequence.owes_prompt_logprobs

    def _reach(
        self,
        table: PageTable,
        digests: list[bytes],
        root: bytes,
        token_ids: Seq[int],
        start: int,
        limit: int,
        on_host: bool = False,
    ) -> int:
        """How many pages a sequence could have, of which it holds `start`; at most `limit`.

        Args:
            on_host: counting those that would have to be loaded from there.
        """
        if not (self._windowed or on_host):
            return self._reach_all(digests, root, token_ids, start, limit)
        groups = list(zip(self._pages.pools, self._pages.windows, strict=True))
        runs = [start - behind for behind in table.num_behind]  # pages there without a gap, to here
        end = start
        for index in range(start, limit):
            if index >= len(digests):
                self._extend(digests, root, token_ids, min(index + _BLOCK, limit))
            for group, (pool, window) in enumerate(groups):
                digest = digests[index]
                if pool.find(digest) is not None or (on_host and self._spill.has(group, digest)):
                    runs[group] += 1
                elif window is None:
                    return end
                else:
                    runs[group] = 0
            query = (index + 1) * self._pages.page_size
            if all(runs[g] > index - self._pages.num_behind(g, query) for g in self._windowed):
                end = index + 1
        return end

    def _reach_all(
        self, digests: list[bytes], root: bytes, token_ids: Seq[int], start: int, limit: int
    ) -> int:
        """As `_reach`, where every group sees all positions and only the device is asked."""
        while start < limit:
            if start >= len(digests):
                self._extend(digests, root, token_ids, min(start + _BLOCK, limit))
            end = min(limit, len(digests))
            reached = end
            for pool in self._pages.pools:
                reached = pool.end_of_found(digests, start, reached)
            if reached < end:
                return reached
            start = end
        return start

    def _may_load(self, digests: list[bytes], on_device: int, start: int, end: int) -> bool:
        """Whether pages are free for what must be loaded to come to `end`, and it pays.

        Args:
            on_device: pages that could be had without loading any.
        """
        query = end * self._pages.page_size
        missing = []
        for group, pool in enumerate(self._pages.pools):
            first = max(self._pages.num_behind(group, query), start)
            found = [pool.find(digest) for digest in digests[first:end]]
            missing.append(found.count(None))
            kept = sum(page is not None and pool.num_holders(page) == 0 for page in found)
            if missing[group] > pool.num_free - kept:
                return False
        return self._costs.swap_pays((end - on_device) * self._pages.page_size, missing)

    def _hold(
        self, table: PageTable, digests: list[bytes], start: int, end: int
    ) -> list[tuple[int, int, int]]:
        """Puts the pages found behind the first `start` ones of a table.

        A page that the sequence had begun to fill itself gives way. All that were found are held or
        reserved before a page is taken to load to, so that none is evicted for it.
        """
        query = end * self._pages.page_size
        for pool, pages in zip(self._pages.pools, table.pages, strict=True):
            for page in pages[start:]:
                pool.release(page)
            del pages[start:]
        self._pages.release_behind(table, query)
        entries = []
        for group, pages in enumerate(table.pages):
            pool = self._pages.pools[group]
            first = max(self._pages.num_behind(group, query), start)
            if first > start:
                table.num_behind[group] = first
                pages += [0] * (first - start)
            found = [pool.find(digest) for digest in digests[first:end]]
            on_host: dict[int, int] = {}
            for index, page in enumerate(found, first):
                if page is None:
                    on_host[index] = self._spill.reserve(group, digests[index])
                else:
                    pool.share(page)
            for index, page in enumerate(found, first):
                if page is None:
                    page = pool.take()
                    self._spill.load(group, on_host[index], page)
                    pool.register(page, digests[index])
                pages.append(page)
                entries.append((group, index, page))
        table.num_registered = end
        return entries

    def _extend(
        self, digests: list[bytes], root: bytes, token_ids: Seq[int], num_pages: int
    ) -> None:
        extend_digests(digests, root, token_ids, num_pages, self._pages.page_size)
