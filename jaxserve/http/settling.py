"""Completes a request's record: waits for the engine's last word on what it did for the request.

An answer may be over before that word has come: its client left, its deadline passed, one of its
choices failed. What the engine did until then is the request's all the same, so its record is
reported when all its sequences have ended, or after `LAST_WORD_S`, with what is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from jaxserve.protocol.records import RequestRecord
from jaxserve.protocol.stream import Stream

#: How long a record waits for the engine. A cancel takes a step or two, a restart's end none.
LAST_WORD_S = 5.0


class Settling:
    """The records that wait.

    Args:
        report: takes a complete one.
    """

    def __init__(self, report: Callable[[RequestRecord], None]) -> None:
        self._report = report
        self._waiting: dict[str, _Waiting] = {}

    def settle(self, record: RequestRecord, streams: Sequence[Stream]) -> None:
        """The request is over: reports it now, or when its streams are.

        Args:
            streams: all that it had; whatever still runs has been cancelled.
        """
        running = [stream for stream in streams if not stream.done]
        if not running:
            self._complete(record, streams)
            return
        self._waiting[record.request_id] = _Waiting(record, streams, running, self._end)

    async def close(self) -> None:
        """Waits for those that wait."""
        while self._waiting:
            await asyncio.wait([waiting.over for waiting in self._waiting.values()])
            await asyncio.sleep(0)  # their callbacks

    def _end(self, record: RequestRecord, streams: Sequence[Stream]) -> None:
        del self._waiting[record.request_id]
        self._complete(record, streams)

    def _complete(self, record: RequestRecord, streams: Sequence[Stream]) -> None:
        note_sequences(record, streams)
        self._report(record)


def note_sequences(record: RequestRecord, streams: Sequence[Stream]) -> None:
    """What the engine has said so far, in the order of the request's choices."""
    record.sequences = []
    record.decode_ns = record.decode_tokens = 0
    first = 0
    for stream in streams:
        for choice, sequence in sorted(stream.records.items()):
            sequence.choice = first + choice
            record.sequences.append(sequence)
            after_first = sequence.output_tokens + sequence.stop_tokens - 1
            if after_first > 0 and 0 < sequence.first_token_ns < sequence.done_ns:
                record.decode_ns += sequence.done_ns - sequence.first_token_ns
                record.decode_tokens += after_first
        first += stream.num_choices


class _Waiting:
    """One record, until its streams have ended or the time is up.

    Attributes:
        over: done then.
    """

    def __init__(
        self,
        record: RequestRecord,
        streams: Sequence[Stream],
        running: Sequence[Stream],
        end: Callable[[RequestRecord, Sequence[Stream]], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = loop.create_future()
        self._left = len(running)
        self._timer = loop.call_later(LAST_WORD_S, self._finish)
        self._end = lambda: end(record, streams)
        for stream in running:
            stream.at_end(self._stream_ended)

    def _stream_ended(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._finish()

    def _finish(self) -> None:
        if not self.over.done():
            self._timer.cancel()
            self.over.set_result(None)
            self._end()
