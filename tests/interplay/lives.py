"""A blocking client that goes on in another engine, as a supervised `EngineClient` does."""

from __future__ import annotations

import queue
from collections.abc import Callable

from jaxserve.protocol.client import ClientTransport, SyncClient
from jaxserve.protocol.messages import Cancel, ClientMessage, GetStatus
from jaxserve.protocol.streams import Dispatcher
from jaxserve.types import Vocabulary


class ReplayingClient(SyncClient):
    """`again` stands for the engine's death and the next one's start.

    It takes one message in at a time, so that there is something left that a death can take.
    """

    def __init__(
        self, transport: ClientTransport, vocabulary: Callable[[], Vocabulary] | None = None
    ) -> None:
        super().__init__(transport, vocabulary=vocabulary)
        self._dispatcher = Dispatcher(journal=True)

    def send(self, message: ClientMessage) -> None:
        """Sends, and remembers what is to be cancelled."""
        if isinstance(message, Cancel):
            for sequence_id in message.sequence_ids:
                state = self._dispatcher._streams[sequence_id]
                state.cancelling([sequence_id], message.reason)
        super().send(message)

    def wait(self) -> None:
        """Takes in the engine's next message."""
        self._dispatcher.dispatch(self._inbox.get(timeout=60))

    def again(self, transport: ClientTransport) -> None:
        """Goes on over another road; what was under way on the old one is lost."""
        self._transport.abandon()
        self._transport, self._inbox = transport, queue.SimpleQueue()
        self._dispatcher.lose()
        self._transport.open(self._inbox.put)
        self.send(GetStatus())
        self.ready()
        for message in self._dispatcher.replay():
            self.send(message)
