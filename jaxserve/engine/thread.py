"""An engine in a thread of this process, for offline use and tests.

`EngineThread(config, load_parts)` loads the model in the caller's thread, so that errors are raised
there, and turns the step loop in its own; clients come through `connect()`.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Self

from jaxserve.config import Config
from jaxserve.engine.parts import Factory, Progressing
from jaxserve.engine.process import build_engine
from jaxserve.errors import ConfigError
from jaxserve.protocol.thread import ThreadClient, ThreadRoad

logger = logging.getLogger(__name__)


class EngineThread:
    """A loaded engine whose loop turns in a daemon thread until `close`.

    Args:
        factory: loads and compiles the model (`engine.load.load_parts`, or a fake).
        progress: told how far that is.

    Raises:
        ConfigError: it is to be one of several hosts: the loss of one ends the process, and that
            is to be the engine's own.
        JaxserveError: the model cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        factory: Factory,
        progress: Progressing = lambda phase, done, total: None,
    ) -> None:
        if config.parallel.hosts > 1:
            raise ConfigError(
                f"parallel.hosts={config.parallel.hosts}: an engine in a thread runs on one host; "
                "several are for `python -m jaxserve serve`"
            )
        self._road = ThreadRoad()
        self.engine = build_engine(config, self._road.server, factory(config, progress))
        self._thread = threading.Thread(target=self._serve, name="jaxserve engine", daemon=True)
        self._thread.start()

    def connect(self) -> ThreadClient:
        """The transport of a new client."""
        return self._road.connect()

    def close(self) -> None:
        """Ends the loop after its turn and joins the thread."""
        self.engine.stop()
        self._road.server.wake()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        try:
            self.engine.serve()
        except Exception:  # the clients have been told
            logger.exception("the engine thread failed")
