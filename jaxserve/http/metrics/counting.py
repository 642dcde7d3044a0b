"""What one HTTP process counts: its requests and their tokens, and as worker 0 the engine's steps.

What happens for each token or step finds its cells by number; what happens once a request, by a
table lookup a series. All of it together costs a request some microseconds (docs/metrics.md).

What the engine itself counts over its life (adapters, refusals of its queue) begins at 0 with each
of its lives: worker 0 follows its status and counts what has come, so that no counter falls.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxserve.config import TelemetryConfig
from jaxserve.http.metrics import families as f
from jaxserve.http.metrics.cells import Cells
from jaxserve.http.metrics.collecting import Collecting
from jaxserve.http.metrics.exemplars import Exemplars
from jaxserve.http.metrics.requests import RequestCounts
from jaxserve.http.metrics.window import Window
from jaxserve.limits.admission import REASONS
from jaxserve.protocol.records import RequestRecord
from jaxserve.protocol.status import EngineStatus, StepStats

ROUTES = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses"),
        *("/v1/models", "/v1/models/{name}", "/v1/embeddings", "/v1/score", "/v1/rerank"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/tokenize", "/detokenize"),
        *("/health", "/live", "/ready", "/metrics", "/slo", "/v1/usage", "/v1/costs", "/console"),
    }
)
#: Statuses counted by themselves; 499 stands for a client that left before its answer began.
STATUSES = frozenset(
    {200, 400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 429, 431, 499, 500, 503, 504}
)
#: Kinds of programs, as their names begin.
STEP_KINDS = ("decode", "mixed", "verify", "embed")
#: Scope and kind of rate limits.
_LIMITED = tuple(
    (kind, scope) for scope in ("key", "user", "tenant") for kind in ("requests", "tokens")
)
#: Counted from the engine's status: the family, and the status' attribute.
_FOLLOWED = (
    (f.ADAPTER_JOINS, "adapter_joins"),
    (f.ADAPTER_HITS, "adapter_hits"),
    (f.ADAPTER_LOADS, "adapter_loads"),
)
#: Between two looks at the status while steps are made.
_FOLLOW_NS = 1_000_000_000


class Metrics:
    """The metrics of one HTTP process.

    Args:
        status: gives the engine's last status.
        shared: the file of all workers; None where this process is alone.
        index: of this process among them.
        config: bounds of labels, and what is shown; the defaults where None.
        tenants: of the key file, in its order; the first get labels of their own.
        page_size: tokens a KV page.
    """

    def __init__(
        self,
        status: Callable[[], EngineStatus | None],
        shared: Path | None = None,
        index: int = 0,
        *,
        config: TelemetryConfig | None = None,
        tenants: Sequence[str] = (),
        page_size: int = 0,
    ) -> None:
        config = config or TelemetryConfig()
        self._status = status
        self._cells = cells = Cells(shared, index)
        self._own = cells.own
        self._first = {
            family.name: cells.claim(family.name, (), family.size)
            for family in f.FAMILIES.values()
            if not family.labels and family.sums is None
        }
        self._window = Window(cells)
        exemplars = Exemplars()
        self._requests = RequestCounts(cells, config, tenants, exemplars)
        self._collecting = Collecting(cells, self._window, config, page_size, exemplars)
        for labels in _LIMITED:
            self._at(f.RATE_LIMITED, *labels)
        for reason in REASONS:
            self._at(f.SHED, reason)
        self._steps = {kind: self._at(f.STEP, kind) for kind in STEP_KINDS}
        self._output_tokens = self._first[f.OUTPUT_TOKENS.name]
        self._itl = self._first[f.ITL.name]
        self._is_first = index == 0
        self._pid = 0  # of the engine whose counts were followed last, and those
        self._followed: dict[tuple[str, ...], int] = {}
        self._followed_ns = 0
        self._had_work = False  # after the step before

    def render(self, *, is_open: bool = False) -> bytes:
        """The text format, for all workers; as OpenMetrics it lacks the last line."""
        status = self.followed()
        return self._collecting.render(status, is_open=is_open)

    # ------------------------------------------------------------------ requests

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        route = route if route in ROUTES else "other"
        self._add(f.REQUESTS, route, str(status) if status in STATUSES else "other")

    def in_flight(self, change: int) -> None:
        """A request has come (1) or gone (-1)."""
        self._own[self._first[f.IN_FLIGHT.name]] += change

    def admitted(self, record: RequestRecord) -> None:
        """A request that asks for work was let in."""
        self._requests.admitted(record)

    def ended(self, record: RequestRecord) -> None:
        """A request that asks for work has ended."""
        self._requests.ended(record)

    def prompt_tokens(self, num_tokens: int) -> None:
        """A request was submitted."""
        self._own[self._first[f.PROMPT_TOKENS.name]] += num_tokens

    def texts(self, num_texts: int, num_tokens: int) -> None:
        """Texts were embedded."""
        self._own[self._first[f.EMBEDDED_TEXTS.name]] += num_texts
        self._own[self._first[f.EMBEDDED_TOKENS.name]] += num_tokens

    def tokens(self, num_tokens: int, since_s: float | None = None) -> None:
        """Tokens came together, `since_s` after the choice's tokens before them, if any."""
        own = self._own
        own[self._output_tokens] += num_tokens
        if since_s is not None:
            own[self._itl + bisect_left(f.ITL.bounds, since_s / num_tokens)] += num_tokens
            own[self._itl + f.ITL.size - 1] += since_s

    def first_token(self, seconds: float) -> None:
        """A request's first token is about to be sent."""
        self._observe(f.TTFT, self._first[f.TTFT.name], seconds)

    def request_done(self, seconds: float) -> None:
        """All choices of a request have ended."""
        self._observe(f.E2E, self._first[f.E2E.name], seconds)

    # ------------------------------------------------------------------ the engine

    def step(self, stats: StepStats) -> None:
        """A device call was made."""
        own, first = self._own, self._first
        own[first[f.STEPS.name]] += 1
        own[first[f.STEP_DEVICE.name]] += stats.device_ns / 1e9
        own[first[f.STEP_IDLE.name]] += stats.idle_ns / 1e9
        if self._had_work:
            own[first[f.STEP_BUBBLE.name]] += stats.idle_ns / 1e9
        self._had_work = bool(stats.running or stats.waiting)
        own[first[f.STEP_FLOPS.name]] += stats.flops
        own[first[f.STEP_BYTES.name]] += stats.bytes
        own[first[f.STEP_PREFILL.name]] += stats.prefill_tokens
        own[first[f.STEP_DECODE.name]] += stats.decode_tokens
        own[first[f.STEP_PADDING.name]] += stats.padded_tokens - stats.tokens
        own[first[f.DRAFTS.name]] += stats.draft_tokens
        own[first[f.DRAFTS_ACCEPTED.name]] += stats.draft_accepted_tokens
        own[first[f.PREEMPTIONS.name]] += stats.preemptions
        own[first[f.PREFIX_LOOKUPS.name]] += stats.prefix_lookup_tokens
        own[first[f.PREFIX_HITS.name]] += stats.prefix_hit_tokens
        own[first[f.PAGES_SAVED.name]] += stats.pages_saved
        own[first[f.PAGES_LOADED.name]] += stats.pages_loaded
        self._observe(f.STEP_TOKENS, first[f.STEP_TOKENS.name], stats.tokens)
        kind = stats.program.partition("_")[0]
        place = self._steps.get(kind)
        self._observe(
            f.STEP, self._at(f.STEP, "other") if place is None else place, stats.device_ns / 1e9
        )
        now_ns = time.monotonic_ns()
        self._window.add(now_ns, stats.flops, stats.bytes)
        if now_ns - self._followed_ns > _FOLLOW_NS:
            self.followed()

    def followed(self) -> EngineStatus | None:
        """The engine's status; what it counted since the one before is added."""
        status = self._status()
        self._followed_ns = time.monotonic_ns()
        if status is None or not self._is_first:
            return status
        if status.pid != self._pid:
            self._pid, self._followed = status.pid, {}
        for family, attribute in _FOLLOWED:
            self._follow(family, (), getattr(status, attribute))
        for reason, count in status.shed.items():
            self._follow(f.SHED, (reason,), count)
        return status

    def restarted(self) -> None:
        """The engine has been started again; of all workers one says so."""
        self._own[self._first[f.RESTARTS.name]] += 1
        self._had_work = False

    def replays(self, num_replayed: int, num_quarantined: int) -> None:
        """How many requests of this worker have gone on in another engine, or not, so far."""
        self._own[self._first[f.REPLAYED.name]] = num_replayed
        self._own[self._first[f.QUARANTINED.name]] = num_quarantined

    # ------------------------------------------------------------------ load

    def limited(self, scope: str, kind: str) -> None:
        """A rate limit refused a request."""
        self._add(f.RATE_LIMITED, kind, scope)

    def shed(self, reason: str) -> None:
        """A request was refused or cut short because of load."""
        self._add(f.SHED, reason)

    def overload(self, level: int, wait_s: float) -> None:
        """What this process takes the load for."""
        self._own[self._first[f.LEVEL.name]] = level
        self._own[self._first[f.WAIT.name]] = wait_s

    def store_state(self, is_up: bool) -> None:
        """Whether this process uses the shared store of rate limits."""
        self._own[self._first[f.STORE_DOWN.name]] = float(not is_up)

    def _follow(self, family: f.Family, labels: tuple[str, ...], count: int) -> None:
        key = (family.name, *labels)
        before = self._followed.get(key, 0)
        self._followed[key] = count
        self._own[self._at(family, *labels)] += count - before if count >= before else count

    def _at(self, family: f.Family, *labels: str) -> int:
        return self._cells.claim(family.name, labels, family.size)

    def _add(self, family: f.Family, *labels: str) -> None:
        self._own[self._at(family, *labels)] += 1

    def _observe(self, family: f.Family, first: int, value: float) -> None:
        self._own[first + bisect_left(family.bounds, value)] += 1
        self._own[first + family.size - 1] += value
