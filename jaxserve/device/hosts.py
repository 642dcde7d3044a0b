"""Several hosts that run one engine: what they say to each other, and how they notice a loss.

    host 0   listens on parallel.coordinator ── plans, beats ──▶ host 1 … N-1
             scheduler, clients              ◀─ beats, values ──

Every host loads its shards of the model and compiles the same programs. Then host 0 schedules and
sends each step's device calls (`Executor`), and the others make the same calls in the same order,
which is all that JAX asks of processes that share a mesh.

Each connection carries a beat every fifth of `parallel.lost_after_s`, both ways, from a thread of
its own; another one listens. A host that is silent for that long, or whose connection breaks, is
lost, and with it the engine: its arrays were part of every step. The thread that notices writes one
sentence, passes it on and ends the process (status EXIT_LOST), since the main thread may be
inside a collective that never returns. Whoever started the process starts it again (`http.serve`),
and it waits for the others anew (`device.meeting`).
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Never

from jaxserve.config import ParallelConfig
from jaxserve.device.link import Kind, Link, LinkClosed

#: Of a plan; one that brings an adapter may be larger.
PIECE_BYTES = 1 << 26
#: Exit status of an engine that lost one of its hosts, or never found them.
EXIT_LOST = 4


class Hosts:
    """The links to the other hosts: from host 0 to each, from each to host 0.

    Args:
        config: which host this is, of how many.
        links: by host.
        on_lost: called, in any thread, with the sentence that says which host was lost; does
            not return.
    """

    def __init__(
        self,
        config: ParallelConfig,
        links: Mapping[int, Link],
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.host = config.host
        self.count = config.hosts
        self._links = dict(links)
        self._silence_s = config.lost_after_s
        self._on_lost = on_lost or _end
        self._plans: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._unmade_ns: deque[int] = deque()  # when each plan came whose calls are not made yet
        self._values: dict[int, queue.SimpleQueue[Any]] = {
            host: queue.SimpleQueue() for host in links
        }
        self._ending = threading.Lock()
        threading.Thread(target=self._beat, name="jaxserve host beat", daemon=True).start()
        for host in links:
            threading.Thread(
                target=self._listen, args=(host,), name=f"jaxserve host {host}", daemon=True
            ).start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """What each host gives here, by host; all hosts call this, with the same name, and wait.

        Args:
            value: as JSON has it.
        """
        if self.host:
            self._send(0, Kind.VALUE, json.dumps([name, value]).encode())
            return self._value(0, name)
        values = [value, *(self._value(host, name) for host in sorted(self._links))]
        for host in self._links:
            self._send(host, Kind.VALUE, json.dumps([name, values]).encode())
        return values

    def broadcast(self, plan: memoryview) -> None:
        """Host 0: sends every other host the device calls that come next."""
        first = 0
        while len(plan) - first > PIECE_BYTES:
            for host in self._links:
                self._send(host, Kind.PIECE, plan[first : first + PIECE_BYTES])
            first += PIECE_BYTES
        for host in self._links:
            self._send(host, Kind.PLAN, plan[first:])

    def plans(self) -> Iterator[bytes]:
        """The others: what host 0 broadcasts, for as long as it lives."""
        while True:
            yield self._plans.get()
            self._unmade_ns.popleft()

    @property
    def behind_s(self) -> float:
        """The others: how long the oldest plan waits whose calls are not made; 0 if none does."""
        try:
            return (time.monotonic_ns() - self._unmade_ns[0]) / 1e9
        except IndexError:  # no look beforehand: its thread takes them meanwhile
            return 0.0

    def await_loss(self) -> None:
        """After a failed device call: returns only if it was not for a host that was lost."""
        time.sleep(1.5 * self._silence_s)

    def close(self, reason: str) -> None:
        """Tells the others why this host ends; nothing that they do matters any more."""
        if self._ending.acquire(blocking=False):
            for link in self._links.values():
                link.leave(reason)

    def _value(self, host: int, name: str) -> Any:
        theirs, value = self._values[host].get()
        if theirs != name:
            self._lose(host, f"it is at {theirs!r} where this host is at {name!r}")
        return value

    def _send(self, host: int, kind: Kind, payload: bytes | memoryview) -> None:
        try:
            self._links[host].send(kind, payload)
        except LinkClosed as error:
            self._lose(host, str(error))

    def _beat(self) -> None:
        while True:
            time.sleep(self._silence_s / 5)
            for host, link in self._links.items():
                try:
                    link.beat()
                except LinkClosed as error:
                    self._lose(host, str(error))

    def _listen(self, host: int) -> None:
        link = self._links[host]
        pieces: list[bytes] = []
        try:
            while True:
                kind, payload = link.receive(self._silence_s)
                match kind:
                    case Kind.PIECE:
                        pieces.append(payload)
                    case Kind.PLAN:
                        self._unmade_ns.append(time.monotonic_ns())
                        self._plans.put(b"".join([*pieces, payload]) if pieces else payload)
                        pieces.clear()
                    case Kind.VALUE:
                        self._values[host].put(json.loads(payload))
                    case Kind.BYE:
                        raise LinkClosed(payload.decode(errors="replace"))
                    case _:
                        pass
        except LinkClosed as error:
            self._lose(host, str(error))
        except Exception as error:  # nobody would listen any more
            self._lose(host, f"{type(error).__name__}: {error}")

    def _lose(self, host: int, reason: str) -> Never:
        """Ends the process: of several threads that notice, the first does."""
        if self._ending.acquire(blocking=False):
            sentence = reason if " was lost: " in reason else f"host {host} was lost: {reason}"
            for other, link in self._links.items():
                if other != host:
                    link.leave(sentence)
            self._on_lost(sentence)
        threading.Event().wait()
        raise AssertionError("nobody sets it")


def _end(sentence: str) -> None:
    sys.stderr.write(f"jaxserve: {sentence}\n")
    sys.stderr.flush()
    os._exit(EXIT_LOST)
