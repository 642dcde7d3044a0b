"""Spans on their way to the collector: a bounded queue, and a thread that sends from it.

Who offers spans never waits: where the collector is slow or gone, the oldest that wait are dropped,
and counted. A batch that the collector does not take is tried again, with growing pauses, a few
times; then it is dropped too, since it may be the batch that is wrong. The first failure, and the
return, are said once each.

Invariant: each span that was offered is counted as sent or dropped, or waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from jaxserve.telemetry.tracing.spans import Span

logger = logging.getLogger(__name__)

#: Spans that are sent together (about), and how long the first of them waits for others.
MAX_BATCH = 512
LINGER_S = 2.0
#: How often a batch is sent before it is dropped, and the longest pause between.
MAX_ATTEMPTS = 4
MAX_PAUSE_S = 8.0
#: At the end, how long what waits may take to be sent.
FAREWELL_S = 3.0
#: While it fails, it is said again after so long.
_QUIET_S = 300.0

#: Sends spans with the wall clock's offset; whether they were taken. May block.
Send = Callable[[Sequence[Span], int], bool]


class Export:
    """See the module. From `start` to `close`; only `close` waits for anything.

    Args:
        send: blocks for a bounded time.
        stop: makes a `send` that blocks come to an end soon.
        max_spans: that wait, at most.
        where: the collector, for the log.
        clock_s: monotonic.
        pause_s: before the second attempt of a batch; twice that before the third …

    Attributes:
        dropped: spans, by reason: "full" or "refused".
        num_sent: spans that the collector took.
    """

    def __init__(
        self,
        send: Send,
        stop: Callable[[], None],
        max_spans: int,
        where: str,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        pause_s: float = 1.0,
    ) -> None:
        self.dropped: Counter[str] = Counter(full=0, refused=0)
        self.num_sent = 0
        self._send = send
        self._stop = stop
        self._max_spans = max_spans
        self._max_batch = min(MAX_BATCH, max_spans // 2)  # the newest have room beside it
        self._where = where
        self._clock_s = clock_s
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._waiting: deque[tuple[list[Span], int]] = deque()  # a trace, the clock's offset
        self._num_waiting = 0
        self._num_in_flight = 0
        self._closing = False
        self._failing_since_s: float | None = None
        self._said_s = 0.0
        self._thread = threading.Thread(target=self._run, name="jaxserve traces", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Spans that were offered and have not been sent or dropped."""
        return self._num_waiting + self._num_in_flight

    def start(self) -> None:
        """Begins to send."""
        self._thread.start()

    def offer(self, spans: list[Span], offset_ns: int) -> None:
        """Has a request's spans sent, if there is room; makes room by dropping the oldest."""
        with self._changed:
            if len(spans) > self._max_spans:
                self.dropped["full"] += len(spans)
                return
            is_first = not self._waiting
            self._waiting.append((spans, offset_ns))
            self._num_waiting += len(spans)
            while self._num_waiting + self._num_in_flight > self._max_spans and self._waiting:
                dropped, _ = self._waiting.popleft()
                self._num_waiting -= len(dropped)
                self.dropped["full"] += len(dropped)
            if is_first or self._num_waiting >= self._max_batch:
                self._changed.notify()

    def close(self, farewell_s: float = FAREWELL_S) -> None:
        """Sends what waits, within a moment; what is left counts as dropped. Blocks."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(farewell_s)
        if self._thread.is_alive():
            self._stop()
        with self._changed:
            self.dropped["refused"] += self._num_waiting
            self._waiting.clear()
            self._num_waiting = 0

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            batch = self._next_batch()
            if not batch:
                return
            num_spans = sum(len(spans) for spans, _ in batch)
            sent = self._deliver(batch)
            with self._changed:
                self._num_in_flight = 0
                if sent:
                    self.num_sent += num_spans
                else:
                    self.dropped["refused"] += num_spans

    def _next_batch(self) -> list[tuple[list[Span], int]]:
        """Traces that have come, once there are enough or the first has waited; none at the end."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return []
                self._changed.wait()
            deadline_s = self._clock_s() + LINGER_S
            while self._num_waiting < self._max_batch and not self._closing:
                left_s = deadline_s - self._clock_s()
                if left_s <= 0 or not self._changed.wait(left_s):
                    break
            batch: list[tuple[list[Span], int]] = []
            while self._waiting and self._num_in_flight < self._max_batch:
                batch.append(self._waiting.popleft())
                self._num_waiting -= len(batch[-1][0])
                self._num_in_flight += len(batch[-1][0])
            return batch

    def _deliver(self, batch: list[tuple[list[Span], int]]) -> bool:
        """Whether the collector took a batch, at last."""
        for attempt in range(MAX_ATTEMPTS):
            if attempt and not self._pause(min(self._pause_s * 2 ** (attempt - 1), MAX_PAUSE_S)):
                return False
            if self._try(batch):
                self._say_that_it_works()
                return True
            self._say_that_it_fails()
        return False

    def _try(self, batch: list[tuple[list[Span], int]]) -> bool:
        """One attempt; spans with one offset of the clock go together."""
        by_offset: dict[int, list[Span]] = {}
        for spans, offset_ns in batch:
            by_offset.setdefault(offset_ns, []).extend(spans)
        try:
            return all(self._send(spans, offset_ns) for offset_ns, spans in by_offset.items())
        except Exception as error:  # whatever the library raises ends no thread
            logger.warning("spans could not be sent: %s: %s", type(error).__name__, error)
            return False

    def _pause(self, pause_s: float) -> bool:
        """Waits before the next attempt; False where there is no time for one."""
        deadline_s = self._clock_s() + pause_s
        with self._changed:
            while not self._closing:
                left_s = deadline_s - self._clock_s()
                if left_s <= 0:
                    return True
                self._changed.wait(left_s)
            return False

    def _say_that_it_fails(self) -> None:
        now_s = self._clock_s()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        elif now_s - self._said_s < _QUIET_S:
            return
        self._said_s = now_s
        logger.warning(
            "the collector at %s takes no spans; serving goes on, and the oldest that wait are "
            "dropped (%d so far)",
            self._where,
            sum(self.dropped.values()),
        )

    def _say_that_it_works(self) -> None:
        if self._failing_since_s is None:
            return
        logger.warning(
            "the collector at %s takes spans again, after %.0f s; %d were dropped",
            self._where,
            self._clock_s() - self._failing_since_s,
            sum(self.dropped.values()),
        )
        self._failing_since_s = None
