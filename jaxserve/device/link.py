"""Messages between two hosts over one TCP connection: a kind, a length, the bytes.

Plain sockets, since the engine half runs where nothing but JAX is installed. Measured on one
machine with two processes, 8 kB there and a word back take 19 µs; through JAX's key-value store
1.5 ms, and as a device broadcast (gloo) 3.8 ms, which could not be given up while a host is gone.

What comes from the other side is only ever JSON, text or numbers, and bounded in length.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
from enum import IntEnum
from typing import Any

_HEADER = struct.Struct("!BxxxI")
#: Longest message: a step's plan stays far below, but for adapters, which go in pieces.
MAX_BYTES = 1 << 28
#: Longest first message of one that nothing is known of yet.
MAX_HELLO_BYTES = 1 << 16


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1  # JSON: who connects, and how it is configured
    ANSWER = 2  # JSON: whether it may
    BEAT = 3  # nothing: the sender lives
    VALUE = 4  # JSON: see `Hosts.gather`
    PLAN = 5  # the device calls of a step
    BYE = 6  # text: why the sender ends
    PIECE = 7  # a part of a plan; the last one is the PLAN


class LinkClosed(Exception):
    """The other side is gone, silent, or does not speak this; the message completes a sentence."""


class Link:
    """One end of a connection. One thread receives; any may send.

    Args:
        connection: owned from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(True)
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, kind: Kind, payload: bytes | memoryview = b"") -> None:
        """Sends one message; waits for a slow receiver.

        Raises:
            LinkClosed: the connection is broken.
        """
        with self._sending:
            self._send(kind, payload)

    def beat(self) -> None:
        """Says that we live, unless a message that is being sent does."""
        if self._sending.acquire(blocking=False):
            try:
                self._send(Kind.BEAT, b"")
            finally:
                self._sending.release()

    def leave(self, reason: str, timeout_s: float = 1.0) -> None:
        """Says why we end and closes, if that does not take long."""
        with contextlib.suppress(LinkClosed, OSError):
            if self._sending.acquire(timeout=timeout_s):
                self._connection.settimeout(timeout_s)
                self._send(Kind.BYE, reason.encode())
                self._connection.shutdown(socket.SHUT_WR)
        self.close()

    def receive(self, silence_s: float, max_bytes: int = MAX_BYTES) -> tuple[Kind, bytes]:
        """The next message.

        Args:
            silence_s: how long nothing at all may come.

        Raises:
            LinkClosed: the other side closed, was silent for too long, or sent what is no message.
        """
        kind, length = _HEADER.unpack(self._read(_HEADER.size, silence_s))
        if kind not in Kind or length > max_bytes:
            raise LinkClosed("it sent what is no message of ours")
        return Kind(kind), bytes(self._read(length, silence_s))

    def receive_json(self, kind: Kind, silence_s: float, max_bytes: int = MAX_BYTES) -> Any:
        """The next message, which must be of this kind. Raises as `receive` does."""
        found, payload = self.receive(silence_s, max_bytes)
        if found is not kind:
            raise LinkClosed("it sent something else than was expected")
        try:
            return json.loads(payload)
        except ValueError:
            raise LinkClosed("it sent what is no JSON") from None

    def is_quiet(self, seconds: float) -> bool:
        """Waits so long; False at once if something comes, be it the end."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return not poll.poll(seconds * 1000)

    def detach(self) -> socket.socket:
        """The connection, for another use; the link is not used any more."""
        return self._connection

    def close(self) -> None:
        """Closes the connection; a thread that receives hears of it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, kind: Kind, payload: bytes | memoryview) -> None:
        try:
            self._connection.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise LinkClosed(f"its connection broke ({error.strerror or error})") from error

    def _read(self, length: int, silence_s: float) -> bytearray:
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            try:
                if self.is_quiet(silence_s):
                    raise LinkClosed(f"nothing was heard of it for {silence_s:g} s")
                count = self._connection.recv_into(rest)
            except OSError as error:
                raise LinkClosed(f"its connection broke ({error.strerror or error})") from error
            if not count:
                raise LinkClosed("its connection was closed")
            rest = rest[count:]
        return data
