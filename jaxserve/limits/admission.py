"""Whether a request is worth beginning: refused at once, before any work, where it is not.

Asked twice: before the body is read, for the best priority that its key may name (`glance`), and
after, for the request as it is (`admit`). Each refusal says why and when to come again, and is
counted by its reason. The engine's load is as old as its last status, so what this process has
submitted since and runs still is added, for every worker alike; while requests come, a fresh status
is asked for every `FRESH_S`.

Invariant: everything here is arithmetic over a few dozen numbers: a refusal costs microseconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.config import LimitsConfig
from jaxserve.errors import DeadlineExceeded, Overloaded
from jaxserve.limits.degradation import Degradation
from jaxserve.limits.wait import Newcomer, is_free, run_s, wait_s
from jaxserve.protocol.status import ClassLoad, EngineStatus

#: A status older than this is asked for anew.
FRESH_S = 0.1
#: Shortest and longest time after which a refused client is told to come again.
MIN_RETRY_S, MAX_RETRY_S = 0.5, 60.0
#: An estimate is an average: this much more must be left for what is let in to be done in time.
MARGIN = 1.15

#: Why a front end refuses, or cuts short: those above, and what `frontend`, `limiter` and the check
#: of grammars count.
REASONS = (
    *("deadline", "max_wait", "low_priority", "normal_priority", "capped"),
    *("draining", "not_ready", "limit_store", "grammar_checks"),
)


@dataclass(slots=True)
class _Submitted:
    at_ns: int
    newcomer: Newcomer


class Admission:
    """The gate of one process.

    Args:
        status: the engine's last word about itself.
        refresh: asks for a newer one.
        count: called with the reason of each refusal and cap.
        workers: processes that submit like this one.
        clock_ns: CLOCK_MONOTONIC, comparable with the engine's.

    Attributes:
        normal_wait_s: estimated wait of a request of normal priority, when last looked at.
    """

    def __init__(
        self,
        config: LimitsConfig,
        *,
        status: Callable[[], EngineStatus | None],
        refresh: Callable[[], None],
        count: Callable[[str], None],
        workers: int = 1,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.normal_wait_s = 0.0
        self._config = config
        self._status = status
        self._refresh = refresh
        self._count = count
        self._workers = workers
        self._clock_ns = clock_ns
        self._degradation = Degradation(config)
        self._since: dict[int, _Submitted] = {}  # by number, oldest first
        self._num_submitted = 0
        self._is_on = bool(config.max_wait_s) or self._degradation.is_on

    @property
    def level(self) -> int:
        """Of degradation."""
        return self._degradation.level

    @property
    def degrades(self) -> bool:
        """Whether overload ever takes anything from anybody."""
        return self._degradation.is_on

    def look(self) -> None:
        """Takes in how the load is now, though nobody comes.

        Else what is told of it, and the level, would stay as the last who came found them.
        """
        status = self._status()
        if status is not None:
            self._observe(status, self._loads(status), self._clock_ns())

    def glance(self, newcomer: Newcomer, deadline_ns: int | None) -> None:
        """Refuses what cannot be served in time, whatever else is in it; see `admit`."""
        if self._is_on or deadline_ns is not None:
            self._judge(newcomer, deadline_ns)

    def admit(self, newcomer: Newcomer, deadline_ns: int | None) -> int | None:
        """Lets a request go on.

        Returns:
            At most so many output tokens a sequence; None for as many as it asks for.

        Raises:
            Overloaded: it would wait past its deadline or `limits.max_wait_s`, or its priority is
                shed.
            DeadlineExceeded: the deadline has passed.
        """
        if not self._is_on and deadline_ns is None:
            return None
        self._judge(newcomer, deadline_ns)
        cap = self._config.low_priority_max_tokens
        asked = newcomer.output_tokens
        if self._degradation.caps(newcomer.priority) and (asked is None or asked > cap):
            self._count("capped")
            return cap
        return None

    def admit_texts(self, priority: int, deadline_ns: int | None) -> None:
        """Lets texts to embed go on, which wait in a queue of their own; raises as `admit`."""
        if not self._is_on and deadline_ns is None:
            return
        now_ns = self._clock_ns()
        status = self._fresh(now_ns, deadline_ns)
        if status is None:
            return
        self._shed(priority)
        waits_s, limit_s = status.embed_wait_s, self._config.max_wait_s
        if limit_s and waits_s > limit_s:
            raise self._over_max_wait(waits_s)
        if deadline_ns is not None and MARGIN * waits_s > (deadline_ns - now_ns) / 1e9:
            left_s = (deadline_ns - now_ns) / 1e9
            raise self._refusal(
                "deadline",
                f"the request would wait about {waits_s:.1f} s, and its deadline is {left_s:.1f} s "
                "away",
                MARGIN * waits_s - left_s,
            )

    def submitted(self, newcomer: Newcomer) -> int:
        """A request goes to the engine now.

        Returns:
            Its number, for `ended`.
        """
        self._num_submitted += 1
        self._since[self._num_submitted] = _Submitted(self._clock_ns(), newcomer)
        return self._num_submitted

    def ended(self, number: int) -> None:
        """A request has left the engine: nobody waits behind it, whether a status says so yet."""
        self._since.pop(number, None)

    def check_deadline(self, deadline_ns: int | None, now_ns: int | None = None) -> None:
        """Refuses what is too late, before it is begun.

        Args:
            now_ns: CLOCK_MONOTONIC; now where None.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        if deadline_ns is not None and deadline_ns <= (now_ns or self._clock_ns()):
            self._count("deadline")
            raise DeadlineExceeded("the request's deadline passed before it was begun")

    def _judge(self, newcomer: Newcomer, deadline_ns: int | None) -> None:
        now_ns = self._clock_ns()
        status = self._fresh(now_ns, deadline_ns)
        if status is None:
            return
        loads = self._loads(status)
        if self.degrades:
            self._observe(status, loads, now_ns)
            self._shed(newcomer.priority)
        waits_s = wait_s(status, loads, newcomer)
        # Where nobody waits nothing would be gained by refusing: how long others ran, or how fast
        # their prompts were, is no reason. If all were refused nothing would be learned any more.
        if waits_s == 0 or is_free(status, loads, newcomer):
            return
        limit_s = self._config.max_wait_s
        if limit_s and waits_s > limit_s:
            raise self._over_max_wait(waits_s)
        if deadline_ns is not None:
            left_s = (deadline_ns - now_ns) / 1e9
            needs_s = MARGIN * (waits_s + run_s(status, newcomer))
            if needs_s > left_s:
                raise self._refusal(
                    "deadline",
                    f"the request would take about {needs_s:.1f} s, of which {waits_s:.1f} s "
                    f"waiting, and its deadline is {left_s:.1f} s away",
                    needs_s - left_s,
                )

    def _observe(self, status: EngineStatus, loads: list[ClassLoad], now_ns: int) -> None:
        self.normal_wait_s = wait_s(status, loads, Newcomer(priority=0))
        self._degradation.observe(self.normal_wait_s, now_ns / 1e9)

    def _fresh(self, now_ns: int, deadline_ns: int | None) -> EngineStatus | None:
        """The engine's status, a newer one being asked for where it is old.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        self.check_deadline(deadline_ns, now_ns)
        status = self._status()
        if status is not None and now_ns - status.at_ns > FRESH_S * 1e9:
            self._refresh()
        return status

    def _shed(self, priority: int) -> None:
        """Refuses a priority that is given up at present."""
        if self._degradation.sheds(priority):
            kind = "low" if priority > 0 else "normal"
            raise self._refusal(
                f"{kind}_priority",
                f"the engine is overloaded (a wait of {self.normal_wait_s:.1f} s) and takes no "
                f"requests of {kind} priority",
                self.normal_wait_s,
            )

    def _over_max_wait(self, waits_s: float) -> Overloaded:
        limit_s = self._config.max_wait_s
        return self._refusal(
            "max_wait",
            f"the request would wait about {waits_s:.1f} s, the limit is {limit_s:g} s",
            waits_s - limit_s,
        )

    def _loads(self, status: EngineStatus) -> list[ClassLoad]:
        """The load by class, with what was submitted since the status."""
        since = self._since
        for number in [n for n, entry in since.items() if entry.at_ns <= status.at_ns]:
            del since[number]
        if not since:
            return status.loads
        loads = {(load.priority, load.tenant): load for load in status.loads}
        added: dict[tuple[int, str], ClassLoad] = {}
        for entry in since.values():
            newcomer = entry.newcomer
            key = newcomer.priority, newcomer.tenant or ""
            load = added.get(key)
            if load is None:
                known = loads.get(key)
                load = added[key] = ClassLoad(
                    priority=newcomer.priority,
                    tenant=newcomer.tenant or "",
                    weight=newcomer.weight,
                    running=known.running if known else 0,
                    waiting=known.waiting if known else 0,
                    tokens=known.tokens if known else 0,
                )
            load.waiting += newcomer.sequences * self._workers
            load.tokens += newcomer.tokens * self._workers
        return [*(loads | added).values()]

    def _refusal(self, reason: str, message: str, over_s: float) -> Overloaded:
        self._count(reason)
        spread = 1 + random.random() / 4  # so that those refused together do not come together
        retry_s = min(max(over_s, MIN_RETRY_S) * spread, MAX_RETRY_S)
        return Overloaded(f"{message}; try again in {retry_s:.1f} s", retry_after_s=retry_s)
