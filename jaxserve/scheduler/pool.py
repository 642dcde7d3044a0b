"""KV pages of one cache group: reference counts, and which can be found by their content.

Invariants: page 0 is never handed out (padding writes go there). A page can be taken exactly when
its reference count is 0.

A full page may be registered under a digest of its content (`scheduler.prefix`). It is then
findable, never written again, and kept when its last holder leaves, until it is the least recently
used one and a page is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

#: The share of a pool that may be freed before it is needed, while the device works.
STOCK = 1 / 64

#: Told of a page that is about to lose its content: its number and its digest.
OnEvict = Callable[[int, bytes], None]


class PagePool:
    """Reference counts, free list and digests of one group's pages.

    Attributes:
        capacity: pages that can be handed out; page 0 is not among them.
        num_evicted: findable pages that were taken for other content so far.
        on_evict: called before a findable page is handed out for other content.
    """

    __slots__ = (
        "_digests",
        "_free",
        "_kept",
        "_num_taken",
        "_num_wanted",
        "_references",
        "_registered",
        "capacity",
        "num_evicted",
        "on_evict",
    )

    def __init__(self, num_pages: int, on_evict: OnEvict | None = None) -> None:
        self.capacity = num_pages - 1
        self.num_evicted = 0
        self.on_evict = on_evict
        self._free = list(range(num_pages - 1, 0, -1))
        self._num_taken = self._num_wanted = 0  # since `stock` was called; and by it
        self._references = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages  # of the registered pages
        self._registered: dict[bytes, int] = {}
        # Registered and held by nobody, least recently used first. A plain dict would search for
        # its first entry over all that were deleted before it.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.capacity - len(self._free) - len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that can still be found."""
        return len(self._kept)

    def take(self) -> int:
        """A page without content, held once. The caller has looked at `num_free`."""
        if not self._free:
            self._evict(1)
        self._num_taken += 1
        page = self._free.pop()
        self._references[page] = 1
        return page

    def take_several(self, num_pages: int) -> list[int]:
        """So many pages without content, each held once, likewise."""
        free, references = self._free, self._references
        if num_pages > len(free):
            self._evict(num_pages - len(free))
        self._num_taken += num_pages
        first = len(free) - num_pages
        taken = free[first:]
        del free[first:]
        for page in taken:
            references[page] = 1
        return taken

    def stock(self) -> None:
        """Frees kept pages ahead: twice as many as are taken between two calls, within `STOCK`."""
        self._num_wanted = max(2 * self._num_taken, self._num_wanted * 7 // 8)
        self._num_taken = 0
        wanted = min(self._num_wanted, int(self.capacity * STOCK))
        missing = min(wanted - len(self._free), len(self._kept))
        if missing > 0:
            self._evict(missing)

    def share(self, page: int) -> None:
        """One more holder of a page that is held or can be found."""
        if self._references[page] == 0:
            assert page in self._kept, f"page {page} is free"
            del self._kept[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees it, or leaves it to be found."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] -= 1
        if self._references[page] == 0:
            if self._digests[page] is None:
                self._free.append(page)
            else:
                self._kept[page] = None

    def release_several(self, pages: Iterable[int]) -> None:
        """One holder less of each."""
        references, digests = self._references, self._digests
        kept, free = self._kept, self._free
        for page in pages:
            if references[page] != 1:
                self.release(page)
                continue
            references[page] = 0
            if digests[page] is None:
                free.append(page)
            else:
                kept[page] = None

    def count_freed(self, pages: Iterable[int], leaving: dict[int, int]) -> int:
        """How many of these pages nobody would hold any more if one holder of each left.

        Args:
            leaving: of shared pages, how many holders are counted as gone; goes on to be counted.
        """
        references = self._references
        num_freed = 0
        for page in pages:
            if references[page] == 1:
                num_freed += 1
            else:
                leaving[page] = leaving.get(page, 0) + 1
                num_freed += leaving[page] == references[page]
        return num_freed

    def num_holders(self, page: int) -> int:
        """How often the page is held."""
        return self._references[page]

    def find(self, digest: bytes) -> int | None:
        """The page of this content, held or kept."""
        return self._registered.get(digest)

    def end_of_found(self, digests: Sequence[bytes], start: int, end: int) -> int:
        """The first place from `start` on whose content is not there; `end` if all are.

        Args:
            digests: at least `end` of them.
        """
        registered = self._registered
        for index in range(start, end):
            if digests[index] not in registered:
                return index
        return end

    def register(self, page: int, digest: bytes) -> int:
        """Makes a held page findable, unless another has the same content.

        Returns:
            The page that is found under the digest from now on.
        """
        found = self._registered.setdefault(digest, page)
        if found == page:
            known = self._digests[page]
            assert known is None or known == digest, f"page {page} has two contents"
            self._digests[page] = digest
        return found

    def register_several(
        self, pages: Sequence[int], digests: Sequence[bytes]
    ) -> list[tuple[int, int]]:
        """Makes held pages findable, each unless another has the same content.

        Args:
            digests: of the pages, in their order.

        Returns:
            (index, page) of the contents that another page has; it is found from now on.
        """
        registered, known = self._registered, self._digests
        elsewhere = []
        for index, digest in enumerate(digests):
            page = pages[index]
            found = registered.setdefault(digest, page)
            if found == page:
                assert known[page] in (None, digest), f"page {page} has two contents"
                known[page] = digest
            else:
                elsewhere.append((index, found))
        return elsewhere

    def is_registered(self, page: int) -> bool:
        """Whether the page can be found, and so must not be written."""
        return self._digests[page] is not None

    def forget(self, page: int) -> None:
        """A registered page that is held can be found no more, and may be written."""
        digest = self._digests[page]
        assert digest is not None, f"page {page} cannot be found"
        self._digests[page] = None
        del self._registered[digest]

    def _evict(self, num_pages: int) -> None:
        """Frees so many kept pages, the least recently used ones."""
        kept, digests, registered = self._kept, self._digests, self._registered
        on_evict, free = self.on_evict, self._free
        for _ in range(num_pages):
            page, _ = kept.popitem(last=False)
            digest = digests[page]
            assert digest is not None, f"page {page} cannot be found"
            digests[page] = None
            del registered[digest]
            free.append(page)
            if on_evict is not None:
                on_evict(page, digest)
        self.num_evicted += num_pages
