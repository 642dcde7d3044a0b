"""One store for all HTTP workers of a server: the supervisor owns it, workers ask over a socket.

The supervisor serves nothing else and outlives its workers, so a limit is exact whatever worker a
request comes to, and there is no lock that a killed worker could hold: when its connection ends,
its reservations are settled with what it last said was used. Frames are a length and msgpack;
answers come in the order of the questions, so many can be on their way at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from pathlib import Path

import msgspec

from jaxserve.limits.store import Answer, MemoryStore, StoreFailure, Take
from jaxserve.protocol.frames import FrameTooLong, read_frame, write_frame

#: What a frame raises that is none of ours.
_NONSENSE = (msgspec.MsgspecError, FrameTooLong)


class _Question(msgspec.Struct, array_like=True):
    """One of: a take, a change of one, renewals, a settlement."""

    take: Take | None = None
    change: Take | None = None
    renew: dict[str, list[float]] | None = None
    settle: tuple[str, list[float]] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(_Question).decode
_decode_answer = msgspec.msgpack.Decoder(Answer | None).decode


class Owner:
    """Serves a `MemoryStore` on a Unix socket, from `start` to `close`.

    Args:
        path: of the socket, in a directory of ours alone.

    Attributes:
        path: the same.
    """

    def __init__(self, path: Path, store: MemoryStore | None = None) -> None:
        self.path = path
        self._store = store or MemoryStore()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_unix_server(self._on_connection, self.path)

    async def close(self) -> None:
        """Ends all connections."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        self.path.unlink(missing_ok=True)

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        open_ids: set[str] = set()
        try:
            while True:
                question = _decode_question(await read_frame(reader))
                write_frame(writer, _encode(self._answer(question, open_ids)))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, *_NONSENSE):
            pass  # the worker has gone, or the server ends
        finally:
            self._connections.discard(task)
            writer.close()
            for id in open_ids:
                self._store.settle(id)

    def _answer(self, question: _Question, open_ids: set[str]) -> Answer | None:
        take = question.take or question.change
        if take is not None:
            store = self._store
            answer = store.take(take) if question.take else store.change(take)
            if answer.granted:
                open_ids.add(take.id)
            else:
                open_ids.discard(take.id)
            return answer
        if question.renew is not None:
            self._store.renew(question.renew)
        if question.settle is not None:
            id, used = question.settle
            open_ids.discard(id)
            self._store.settle(id, used)
        return None


class OwnedStore:
    """A worker's end: a `Store`.

    Args:
        path: of the owner's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: deque[asyncio.Future[Answer | None]] = deque()
        self._connecting = asyncio.Lock()

    async def take(self, take: Take) -> Answer:
        """See `Store`."""
        return _expected(await self._ask(_Question(take=take)))

    async def change(self, take: Take) -> Answer:
        """See `Store`."""
        return _expected(await self._ask(_Question(change=take)))

    async def renew(self, used: dict[str, list[float]]) -> None:
        """See `Store`."""
        await self._ask(_Question(renew=used))

    async def settle(self, id: str, used: list[float]) -> None:
        """See `Store`."""
        await self._ask(_Question(settle=(id, used)))

    async def close(self) -> None:
        """See `Store`."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    async def _ask(self, question: _Question) -> Answer | None:
        async with self._connecting:
            if self._writer is None:
                try:
                    reader, self._writer = await asyncio.open_unix_connection(self._path)
                except OSError as error:
                    raise StoreFailure(f"the owner of the limits is gone: {error}") from error
                self._reading = asyncio.create_task(
                    self._read_answers(reader, self._writer), name="jaxserve limits"
                )
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        write_frame(self._writer, _encode(question))
        return await future

    async def _read_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while True:
                answer = _decode_answer(await read_frame(reader))
                future = self._waiting.popleft()
                if not future.done():  # else whoever asked was cancelled
                    future.set_result(answer)
        except (OSError, asyncio.IncompleteReadError, *_NONSENSE):
            pass
        finally:
            self._writer = None
            writer.close()
            while self._waiting:
                future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(StoreFailure("the owner of the limits has ended"))


def _expected(answer: Answer | None) -> Answer:
    if answer is None:
        raise StoreFailure("the owner of the limits gave no answer")
    return answer
