"""Choices of one request: the first computes the prompt, the others wait and share its pages.

The first choice (the leader) goes to the queue, the others (its followers) are held back. When the
leader's prompt is launched they join the queue, each with the prompt's pages. A waiting sequence
that holds pages, these or cached ones, may lose them again when pages run out; it then computes
its prompt itself.

Invariant: a follower is HELD exactly while it stands in its leader's `followers`.
"""

from __future__ import annotations

from jaxserve.scheduler.pages import PageAllocator
from jaxserve.scheduler.queue import WaitingQueue
from jaxserve.scheduler.sequence import Sequence, SequenceState


class Choices:
    """Followers that wait for a prompt, and those that hold one's pages while they wait.

    Attributes:
        num_held: sequences in state HELD.
    """

    def __init__(self, pages: PageAllocator, waiting: WaitingQueue) -> None:
        self.num_held = 0
        self._pages = pages
        self._waiting = waiting
        self._holders: dict[Sequence, None] = {}  # in the queue, with shared pages
        self._forked: list[Sequence] = []

    def lead(self, sequences: list[Sequence]) -> None:
        """The first of these goes to the queue, the others wait for its prompt."""
        if not sequences:
            return
        leader, *followers = sequences
        if leader.state is SequenceState.HELD:
            self.num_held -= 1
        for follower in followers:
            if follower.state is not SequenceState.HELD:
                self.num_held += 1
            follower.state = SequenceState.HELD
            follower.leader = leader
        leader.leader = None
        leader.followers = followers
        leader.state = SequenceState.WAITING
        self._waiting.push(leader)

    def desert(self, follower: Sequence) -> None:
        """A held sequence waits no more."""
        assert follower.leader is not None
        follower.leader.followers.remove(follower)
        self.num_held -= 1

    def fork(self, leader: Sequence) -> None:
        """The prompt is launched: followers share its pages, from the next plan on.

        All but the last prompt token are shared; that one each choice computes itself, to sample
        from it. The page it is written to is copied first, unless nobody else holds it any more.
        The leader goes on in the original: followers read only positions before its writes.
        """
        num_shared = leader.prompt_len - 1
        for follower in leader.followers:
            follower.leader = None
            follower.has_begun = True
            follower.state = SequenceState.WAITING
            self.num_held -= 1
            self._forked.append(follower)
            if num_shared > 0:
                follower.table = self._pages.share(leader.table, num_shared)
                follower.num_computed = num_shared
                follower.digests = leader.digests[: num_shared // self._pages.page_size]
                self._holders[follower] = None
        leader.followers = []

    def queue_forked(self) -> None:
        """Those that `fork` let go join the queue: their prompt is in the plan just made."""
        for sequence in self._forked:
            self._waiting.push(sequence)
        self._forked = []

    def hold(self, sequence: Sequence) -> None:
        """A sequence in the queue has found cached pages, and holds them while it waits."""
        self._holders[sequence] = None

    def leaves_queue(self, sequence: Sequence) -> None:
        """A sequence is not in the queue any more; its pages are its own affair."""
        self._holders.pop(sequence, None)

    def reclaim(self, exempt: Sequence | None = None, above: float = float("-inf")) -> bool:
        """Takes the pages from a waiting sequence that holds some; whether there was one.

        The one that came last loses them first.

        Args:
            above: only one of a worse level than this.
        """
        for holder in reversed(self._holders):
            if holder is not exempt and holder.level > above:
                del self._holders[holder]
                self._pages.release(holder.table)
                holder.num_computed = 0
                return True
        return False
