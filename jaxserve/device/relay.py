"""Carries bytes between two connections: how a host reaches JAX's coordination service on host 0.

JAX's client ends its process, with a stack trace, the moment that its connection to the service
breaks; as when host 0 is killed. Behind a relay a broken connection is only silence, which JAX
bears for longer than `Hosts` needs to notice the loss and to end the process with a sentence. It
also leaves one port to open instead of two.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

_CHUNK_BYTES = 1 << 16

#: Opens the other half of a relayed connection.
Dial = Callable[[], socket.socket]


def listen_locally(dial: Dial) -> str:
    """Takes connections on a free port of this machine and relays each, for ever.

    Args:
        dial: called for each connection, in a thread.

    Returns:
        The address.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(
                target=_join, args=(near, dial), name="jaxserve relay", daemon=True
            ).start()

    threading.Thread(target=accept, name="jaxserve relay", daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def relay(near: socket.socket, far: socket.socket) -> None:
    """Carries bytes both ways until the near side ends; returns at once.

    If the far side breaks, the near side hears nothing more, and its words go nowhere.
    """
    near.settimeout(None)
    far.settimeout(None)
    for carry in (_there, _back):
        threading.Thread(target=carry, args=(near, far), name="jaxserve relay", daemon=True).start()


def _join(near: socket.socket, dial: Dial) -> None:
    try:
        far = dial()
    except OSError:
        near.close()  # the client tries again
        return
    relay(near, far)


def _there(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := near.recv(_CHUNK_BYTES):
            with contextlib.suppress(OSError):
                far.sendall(chunk)
    for end in (near, far):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes the other direction
        end.close()


def _back(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := far.recv(_CHUNK_BYTES):
            near.sendall(chunk)
