"""Book, couriers and what of them outlives the process, together.

Invariant: a notice is on the disk before it is sent, unless the disk takes nothing; then it is sent
all the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxserve.telemetry.alerts.book import Book
from jaxserve.telemetry.alerts.courier import Courier, Receiver
from jaxserve.telemetry.alerts.incident import Notice
from jaxserve.telemetry.document import Document

logger = logging.getLogger(__name__)

FILE = "alerts.json"
VERSION = 1
#: Between two attempts to save on a disk that takes nothing.
_SAVE_AGAIN_S = 30.0
#: At the end, how long what is being sent may take.
_CLOSING_S = 3.0


class Notifier:
    """Tells all receivers of all incidents.

    Args:
        state: directory of what outlives the process.
        monotonic, wall: clocks, in seconds.

    Attributes:
        book: the incidents; `book.on_alert` is what parts call.
        couriers: one a receiver.
        num_unsaved: times that the disk did not take what is to outlive the process.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        state: Path,
        *,
        hold_s: float,
        resend_s: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic = monotonic
        self.book = Book(
            self._tell, monotonic=monotonic, wall=wall, hold_s=hold_s, resend_s=resend_s
        )
        self.couriers = [
            Courier(receiver, monotonic, lambda: self.book.open) for receiver in receivers
        ]
        self.num_unsaved = 0
        self._save_s = 0.0
        self._document = Document(state / FILE, VERSION)
        self._saving = asyncio.Lock()
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._restore()

    async def tick(self) -> None:
        """Moves time on; about once a second. Returns without waiting for any receiver."""
        self.book.tick()
        await self.save()
        for courier in self.couriers:
            name = courier.receiver.name
            if name not in self._deliveries:
                task = asyncio.create_task(self._deliver(courier), name=f"jaxserve alerts {name}")
                self._deliveries[name] = task
                task.add_done_callback(lambda _, name=name: self._deliveries.pop(name, None))

    async def save(self) -> None:
        """Makes durable what has changed; a disk that takes nothing is tried again later."""
        async with self._saving:
            changed = self.book.changed or any(courier.changed for courier in self.couriers)
            if not changed or self._monotonic() < self._save_s:
                return
            self.book.changed = False
            for courier in self.couriers:
                courier.changed = False
            state = self.book.state() | {
                "queues": {c.receiver.identity: c.state() for c in self.couriers}
            }
            try:
                await asyncio.to_thread(self._document.save, state)
            except OSError as error:
                self.book.changed = True
                self._save_s = self._monotonic() + _SAVE_AGAIN_S
                if not self.num_unsaved:
                    logger.error("alerts cannot be kept on the disk: %s", error.strerror or error)
                self.num_unsaved += 1

    async def close(self) -> None:
        """Waits a moment for what is being sent, and saves."""
        if self._deliveries:
            await asyncio.wait(list(self._deliveries.values()), timeout=_CLOSING_S)
        self._save_s = 0.0
        await self.save()

    async def _deliver(self, courier: Courier) -> None:
        if await courier.deliver():
            await self.save()

    def _tell(self, notice: Notice) -> None:
        for courier in self.couriers:
            courier.tell(notice)

    def _restore(self) -> None:
        state = self._document.load()
        if state is None:
            return
        try:
            self.book.restore(state)
            queues: dict[str, list[dict[str, Any]]] = state["queues"]
            for courier in self.couriers:
                courier.restore(queues.get(courier.receiver.identity, []))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._document.set_aside(f"{type(error).__name__}: {error}")
