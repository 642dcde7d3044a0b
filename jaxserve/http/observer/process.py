"""The observer's process: what must be one for all HTTP workers, and must not take their time.

Started by `serve` as `python -m jaxserve.http.observer.process PARENT`, its settings on stdin.
Where it dies it is started again (`http.observer.keeper`); serving does not notice.

Invariants: never imports JAX; ends with its parent, whatever way that ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import uvloop

from jaxserve.config import Config
from jaxserve.errors import JaxserveError
from jaxserve.http.observer.observer import Observer
from jaxserve.http.observer.parts import make_parts
from jaxserve.protocol.parent import follow_parent

#: How much less urgent it is than those who serve.
NICENESS = 5


@dataclass(frozen=True, kw_only=True)
class ObserverSettings:
    """What the process is told by its supervisor.

    Attributes:
        config: with `model.path` and `embeddings.model` resolved.
        socket: where it listens.
        state: directory of what outlives it; outlives: whether that outlives the server, too.
    """

    config: Config
    socket: Path
    state: Path
    outlives: bool = True


def main() -> int:
    """The child's entry; returns its exit status: 0 after SIGTERM, 1 after an error told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us
    follow_parent(int(sys.argv[1]))
    settings: ObserverSettings = pickle.load(sys.stdin.buffer)  # from our parent, through its pipe
    logging.basicConfig(level=settings.config.logging.level.upper(), stream=sys.stderr)
    os.nice(NICENESS)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_observe(settings))
    except JaxserveError as error:
        sys.stderr.write(f"jaxserve: {error.message}\n")
        return 1
    return 0


async def _observe(settings: ObserverSettings) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    config = settings.config

    def tell(topic: str, body: bytes) -> None:
        observer.tell(topic, body)

    def news(kind: str, subject: str) -> None:
        observer.news(kind, subject)

    parts = make_parts(config, settings.state, tell, news)
    observer = Observer(
        settings.socket, parts, config.telemetry.flush_interval_s, outlives=settings.outlives
    )
    await observer.start()
    await stopping.wait()
    await observer.close()


if __name__ == "__main__":
    sys.exit(main())
