"""`python -m jaxserve serve`: binds, resolves the model, starts the engine and the HTTP workers.

    serve ─┬─ engine process (JAX)          ← ZeroMQ, ipc:// ─┐
           ├─ HTTP worker 0 ──────────────────────────────────┤   all workers accept on
           ├─ HTTP worker 1 … ────────────────────────────────┘   the one listening socket
           └─ observer        ← what the workers see: traces, SLOs, costs, alerts

The supervisor serves nothing itself: it shows start-up's progress, watches its children, and passes
SIGTERM on. An engine that dies is started again, within a budget, and the workers' streams go on
there (`http.lives`, `protocol.replay`). A worker that ends by itself, or an engine that is not
started again, ends the server, with a status other than 0 and one sentence; whoever runs us
(systemd, Kubernetes) starts it again. The children end with us, even if we are killed.

Where the model is spread over several hosts, an engine ends also because one was lost. The other
hosts serve nothing but probes: there, this keeps an engine running (`http.follower`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import resource
import signal
import socket
import ssl
import subprocess
import sys
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from pathlib import Path

from jaxserve.bars import StartupBars
from jaxserve.config import Config, HttpConfig, ModelConfig, WeightsConfig
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.http.auth import check_exposure
from jaxserve.http.follower import run_follower
from jaxserve.http.keyfile import load_keys
from jaxserve.http.lives import Lives
from jaxserve.http.metrics import create_shared
from jaxserve.http.news import News, NewsPipe
from jaxserve.http.observer.keeper import ObserverKeeper
from jaxserve.http.observer.parts import check_parts
from jaxserve.http.restarts import ended
from jaxserve.http.worker import WorkerSettings, model_names
from jaxserve.limits.owner import Owner
from jaxserve.limits.stores import shared_store
from jaxserve.lora.registry import configured
from jaxserve.protocol.scratch import ScratchDirectory
from jaxserve.protocol.status import Progress
from jaxserve.weights import sources

#: Connections that may wait to be accepted.
BACKLOG = 2048
#: How long workers get to tell their clients that the server ends.
FAREWELL_S = 5.0
#: Beyond `http.drain_timeout_s`, how long workers get to close their connections.
CLOSING_S = 10.0

#: Finds (downloads) the model's files: `weights.sources.resolve`.
Resolve = Callable[[ModelConfig, WeightsConfig, Callable[[str, int, int], None]], Path]


def serve(
    config: Config,
    *,
    resolve: Resolve | None = None,
    engine_module: str = "jaxserve.engine.process",
    worker_module: str = "jaxserve.http.worker",
    observer_module: str = "jaxserve.http.observer.process",
) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status.

    Args:
        resolve: where the model's files come from.
        engine_module, worker_module, observer_module: what the children run.

    Returns:
        0 after a drain; 1 after an error, which has been told in one sentence on stderr.
    """
    try:
        if config.parallel.host:
            _check_tls(config.http)
            with _bind(config.http) as listener:
                config = _resolved(config, resolve)
                return asyncio.run(run_follower(config, listener, engine_module))
        check_exposure(config.http)
        load_keys(config.http)
        configured(config.lora)
        if config.limits.redis_url:
            shared_store(config.limits)
        _check_tls(config.http)
        if config.telemetry.enabled:
            check_parts(config)
        with _bind(config.http) as listener:
            config = _resolved(config, resolve)
            configured(config.lora, model_names(config))
            _allow_many_files()
            modules = (engine_module, worker_module, observer_module)
            return asyncio.run(_Supervisor(config, listener, *modules).run())
    except JaxserveError as error:
        sys.stderr.write(f"jaxserve: {error.message}\n")
        return 1
    except KeyboardInterrupt:
        return 130


class _Worker:
    """One HTTP process, as its parent sees it."""

    def __init__(self, settings: WorkerSettings, listener: socket.socket, module: str) -> None:
        fd = listener.fileno()
        self.name = f"HTTP worker {settings.index}"
        self._news = NewsPipe()
        news = self._news.reader
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(fd), str(os.getpid()), str(news)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[fd, news],
        )
        self._news.handed_over()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(pickle.dumps(settings))
            self.process.stdin.close()
        except BrokenPipeError:
            self.process.stdin = None  # it died at once; waiting for its end says so

    async def ready(self) -> None:
        """Waits until it takes requests (or has ended)."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self.process.stdout
        )
        try:
            await reader.readline()
        finally:
            transport.close()

    def tell(self, news: News) -> None:
        """Tells it about the engine."""
        self._news.tell(news)

    def close(self) -> None:
        """Kills it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._news.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


class _Supervisor:
    """Starts the children and watches them."""

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        engine_module: str,
        worker_module: str,
        observer_module: str,
    ) -> None:
        self._config = config
        self._listener = listener
        self._engine_module = engine_module
        self._worker_module = worker_module
        self._observer_module = observer_module
        self._workers: list[_Worker] = []
        self._ready: asyncio.Future[list[None]] | None = None
        self._stopping = asyncio.Event()
        self._limits: Owner | None = None
        self._observer: ObserverKeeper | None = None
        self._bars = StartupBars(stay=True)

    async def run(self) -> int:
        """Runs the server's life; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        scratch = ScratchDirectory()
        self._limits = Owner(scratch.path / "limits") if self._shares_limits() else None
        if self._config.telemetry.enabled:
            self._observer = ObserverKeeper(self._config, scratch.path, self._observer_module)
        lives = Lives(
            self._config,
            scratch.path / "flight",
            self._engine_module,
            tell=self._tell,
            on_progress=self._show,
            on_ready=self._announce,
        )
        try:
            if self._limits is not None:
                await self._limits.start()
            if self._observer is not None:
                self._observer.start()
            try:
                self._start_workers(lives.launch(), scratch.path)
            except OSError as error:
                raise ConfigError(
                    f"the server's processes cannot be started: {error}; is there room in "
                    f"{scratch.path.parent} (TMPDIR), and for more processes?"
                ) from None
            return await self._watch(lives)
        finally:
            self._bars.close()
            for worker in self._workers:
                worker.close()
            lives.close()
            if self._limits is not None:
                await self._limits.close()
            if self._observer is not None:
                await self._observer.close()
            scratch.remove()

    def _shares_limits(self) -> bool:
        """Whether there are rate limits that several workers must keep together."""
        http = self._config.http
        return http.workers > 1 and load_keys(http).is_limited

    def _start_workers(self, address: str, scratch: Path) -> None:
        metrics_file = scratch / "metrics"
        create_shared(metrics_file, self._config.http.workers)
        for index in range(self._config.http.workers):
            settings = WorkerSettings(
                config=self._config,
                engine_address=address,
                index=index,
                metrics_file=metrics_file,
                adapters_directory=scratch / "adapters",
                limits_socket=self._limits.path if self._limits is not None else None,
                observer_socket=self._observer.socket if self._observer is not None else None,
            )
            self._workers.append(_Worker(settings, self._listener, self._worker_module))
        ready = (worker.ready() for worker in self._workers)
        self._ready = asyncio.ensure_future(asyncio.gather(*ready))

    def _show(self, progress: Progress) -> None:
        if progress.phase != "ready":
            self._bars.show(progress.phase, progress.done, progress.total)

    def _tell(self, news: News) -> None:
        self._bars.close()
        for worker in self._workers:
            worker.tell(news)

    async def _watch(self, lives: Lives) -> int:
        """Waits for the first of: the engine's last end, a worker's, a signal."""
        engine = asyncio.create_task(lives.run())
        worker_ends = [asyncio.create_task(ended(w.process.pid)) for w in self._workers]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([engine, stopping, *worker_ends], return_when=FIRST_COMPLETED)
            if engine.done():
                return await self._farewell(worker_ends, engine.result())
            if not stopping.done():
                sentence = self._worker_end()
                sys.stderr.write(f"jaxserve: {sentence}\n")
                self._tell(News(state="failed", error=sentence))
                return await self._farewell(worker_ends, 1)
            status = await self._drain(worker_ends)
            return engine.result() if engine.done() else status
        finally:
            tasks = [engine, stopping, *worker_ends]
            if self._ready is not None:
                tasks.append(self._ready)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _announce(self) -> None:
        """An engine is ready, and with the first one the workers."""
        assert self._ready is not None
        await asyncio.shield(self._ready)
        self._bars.close()
        scheme = "https" if self._config.http.tls_certificate else "http"
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        sys.stdout.write(f"ready on {scheme}://{host}:{port}\n")
        sys.stdout.flush()

    def _worker_end(self) -> str:
        """How a worker ended, in a sentence."""
        for worker in self._workers:
            status = worker.process.poll()
            if status is not None:
                how = f"by signal {-status}" if status < 0 else f"with status {status}"
                return f"{worker.name} ended {how}; the server ends"
        return "an HTTP worker ended; the server ends"

    async def _farewell(self, worker_ends: list[asyncio.Task[None]], status: int) -> int:
        """Lets workers whose streams have failed tell their clients; returns the status."""
        for worker in self._workers:
            worker.process.terminate()
        await asyncio.wait(worker_ends, timeout=FAREWELL_S)
        return status

    async def _drain(self, worker_ends: list[asyncio.Task[None]]) -> int:
        """Has the workers finish their streams; a second signal ends it at once.

        The engine is kept running meanwhile, and started again where it dies.
        """
        for worker in self._workers:
            worker.process.terminate()
        self._stopping.clear()
        again = asyncio.create_task(self._stopping.wait())
        ended = asyncio.create_task(_all_ended(worker_ends))
        limit_s = self._config.http.drain_timeout_s + CLOSING_S
        done, _ = await asyncio.wait([again, ended], timeout=limit_s, return_when=FIRST_COMPLETED)
        again.cancel()
        ended.cancel()
        if ended not in done:
            sys.stderr.write("jaxserve: ended before all streams were done\n")
            return 1
        # A worker that had just begun dies of the signal itself: nothing was cut off.
        clean = (0, -signal.SIGTERM)
        return int(any(worker.process.wait() not in clean for worker in self._workers))

    def _on_signal(self) -> None:
        self._stopping.set()


async def _all_ended(ends: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(ends)


def _resolved(config: Config, resolve: Resolve | None) -> Config:
    """The configuration with the model's files in place of their address."""
    with StartupBars(stay=True) as bars:
        path = (resolve or sources.resolve)(config.model, config.weights, bars.show)
        embeddings = sources.resolve_encoder(config, bars.show)
    model = dataclasses.replace(
        config.model, path=str(path), served_name=sources.served_name(config.model)
    )
    return dataclasses.replace(config, model=model, embeddings=embeddings)


def _bind(config: HttpConfig) -> socket.socket:
    """The listening socket.

    Raises:
        ConfigError: the address is not ours, or the port is in use.
    """
    host = config.host.strip("[]")
    try:
        infos = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)
        family, kind, number, _, address = infos[0]
        listener = socket.socket(family, kind, number)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another "
            "with http.port"
        ) from None
    listener.setblocking(False)
    return listener


def _allow_many_files() -> None:
    """Raises what many systems set low, 1,024 files: each client's connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _check_tls(config: HttpConfig) -> None:
    if not config.tls_certificate:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot use the TLS files {config.tls_certificate} and {config.tls_key}: {error}"
        ) from None
