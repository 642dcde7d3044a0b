"""The sequences that were let in and have not ended, as their clients know them: each ends once.

A client is told each end by one `Finished`, which goes out with the outbox. What was never let in
is refused here too, with ends of the same kind.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq

from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.attribution import Dividing
from jaxserve.engine.backlog import Backlog
from jaxserve.engine.outbox import Outbox
from jaxserve.engine.statistics import record_of, waits_of
from jaxserve.errors import JaxserveError
from jaxserve.protocol.messages import Embed, Finished, SequenceRecord, Submit
from jaxserve.scheduler.embedding import Text
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason

logger = logging.getLogger(__name__)


class LiveSequences:
    """By client and number.

    Args:
        outbox: of the ends.
        backlog, adapters: told of each sequence that ends.
        attribution: says what each has cost.
    """

    def __init__(
        self,
        outbox: Outbox,
        backlog: Backlog,
        adapters: RequestAdapters,
        attribution: Dividing,
    ) -> None:
        self._outbox = outbox
        self._backlog = backlog
        self._adapters = adapters
        self._attribution = attribution
        self._live: dict[Hashable, dict[int, Sequence]] = {}

    @property
    def clients(self) -> Iterable[Hashable]:
        """Those that have submitted something and are not gone."""
        return self._live.keys()

    def of(self, client: Hashable) -> dict[int, Sequence]:
        """A client's, by their numbers."""
        return self._live.get(client, {})

    def knows(self, client: Hashable, sequence_ids: Iterable[int]) -> bool:
        """Whether any of these numbers, that a client submits, is one of a sequence of its own.

        The client is known from now on.
        """
        return not self._live.setdefault(client, {}).keys().isdisjoint(sequence_ids)

    def enter(self, client: Hashable, message: Submit | Embed, sequences: Seq[Sequence]) -> None:
        """A request was let in as these sequences."""
        self._live[client].update(zip(message.sequence_ids, sequences, strict=True))
        for sequence in sequences:
            sequence.traceparent = message.traceparent
            sequence.waits += waits_of(message)

    def forget(self, client: Hashable) -> None:
        """A client is gone, and none of its sequences lives."""
        self._live.pop(client, None)

    def finish(
        self,
        sequence: Sequence,
        now_ns: int,
        error: JaxserveError | None = None,
        vector: bytes = b"",
    ) -> None:
        """A sequence has ended, for the reason that it has."""
        client, sequence_id = sequence.key
        if error is not None and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s (trace %s)", error.code, error.message, sequence.traceparent)
        del self._live[client][sequence_id]
        if not isinstance(sequence, Text):
            self._backlog.leave(sequence, now_ns)
            self._adapters.ended(sequence)
        assert sequence.reason is not None
        finished = Finished(
            sequence_id=sequence_id,
            reason=sequence.reason,
            record=record_of(sequence, now_ns, self._attribution.take(sequence)),
            stop_token_id=sequence.stop_token_id,
            error=error.message if error else "",
            error_code=error.code if error else "",
            error_param=error.param if error else None,
            retry_after_s=error.retry_after_s if error else None,
            vector=vector,
        )
        self._outbox.events(client).finished.append(finished)

    def finish_all(self, error: JaxserveError) -> None:
        """Every sequence has ended with this error."""
        now_ns = time.monotonic_ns()
        for live in self._live.values():
            for sequence in list(live.values()):
                # The scheduler may be what failed: it is not asked any more.
                sequence.reason = sequence.reason or FinishReason.ERROR
                self.finish(sequence, now_ns, error)

    def refuse(self, client: Hashable, message: Submit | Embed, error: JaxserveError) -> None:
        """A request is not let in: each of its sequences ends with the error.

        Not one that its client has live under the same number, which ends when it does.
        """
        now_ns = time.monotonic_ns()
        live = self.of(client)
        for sequence_id in message.sequence_ids:
            if sequence_id in live:
                logger.warning("client %s used a sequence id twice: not refused by it", client)
                continue
            record = SequenceRecord(
                arrived_ns=message.arrived_ns,
                done_ns=now_ns,
                intervals=list(message.waited),
                traceparent=message.traceparent,
                pid=os.getpid(),
            )
            self._outbox.events(client).finished.append(
                Finished(
                    sequence_id=sequence_id,
                    reason=FinishReason.ERROR,
                    record=record,
                    error=error.message,
                    error_code=error.code,
                    error_param=error.param,
                    retry_after_s=error.retry_after_s,
                )
            )
