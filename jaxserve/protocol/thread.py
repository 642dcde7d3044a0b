"""An engine in a thread of this process: messages cross as they are, through queues.

`ThreadRoad` is the meeting point: the engine's thread holds `road.server`, and every client takes a
`road.connect()`. Same behaviour as `protocol.zmq`, without bytes: used offline and in tests.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Hashable

from jaxserve.protocol.messages import ClientMessage, EngineMessage, Goodbye
from jaxserve.protocol.server import Arrival


class ThreadServer:
    """The engine's end: a `ServerTransport`."""

    def __init__(self) -> None:
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._deliver: dict[Hashable, Callable[[EngineMessage], None]] = {}

    def receive(self, timeout_s: float) -> list[Arrival]:
        """See `ServerTransport`."""
        arrivals = []
        with contextlib.suppress(queue.Empty):
            arrivals.append(self._arrivals.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                arrivals.append(self._arrivals.get_nowait())
        return arrivals

    def send(self, client: Hashable, message: EngineMessage) -> None:
        """See `ServerTransport`."""
        with self._lock:
            deliver = self._deliver.get(client)
        if deliver is not None:
            deliver(message)

    def close(self) -> None:
        """See `ServerTransport`."""
        with self._lock:
            self._deliver.clear()

    def wake(self) -> None:
        """Has a waiting `receive` return."""
        self._arrivals.put((None, None))

    def _attach(self, client: Hashable, deliver: Callable[[EngineMessage], None]) -> None:
        with self._lock:
            self._deliver[client] = deliver

    def _arrive(self, client: Hashable, message: ClientMessage) -> None:
        self._arrivals.put((client, message))

    def _detach(self, client: Hashable) -> None:
        with self._lock:
            self._deliver.pop(client, None)
        self._arrivals.put((client, Goodbye()))


class ThreadClient:
    """A client's end: a `ClientTransport`."""

    def __init__(self, server: ThreadServer, name: Hashable) -> None:
        self._server = server
        self._name = name

    def open(self, deliver: Callable[[EngineMessage], None]) -> None:
        """See `ClientTransport`."""
        self._server._attach(self._name, deliver)

    def send(self, message: ClientMessage) -> None:
        """See `ClientTransport`."""
        self._server._arrive(self._name, message)

    def close(self) -> None:
        """See `ClientTransport`."""
        self._server._detach(self._name)

    def abandon(self) -> None:
        """See `ClientTransport`."""
        self.close()


class ThreadRoad:
    """Joins one engine and any number of clients of the same process."""

    def __init__(self) -> None:
        self.server = ThreadServer()
        self._names = itertools.count()

    def connect(self) -> ThreadClient:
        """A new client's end."""
        return ThreadClient(self.server, f"thread-{next(self._names)}")
