"""An engine in another process: messages as MessagePack over ZeroMQ on a private ipc socket.

The engine's ROUTER binds, each client (HTTP worker, offline program) connects a DEALER. Each
message is one frame: an array of its tag and its fields in the order of `messages`, checked
against the types there when it is read.

Invariants: a frame that is not a message is counted and dropped, and stops nobody. Sending never
blocks: a client whose queue is full gets a `Backlog`, one that is gone is reported as `Goodbye`.
The only module that imports zmq.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import typing
from collections import deque
from collections.abc import Callable, Hashable

import zmq

from jaxserve.protocol.codec import Codec
from jaxserve.protocol.messages import ClientMessage, EngineMessage, Goodbye
from jaxserve.protocol.server import Arrival, Backlog

logger = logging.getLogger(__name__)

#: Messages that wait in ZeroMQ for one client before they are merged in its backlog.
HIGH_WATER = 64
#: A larger frame ends the connection it came from.
MAX_FRAME_BYTES = 256 * 1024 * 1024
#: How long closing may take to send what is left.
LINGER_MS = 500
#: Silence after which a client counts as gone. One that died is noticed at once, when something is
#: sent to it; this is for one that stands still for good.
SILENCE_S = 600.0
#: While some client has a backlog, an idle engine looks again this often.
BACKLOG_POLL_S = 0.01


TO_ENGINE = Codec(ClientMessage)
TO_CLIENT = Codec(EngineMessage)


class ZmqServer:
    """The engine's end: a `ServerTransport`. One thread at a time may use it.

    Args:
        address: ipc:// path in a directory that only this user may enter.
        silence_s: a client not heard of for so long is reported as gone. What it sent while this
            end did not read counts: a long step makes nobody silent.

    Attributes:
        num_malformed: frames dropped so far.
    """

    def __init__(self, address: str, *, silence_s: float = SILENCE_S) -> None:
        self.num_malformed = 0
        self._silence_s = silence_s
        self._heard_s: dict[Hashable, float] = {}
        self._swept_s = time.monotonic()
        self._backlogs: dict[Hashable, Backlog] = {}
        self._lost: list[Hashable] = []
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a client that is gone is an error
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.bind(address)

    def receive(self, timeout_s: float) -> list[Arrival]:
        """See `ServerTransport`."""
        self._flush()
        if timeout_s > 0 and not self._lost:
            wait_s = min(timeout_s, BACKLOG_POLL_S) if self._backlogs else timeout_s
            self._socket.poll(int(wait_s * 1000) or 1)
        return [*self._read(), *self._gone()]

    def _read(self) -> list[Arrival]:
        arrivals: list[Arrival] = []
        now_s = time.monotonic()
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return arrivals
            client = frames[0]
            try:
                if len(frames) != 2:
                    raise ValueError(f"{len(frames) - 1} frames instead of 1")
                message: ClientMessage = TO_ENGINE.decode(frames[1])
            except ValueError as error:
                self.num_malformed += 1
                logger.warning("dropped a frame of client %s: %s", client.hex(), error)
                continue
            if isinstance(message, Goodbye):
                self._forget(client)
            else:
                self._heard_s[client] = now_s
            arrivals.append((client, message))

    def send(self, client: Hashable, message: EngineMessage) -> None:
        """See `ServerTransport`."""
        if client not in self._heard_s:
            return
        backlog = self._backlogs.get(client)
        if backlog is not None:
            backlog.add(message)
        elif not self._try_send(client, message) and client in self._heard_s:
            backlog = self._backlogs[client] = Backlog()
            backlog.add(message)

    def close(self) -> None:
        """See `ServerTransport`."""
        self._flush()
        self._socket.close()
        self._context.term()

    def _try_send(self, client: Hashable, message: EngineMessage) -> bool:
        """Whether ZeroMQ took it. A client that is gone is noted."""
        try:
            name = typing.cast(bytes, client)  # as `receive` gave it
            self._socket.send_multipart([name, TO_CLIENT.encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            logger.info("client %s is gone: %s", client, error)
            self._forget(client)
            self._lost.append(client)
            return False
        return True

    def _flush(self) -> None:
        for client, backlog in list(self._backlogs.items()):
            while backlog:
                message = backlog.pop()
                if not self._try_send(client, message):
                    backlog.push_back(message)
                    break
            else:
                self._backlogs.pop(client, None)

    def _gone(self) -> list[Arrival]:
        """A Goodbye for each client that vanished or fell silent."""
        now_s = time.monotonic()
        if now_s - self._swept_s > 1.0:
            self._swept_s = now_s
            for client, heard_s in list(self._heard_s.items()):
                if now_s - heard_s > self._silence_s:
                    self._forget(client)
                    self._lost.append(client)
        gone, self._lost = self._lost, []
        return [(client, Goodbye()) for client in gone]

    def _forget(self, client: Hashable) -> None:
        self._heard_s.pop(client, None)
        self._backlogs.pop(client, None)


class ZmqClient:
    """A client's end: a `ClientTransport`. A thread of its own does the waiting and decoding.

    Args:
        address: where the engine binds; it may come later.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._outgoing: deque[ClientMessage] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._closing = False
        self._linger_ms = LINGER_MS
        self._thread: threading.Thread | None = None

    def open(self, deliver: Callable[[EngineMessage], None]) -> None:
        """See `ClientTransport`."""
        self._thread = threading.Thread(
            target=self._run, args=(deliver,), name="jaxserve engine client", daemon=True
        )
        self._thread.start()

    def send(self, message: ClientMessage) -> None:
        """See `ClientTransport`."""
        self._outgoing.append(message)
        self._wake()

    def close(self) -> None:
        """See `ClientTransport`."""
        self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def abandon(self) -> None:
        """See `ClientTransport`."""
        self._linger_ms = 0
        self._outgoing.clear()
        self.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_write, b"\0")

    def _run(self, deliver: Callable[[EngineMessage], None]) -> None:
        context = zmq.Context(io_threads=1)
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.connect(self._address)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                    closing = self._closing
                    while self._outgoing:
                        socket.send(TO_ENGINE.encode(self._outgoing.popleft()))
                    if closing:
                        return
                if socket in ready:
                    self._receive(socket, deliver)
        finally:
            socket.close(self._linger_ms)
            context.term()

    def _receive(self, socket: zmq.Socket[bytes], deliver: Callable[[EngineMessage], None]) -> None:
        for _ in range(HIGH_WATER):
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = TO_CLIENT.decode(frame)
            except ValueError as error:
                logger.warning("dropped a frame of the engine: %s", error)
                continue
            deliver(message)
