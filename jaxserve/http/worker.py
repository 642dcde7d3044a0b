"""One HTTP process: settings in on stdin, a listening socket inherited, an engine to talk to.

Started by `serve` as `python -m jaxserve.http.worker FD PARENT NEWS`. It writes one line to stdout
once it accepts connections, and hears from NEWS of the engine's lives (`http.news`). Exit status: 0
after SIGTERM and drain, 1 after a second SIGTERM or an error told in one sentence.

Invariants: never imports JAX; ends with its parent, whatever way that ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from jaxserve.config import Config
from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.http.adapters import Adapters
from jaxserve.http.app import create_app
from jaxserve.http.keyfile import load_keys
from jaxserve.http.metrics import Metrics
from jaxserve.http.news import News, listen
from jaxserve.http.observer.reporter import NoReporter, ObserverLink
from jaxserve.http.server import Server
from jaxserve.limits.stores import make_store
from jaxserve.lora.registry import Registry
from jaxserve.protocol.client import EngineClient
from jaxserve.protocol.parent import follow_parent
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.protocol.zmq import ZmqClient
from jaxserve.text.embedding import EmbeddingText, load_embedding_text
from jaxserve.text.template import ChatTemplate, load_chat_template
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.vocabulary import vocabulary_of

LISTENING = b"listening\n"

#: Loads the text half of a model.
LoadText = Callable[[Config], tuple[Tokenizer, ChatTemplate | None]]


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker is told by its supervisor.

    Attributes:
        config: with `model.path` and `embeddings.model` resolved.
        engine_address: of the engine's socket.
        index: among the workers; number 0 counts the engine's steps.
        metrics_file: shared by all workers.
        adapters_directory: where the names of adapters are, which all workers share.
        limits_socket: of the rate limits that all workers share; None where there is one worker.
        observer_socket: where it reports what it sees; None where nobody observes.
    """

    config: Config
    engine_address: str
    index: int
    metrics_file: Path
    adapters_directory: Path
    limits_socket: Path | None = None
    observer_socket: Path | None = None


def main(load_text: LoadText | None = None) -> int:
    """The child's entry; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which drains us
    follow_parent(int(sys.argv[2]))
    settings: WorkerSettings = pickle.load(sys.stdin.buffer)  # from our parent, through its pipe
    logging.basicConfig(level=settings.config.logging.level.upper(), stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    listener = socket.socket(fileno=int(sys.argv[1]))
    try:
        tokenizer, template = (load_text or load_model_text)(settings.config)
        embeddings = load_embedding_text(settings.config.embeddings, tokenizer)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, listener, tokenizer, template, embeddings))
    except JaxserveError as error:
        sys.stderr.write(f"jaxserve: {error.message}\n")
        return 1
    return 0


def load_model_text(config: Config) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer and chat template of the configured model."""
    path = Path(config.model.path)
    tokenizer = load_tokenizer(path, config.model.tokenizer)
    return tokenizer, load_chat_template(path, config.model.chat_template)


def model_names(config: Config) -> set[str]:
    """What the models of a resolved configuration are called, which no adapter may be."""
    return {config.model.served_name, config.embeddings.name} - {""}


async def _serve(
    settings: WorkerSettings,
    listener: socket.socket,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    embeddings: EmbeddingText | None,
) -> None:
    config = settings.config
    keys = load_keys(config.http)
    metrics = Metrics(
        lambda: client.status,
        settings.metrics_file,
        settings.index,
        config=config.telemetry,
        tenants=keys.tenants,
        page_size=config.cache.page_size,
    )
    link = _link(settings, metrics.followed)
    reporter = link or NoReporter()

    def on_stats(stats: StepStats) -> None:
        metrics.step(stats)
        reporter.step(stats)

    client = EngineClient(
        ZmqClient(settings.engine_address),
        on_stats=on_stats if settings.index == 0 else None,
        supervised=True,
        on_pause=lambda: begin_anew(),
        on_replay=metrics.replays,
        vocabulary=lambda: vocabulary_of(tokenizer),
    )

    address = settings.engine_address

    def begin_anew() -> None:
        """The engine may have cancelled what this process, which stood still, had running."""
        if client.down_s == 0:
            client.down()
            client.reconnect(ZmqClient(address))

    def on_news(news: News) -> None:
        nonlocal address
        if settings.index == 0:
            reporter.news(f"engine_{news.state}", news.error)
        match news.state:
            case "down":
                client.down()
            case "started":
                if settings.index == 0:
                    metrics.restarted()
                address = news.address
                client.reconnect(ZmqClient(address))
            case "failed":
                client.fail(DeviceFailure(news.error))

    await client.start()
    if link is not None:
        link.start()
    listen(int(sys.argv[3]), on_news)
    store = None
    if keys.is_limited:
        store = make_store(config.limits, settings.limits_socket, metrics.store_state)
    adapters = Adapters()
    if config.lora.enabled:
        taken = model_names(config)
        adapters = Adapters(Registry(config.lora, settings.adapters_directory, taken))
    app = create_app(
        client,
        tokenizer,
        template,
        config.http,
        page_size=config.cache.page_size,
        keys=keys,
        metrics=metrics,
        limits=config.limits,
        store=store,
        tools=config.tools,
        structured=config.structured,
        embeddings=embeddings,
        embeddings_config=config.embeddings,
        adapters=adapters,
        reporter=link,
        tracing=config.tracing,
        metering=config.metering,
    )
    await Server(app, config.http, _say_listening).run_on(listener, lambda: os._exit(1))
    await app.frontend.gate.close()
    await app.frontend.grammars.close()
    await app.frontend.settling.close()
    await client.close()
    if link is not None:
        await link.close()


def _link(
    settings: WorkerSettings, status: Callable[[], EngineStatus | None]
) -> ObserverLink | None:
    """The road to the observer, if there is one."""
    if settings.observer_socket is None:
        return None
    telemetry = settings.config.telemetry
    return ObserverLink(
        settings.observer_socket,
        settings.index,
        interval_s=telemetry.report_interval_s,
        max_records=telemetry.max_records,
        status=status if settings.index == 0 else None,
    )


def _say_listening() -> None:
    os.write(1, LISTENING)


if __name__ == "__main__":
    sys.exit(main())
