"""What the supervisor tells its HTTP workers about the engine, over a pipe to each.

    down     the engine's process has ended; another will be started
    started  there it is, at this address; what is unfinished goes on once it is ready
    failed   the engine will not be started again

A line of JSON each. The pipe says it in order, and to all workers alike: which life of the engine a
worker talks to is the supervisor's word, not what the worker happens to notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class News:
    """One piece.

    Attributes:
        state: "down", "started" or "failed".
        address: of the engine's socket, for "started".
        error: one sentence, for "failed".
    """

    state: str
    address: str = ""
    error: str = ""


class NewsPipe:
    """The supervisor's end of a worker's pipe.

    Attributes:
        reader: descriptor for the worker to inherit; `handed_over` closes it here.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def handed_over(self) -> Self:
        """The worker has its end."""
        os.close(self.reader)
        return self

    def tell(self, news: News) -> None:
        """Writes; a worker that has ended is told nothing."""
        line = json.dumps(dataclasses.asdict(news)).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # or reads no more
            os.write(self._writer, line)

    def close(self) -> None:
        """No more news."""
        os.close(self._writer)


def listen(reader: int, on_news: Callable[[News], None]) -> None:
    """Has the running event loop call `on_news` with each piece; the worker's end."""
    loop = asyncio.get_running_loop()
    waiting = b""

    def read() -> None:
        nonlocal waiting
        data = os.read(reader, 65536)
        if not data:
            loop.remove_reader(reader)  # the supervisor has ended, and we soon shall
            return
        *lines, waiting = (waiting + data).split(b"\n")
        for line in lines:
            on_news(News(**json.loads(line)))

    loop.add_reader(reader, read)
