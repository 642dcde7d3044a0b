"""Brings one receiver its notices, in order, until it has taken each.

A notice leaves the queue once the receiver has said that it has it. A receiver that is away is
tried again with growing pauses, of which some part is chance, so that many servers do not come back
at once. One that refuses a notice for what it is (4xx) is given it a few times, then it is dropped
and counted, since it would keep all others from going out.

What is sent and not yet known to be taken when the process dies is sent again by the next one, with
the same id and the same key: at least once, and once where the receiver tells by either.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jaxserve.telemetry.alerts.incident import Change, Incident, Notice, Severity

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
#: Times that a notice is sent to a receiver that refuses it.
MAX_REFUSALS = 5
#: Notices that may wait for a receiver; beyond it the oldest are dropped, and counted.
MAX_QUEUED = 1000


class DeliveryError(Exception):
    """A receiver did not take a notice.

    Args:
        reason: a few words without any address or key.
        refused: it answered that it never will.
        retry_after_s: when it wants to be asked again; 0 where it does not say.
    """

    def __init__(self, reason: str, *, refused: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused
        self.retry_after_s = retry_after_s


class Receiver(Protocol):
    """Where notices go.

    Attributes:
        name: for logs and metrics, without any address or key.
        identity: by which its queue is found again after a restart.
        least: severity of the incidents that it is told of, at least.
        resend_s: it forgets an incident that it is not told of again within some multiple of this;
            0 where it never does.
    """

    name: str
    identity: str
    least: Severity
    resend_s: float

    def send(self, notice: Notice) -> None:
        """Sends, and waits for the answer; called in a thread.

        Raises:
            DeliveryError: it was not taken.
        """
        ...


class Courier:
    """One receiver's queue.

    Args:
        monotonic: clock, in seconds.
        incidents: what is open, for receivers that forget.
        chance: 0 … 1, for the pauses.

    Attributes:
        queue: what it is still to be told, oldest first.
        changed: since this was last set to False.
    """

    def __init__(
        self,
        receiver: Receiver,
        monotonic: Callable[[], float],
        incidents: Callable[[], Sequence[Incident]] = tuple,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.receiver = receiver
        self.queue: deque[Notice] = deque()
        self.changed = False
        self.num_sent = 0
        self.num_failed = 0
        self.num_dropped = 0
        self.last_error = ""
        self._monotonic = monotonic
        self._incidents = incidents
        self._chance = chance
        self._due_s = 0.0
        self._pause_s = 0.0
        self._resent_s = monotonic()
        self._refused = False

    def tell(self, notice: Notice) -> None:
        """Queues a notice, unless it is not for this receiver."""
        if notice.incident.severity.rank < self.receiver.least.rank:
            return
        if notice.change is Change.REMINDER and self.receiver.resend_s:
            return  # it is reminded more often than that
        self.queue.append(Notice(id=notice.id, change=notice.change, incident=notice.incident))
        self.changed = True
        while len(self.queue) > MAX_QUEUED:
            self.queue.popleft()
            self.num_dropped += 1

    async def deliver(self) -> bool:
        """Sends what is due, one after the other, until one fails.

        Returns:
            Whether anything left the queue.
        """
        left = False
        while self.queue and self._monotonic() >= self._due_s:
            notice = self.queue[0]
            if not await self._sent(notice):
                if notice.attempts < MAX_REFUSALS or not self._refused:
                    break
                self.num_dropped += 1
                logger.error(
                    "%s has refused an alert %d times (%s); it is dropped",
                    self.receiver.name,
                    notice.attempts,
                    self.last_error,
                )
            if self.queue and self.queue[0] is notice:  # else it was crowded out meanwhile
                self.queue.popleft()
            self.changed = left = True
        if not self.queue:
            await self._resend()
        return left

    def state(self) -> list[dict[str, Any]]:
        """What outlives the process."""
        return [notice.to_json() for notice in self.queue]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Goes on from a `state`; raises ValueError, TypeError or KeyError where it is none."""
        self.queue.extend(Notice.from_json(value) for value in state)

    async def _resend(self) -> None:
        """Tells a receiver that forgets what is still open."""
        now_s = self._monotonic()
        if not self.receiver.resend_s or now_s < max(
            self._resent_s + self.receiver.resend_s, self._due_s
        ):
            return
        self._resent_s = now_s
        for incident in self._incidents():
            if incident.severity.rank >= self.receiver.least.rank:
                again = Notice(id=secrets.token_hex(8), change=Change.REMINDER, incident=incident)
                if not await self._sent(again):
                    return

    async def _sent(self, notice: Notice) -> bool:
        try:
            await asyncio.to_thread(self.receiver.send, notice)
        except DeliveryError as error:
            self._failed(notice, error)
            return False
        if self._pause_s:
            logger.info("%s takes alerts again", self.receiver.name)
        self._pause_s = self._due_s = 0.0
        self.num_sent += 1
        self.last_error = ""
        return True

    def _failed(self, notice: Notice, error: DeliveryError) -> None:
        notice.attempts += 1
        self.num_failed += 1
        self._refused = error.refused
        if error.reason != self.last_error:
            logger.warning(
                "%s did not take an alert: %s; it is tried again", self.receiver.name, error.reason
            )
        self.last_error = error.reason
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        pause_s = self._pause_s * (0.5 + 0.5 * self._chance())
        self._due_s = self._monotonic() + max(pause_s, error.retry_after_s)
