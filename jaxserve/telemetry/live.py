"""What the server did of late, second by second: what the console draws.

Each record, step and status is counted in the second that it belongs to, and in its minute
(`telemetry.points`). Seconds are of the monotonic clock: a wall clock that is set changes where the
points are drawn and nothing else.

Invariant: memory is bounded, whatever comes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxserve.config import TelemetryConfig
from jaxserve.protocol.records import Begun, Outcome, RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.telemetry.points import Ring, Window, columns_of

#: Of each ring: seconds a point, and points.
RINGS = ((1, 900), (60, 1440))
#: Seconds that may still change after they have passed, since reports come late.
LATE_S = 5
#: A second's quantiles are of so many seconds up to it, since few requests end in one.
WINDOW_S = 10
#: For so long a queue, or pages, are taken to be what they were last seen to be.
CARRY_S = 3
#: Requests that are remembered whole; and tenants, news and requests that go on.
MAX_RECORDS, MAX_TENANTS, MAX_NEWS, MAX_OPEN = 400, 200, 50, 10_000
#: All tenants beyond `MAX_TENANTS`.
OTHERS = "(others)"
_BAD = (Outcome.FAILED, Outcome.SHED, Outcome.EXPIRED)


@dataclass(slots=True)
class Tenant:
    """What a tenant's requests came to since the observer began."""

    requests: int = 0
    bad: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Live:
    """See the module.

    Args:
        clock_ns: monotonic. wall_s: seconds since 1970.
    """

    def __init__(self, clock_ns: Callable[[], int], wall_s: Callable[[], float]) -> None:
        self._clock_ns = clock_ns
        self._wall_s = wall_s
        self._started_ns = clock_ns()
        self._rings = {step_s: Ring(step_s, size) for step_s, size in RINGS}
        self._records: OrderedDict[str, tuple[int, RequestRecord]] = OrderedDict()
        self._num_records = 0
        self._open: OrderedDict[str, int] = OrderedDict()
        self._tenants: dict[str, Tenant] = {}
        self._news: deque[dict[str, Any]] = deque(maxlen=MAX_NEWS)
        self._status: EngineStatus | None = None

    # ------------------------------------------------------------------ what comes

    def begun(self, begun: Begun) -> None:
        """A request has been let in."""
        self._open[begun.request_id] = begun.arrived_ns
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)

    def ended(self, record: RequestRecord) -> None:
        """A request has ended."""
        self._open.pop(record.request_id, None)
        self._num_records += 1
        self._records[record.request_id] = self._num_records, record
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        bad = record.outcome in _BAD
        for ring in self._rings.values():
            point = ring.at(record.done_ns)
            if point is None:
                continue
            point.counts["requests"] += 1
            if bad:
                point.counts["bad"] += 1
            elif record.outcome in ("limited", "refused", "left"):
                point.counts[record.outcome] += 1
            latencies = point.latencies
            if record.ttft_ns is not None:
                latencies["ttft"].add(record.ttft_ns / 1e6)
            if record.tpot_ns is not None:
                latencies["tpot"].add(record.tpot_ns / 1e6)
            if record.outcome == Outcome.DONE:
                latencies["total"].add((record.done_ns - record.arrived_ns) / 1e6)
        name = record.tenant
        if name not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            name = OTHERS
        tenant = self._tenants.setdefault(name, Tenant())
        tenant.requests += 1
        tenant.bad += bad
        tenant.prompt_tokens += record.prompt_tokens
        tenant.completion_tokens += record.completion_tokens

    def step(self, stats: StepStats) -> None:
        """The engine has made a device call."""
        tokens = stats.decode_tokens - (stats.draft_tokens - stats.draft_accepted_tokens)
        for ring in self._rings.values():
            point = ring.at(stats.at_ns)
            if point is None:
                continue
            counts = point.counts
            counts["steps"] += 1
            counts["prefill_tokens"] += stats.prefill_tokens
            counts["decode_tokens"] += tokens
            counts["flops"] += stats.flops
            counts["bytes"] += stats.bytes
            point.device_ns += stats.device_ns
            point.idle_ns += stats.idle_ns
            point.rows += stats.rows
            point.gauge(stats)

    def peaks(self, config: TelemetryConfig) -> dict[str, float] | None:
        """FLOPs and bytes a second that the devices can do at most, 0 where unknown; None: both."""
        device = self._status.device if self._status is not None else None
        flops = config.device_flops_per_s or (device.flops_per_s if device else 0.0)
        num_bytes = config.device_bytes_per_s or (device.bytes_per_s if device else 0.0)
        if not flops and not num_bytes:
            return None
        count = device.count if device is not None else 1
        return {"flops": flops * count, "bytes": num_bytes * count}

    def status(self, status: EngineStatus) -> None:
        """What the engine says of itself."""
        self._status = status
        if status.state != "ready" or not status.at_ns:
            return
        for ring in self._rings.values():
            point = ring.at(status.at_ns)
            if point is not None:
                point.gauge(status)

    def news(self, kind: str, at_ns: int, subject: str) -> None:
        """Something happened."""
        self._news.append({"kind": kind, "at_ns": at_ns, "subject": subject})

    # ------------------------------------------------------------------ what is told

    def record(self, request_id: str) -> RequestRecord | None:
        """One of the last requests; None where it is not known, any more or yet."""
        found = self._records.get(request_id)
        return found[1] if found is not None else None

    def series(self, step_s: int, since: int = -1) -> dict[str, Any]:
        """Points as columns, oldest first; None where nothing was measured.

        Args:
            step_s: of a point: 1, or 60.
            since: number of the newest point that the asker has; what may have changed since is
                told again. Everything where it is of another machine's life.

        Returns:
            `first`: number of the first point; `next`: what to give as `since` the next time;
            `end_s`: wall clock at the end of the last point; `columns`: rates a second,
            milliseconds, shares between 0 and 1, and the most of what was seen of queue and pages.
        """
        ring = self._rings[step_s]
        now_ns = self._clock_ns()
        last = ring.number(now_ns) - (step_s == 1)  # a second is told once it is over
        first = max(last - ring.size + 2, ring.number(self._started_ns))
        if 0 <= since <= last:
            first = max(first, since + 1 - (LATE_S if step_s == 1 else 1))
        columns: dict[str, list[float | None]] = {}
        window = Window(max(1, WINDOW_S // step_s))
        seen: tuple[int, dict[str, int]] | None = None
        for number in range(first - WINDOW_S, last + 1):
            point = ring.find(number)
            window.take(point)
            if point is not None and point.gauges:
                seen = number, point.gauges
            if number < first:
                continue
            carried = seen[1] if seen and (number - seen[0]) * step_s <= CARRY_S else {}
            elapsed_s = self._elapsed_s(number, ring.step_s, now_ns)
            values = columns_of(point, carried, elapsed_s) | window.quantiles()
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        end_ns = (last + 1) * step_s * 1_000_000_000
        return {
            "step_s": step_s,
            "first": first,
            "next": last,
            "end_s": self._wall_of(end_ns),
            "columns": columns,
        }

    def requests(self, since: int = 0) -> dict[str, Any]:
        """The last requests, oldest first: those after number `since` (which `next` is for)."""
        rows = [self._row(record) for number, record in self._records.values() if number > since]
        return {"next": self._num_records, "rows": rows}

    def now(self) -> dict[str, Any]:
        """What is so at this moment."""
        now_ns = self._clock_ns()
        oldest_ns = min(self._open.values(), default=now_ns)
        return {
            "life": str(self._started_ns),  # of this observer
            "now_s": self._wall_s(),
            "observed_s": (now_ns - self._started_ns) / 1e9,
            "requests_ended": self._num_records,
            "requests_open": len(self._open),
            "oldest_open_s": (now_ns - oldest_ns) / 1e9,
            "engine": _engine(self._status, now_ns),
            "tenants": [
                {
                    "tenant": name,
                    "requests": tenant.requests,
                    "bad": tenant.bad,
                    "prompt_tokens": tenant.prompt_tokens,
                    "completion_tokens": tenant.completion_tokens,
                }
                for name, tenant in self._tenants.items()
            ],
            "news": [
                {"kind": n["kind"], "subject": n["subject"], "at_s": self._wall_of(n["at_ns"])}
                for n in self._news
            ],
        }

    def _elapsed_s(self, number: int, step_s: int, now_ns: int) -> float:
        """How much of a point's time has been seen; the first and the last may be cut."""
        begin_ns = number * step_s * 1_000_000_000
        end_ns = min(begin_ns + step_s * 1_000_000_000, now_ns)
        return max(0.0, (end_ns - max(begin_ns, self._started_ns)) / 1e9)

    def _wall_of(self, at_ns: int) -> float:
        return self._wall_s() - (self._clock_ns() - at_ns) / 1e9

    def _row(self, record: RequestRecord) -> dict[str, Any]:
        return {
            "id": record.request_id,
            "at_s": self._wall_of(record.arrived_ns),
            "route": record.route,
            "model": record.model,
            "adapter": record.adapter,
            "tenant": record.tenant,
            "status": record.status,
            "outcome": str(record.outcome),
            "error": record.error,
            "ttft_ms": _ms(record.ttft_ns),
            "tpot_ms": _ms(record.tpot_ns),
            "total_ms": _ms(record.done_ns - record.arrived_ns),
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
        }


def _engine(status: EngineStatus | None, now_ns: int) -> dict[str, Any] | None:
    """What the page shows of the engine's last word; None before it has said any."""
    if status is None:
        return None
    return {
        "state": status.state,
        "error": status.error,
        "pid": status.pid,
        "age_s": (now_ns - status.at_ns) / 1e9 if status.at_ns else None,
        "step_age_s": status.step_age_s,
        "model": status.model.name if status.model is not None else None,
        "max_context": status.model.max_context if status.model is not None else None,
        "embeds": status.embedding.name if status.embedding is not None else None,
        **{
            name: getattr(status, name)
            for name in (
                *("running", "waiting", "swapped", "max_rows", "pages_used", "pages_cached"),
                *("pages_total", "host_pages_used", "host_pages_total", "compiles_after_warmup"),
                *("prefix_lookup_tokens", "prefix_hit_tokens", "adapter_slots", "adapters_held"),
                *("adapter_joins", "adapter_hits", "adapter_loads", "shed"),
            )
        },
    }


def _ms(value_ns: float | None) -> float | None:
    return round(value_ns / 1e6, 3) if value_ns is not None else None
