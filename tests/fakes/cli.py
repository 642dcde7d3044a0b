"""The command line over the fake engine: `python -m tests.fakes.cli generate …`."""

from __future__ import annotations

import signal
import sys

from jaxserve import cli
from jaxserve.config import Config
from jaxserve.engine.thread import EngineThread
from jaxserve.offline import LLM
from jaxserve.text.template import ChatTemplate
from tests.fakes.engine import fake_parts
from tests.fakes.tokenizer import CHAT_TEMPLATE, ByteTokenizer


def open_fake(config: Config) -> LLM:
    """What `jaxserve.cli` opens instead of a model."""
    template = ChatTemplate(CHAT_TEMPLATE)
    return LLM.over(EngineThread(config, fake_parts), config, ByteTokenizer(), template)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even where a shell had it ignored
    cli._open = open_fake
    sys.exit(cli.main())
