"""An engine process of a host that follows host 0, which never broadcasts anything."""

from __future__ import annotations

import dataclasses
import sys
import threading

from jaxserve.config import Config
from jaxserve.engine import process
from jaxserve.engine.parts import Parts, Progressing
from tests.fakes.engine import fake_parts


def following_parts(config: Config, progress: Progressing) -> Parts:
    """The fake's parts, waiting for host 0 for ever."""
    return dataclasses.replace(fake_parts(config, progress), follow=threading.Event().wait)


if __name__ == "__main__":
    sys.exit(process.main(following_parts))
