"""Counts the verdicts on all requests, and knows which of those that run are overdue.

A request is counted once, at its end, in the bucket of that moment. While it runs it is not in the
counts; if it has had no sign of life for too long, it is *overdue*, and counts as bad beside them
until its end says what it was. So a hang is seen while it lasts, and nothing is counted twice.

Invariants: the book takes its time from its caller; a request that was counted before a restart
(`restored`) is not counted again when its record comes once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jaxserve.protocol.records import Begun, FirstToken, Outcome, RequestRecord
from jaxserve.telemetry.slo.indicator import Indicator, Labels
from jaxserve.telemetry.slo.judge import (
    BAD,
    Verdict,
    awaits_first_token,
    judge,
    overdue_after_ns,
)
from jaxserve.telemetry.slo.objective import Objective
from jaxserve.telemetry.slo.series import Series

#: Fine buckets for windows of hours, coarse ones for days.
FINE_S, COARSE_S = 5, 300
FINE_WINDOWS_S = (300, 1800, 3600, 6 * 3600)
DAYS_S = 3 * 86400
#: Columns of what is counted over all objectives: see `Book.goodput`.
COUNTED_REQUESTS, GOOD_REQUESTS, GOOD_TOKENS = 0, 1, 2
GOODPUT_WINDOWS_S = (300, 3600)

_APART = frozenset({Outcome.LEFT, Outcome.REFUSED, Outcome.LIMITED})
#: A late report is no late request: how much more than a promised time an unfinished one gets.
_REPORT_SLACK_NS = 10**9
#: What runs for longer is forgotten: its record was lost, or will still come.
_LONGEST_NS = 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Count:
    """Good and bad requests of a window."""

    good: int
    bad: int

    @property
    def total(self) -> int:
        """All that count."""
        return self.good + self.bad


class Tally:
    """The counts of one indicator.

    Attributes:
        totals: by verdict, since ever: what counters export.
        overdue: unfinished requests that count as bad at present.
    """

    def __init__(self, indicator: Indicator, periods_s: Iterable[int]) -> None:
        self.indicator = indicator
        self.fine = Series(FINE_S, FINE_WINDOWS_S, len(Verdict))
        self.coarse = Series(COARSE_S, {DAYS_S, *periods_s}, len(Verdict))
        self.totals = [0] * len(Verdict)
        self.overdue = 0

    def add(self, at_s: float, verdict: Verdict) -> None:
        """One request has ended."""
        self.fine.add(at_s, verdict)
        self.coarse.add(at_s, verdict)
        self.totals[verdict] += 1

    def advance(self, now_s: float) -> None:
        """Time has gone on."""
        self.fine.advance(now_s)
        self.coarse.advance(now_s)

    def verdicts(self, window_s: int) -> list[int]:
        """Requests of a window by verdict, without those that are overdue."""
        series = self.fine if window_s in FINE_WINDOWS_S else self.coarse
        return series.total(window_s)

    def count(self, window_s: int) -> Count:
        """Good and bad requests of a window, those that are overdue included."""
        verdicts = self.verdicts(window_s)
        bad = sum(verdicts[verdict] for verdict in BAD)
        return Count(verdicts[Verdict.GOOD], bad + self.overdue)


@dataclass(slots=True)
class Running:
    """A request that has not ended.

    Attributes:
        first_ns: when its first token came; 0 before.
    """

    begun: Begun
    first_ns: int = 0


class Book:
    """All tallies, and the requests that run.

    Args:
        overdue_ns: how long a request may be without a sign of life, for the availability; 0 for
            ever.

    Attributes:
        tallies: by the indicator's key.
        running: by the request's id.
        goodput: requests but those that stand apart, those of them that met all their objectives,
            and their tokens.
        num_good_requests, num_good_tokens: the last two, since ever.
    """

    def __init__(self, objectives: Sequence[Objective], overdue_ns: int) -> None:
        periods_s: dict[Indicator, set[int]] = {}
        for objective in objectives:
            periods_s.setdefault(objective.indicator, set()).add(objective.period_s)
        self.tallies = {
            indicator.key: Tally(indicator, periods) for indicator, periods in periods_s.items()
        }
        self.running: dict[str, Running] = {}
        self.goodput = Series(FINE_S, GOODPUT_WINDOWS_S, 3)
        self.num_good_requests = self.num_good_tokens = 0
        self._overdue_ns = overdue_ns
        self._counted: list[str] = []
        self._restored: frozenset[str] = frozenset()
        self._covering = lru_cache(4096)(self._find_covering)

    def tally(self, objective: Objective) -> Tally:
        """The counts that an objective is judged by."""
        return self.tallies[objective.indicator.key]

    # ------------------------------------------------------------------ requests

    def begun(self, begun: Begun) -> None:
        """A request runs."""
        if begun.request_id not in self._restored:
            self.running.setdefault(begun.request_id, Running(begun))

    def first_token(self, first: FirstToken) -> None:
        """It has its first token."""
        running = self.running.get(first.request_id)
        if running is not None:
            running.first_ns = first.at_ns

    def ended(self, record: RequestRecord, at_s: float) -> None:
        """A request has ended, at that moment of the timeline."""
        self.running.pop(record.request_id, None)
        if record.request_id in self._restored:
            return
        self._counted.append(record.request_id)
        labels = Labels(
            route=record.route,
            model=record.model if record.read_ns else "",
            tenant=record.tenant,
            priority=record.priority,
            adapter=record.adapter,
        )
        is_good = record.outcome is Outcome.DONE
        is_counted = record.outcome not in _APART
        for tally in self._covering(labels):
            verdict = judge(tally.indicator, record, self._overdue_ns)
            tally.add(at_s, verdict)
            if verdict in BAD:
                is_good, is_counted = False, True
        if is_counted:
            self.goodput.add(at_s, COUNTED_REQUESTS)
        if is_good:
            self.goodput.add(at_s, GOOD_REQUESTS)
            self.goodput.add(at_s, GOOD_TOKENS, record.completion_tokens)
            self.num_good_requests += 1
            self.num_good_tokens += record.completion_tokens

    def lost(self, begun: Iterable[Begun], at_s: float) -> None:
        """The server ended before these did."""
        for request in begun:
            for tally in self._covering(_labels(request)):
                tally.add(at_s, Verdict.LOST)

    # ------------------------------------------------------------------ time

    def advance(self, now_s: float, now_ns: int) -> None:
        """Time has gone on: what is overdue now, and what is too old to look at.

        Args:
            now_s: on the timeline; now_ns: the same on CLOCK_MONOTONIC.
        """
        self.goodput.advance(now_s)
        for tally in self.tallies.values():
            tally.advance(now_s)
            tally.overdue = 0
        forgotten = []
        for request_id, running in self.running.items():
            age_ns = now_ns - running.begun.arrived_ns
            if age_ns > _LONGEST_NS:
                forgotten.append(request_id)
                continue
            for tally in self._covering(_labels(running.begun)):
                tally.overdue += self._is_overdue(tally.indicator, running, age_ns)
        for request_id in forgotten:
            del self.running[request_id]

    def _is_overdue(self, indicator: Indicator, running: Running, age_ns: int) -> bool:
        after_ns = overdue_after_ns(indicator, self._overdue_ns)
        if after_ns is None:
            return False
        if running.first_ns and awaits_first_token(indicator, running.begun.route):
            return False
        slack_ns = _REPORT_SLACK_NS if indicator.kind.is_latency else 0
        return age_ns >= after_ns + slack_ns

    # ------------------------------------------------------------------ restarts

    def counted(self) -> list[str]:
        """Requests that were counted since the last call."""
        counted, self._counted = self._counted, []
        return counted

    def uncounted(self, request_ids: list[str]) -> None:
        """Has `counted` give these once more: they could not be kept."""
        self._counted = request_ids + self._counted

    def restored(self, counted: frozenset[str]) -> None:
        """Requests that were counted before a restart."""
        self._restored = counted

    def _find_covering(self, labels: Labels) -> tuple[Tally, ...]:
        return tuple(t for t in self.tallies.values() if t.indicator.covers(labels))


def _labels(begun: Begun) -> Labels:
    return Labels(
        route=begun.route,
        model=begun.model,
        tenant=begun.tenant,
        priority=begun.priority,
        adapter=begun.adapter,
    )
