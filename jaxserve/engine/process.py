"""The engine process: settings in on stdin, a model served on a ZeroMQ address until the end.

Started by `protocol.spawn` as `python -m jaxserve.engine.process ADDRESS PARENT_PID`. The model is
loaded and compiled in the main thread while a `Greeter` answers clients; then the main thread turns
the step loop. Exit status: 0 after SIGTERM, 1 when it cannot start and has told why in a sentence,
3 when a step hung for longer than `engine.step_timeout_s`, 4 when one of several hosts was lost, 5
when a step raised.

On a host other than number 0 there is no scheduler and nobody asks for tokens: the main thread
makes the device calls that host 0 broadcasts (`follow`), and the `Greeter` goes on to say how it
is.

Invariant: the process ends with its parent, whatever way that ends.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from jaxserve.config import Config
from jaxserve.device.hosts import EXIT_LOST, Hosts
from jaxserve.engine.attribution import Attribution
from jaxserve.engine.embedding import Embedding
from jaxserve.engine.garbage import Collector, GarbageCollector
from jaxserve.engine.grammars import Grammars
from jaxserve.engine.greeter import Greeter
from jaxserve.engine.loop import Engine
from jaxserve.engine.parts import Factory, Parts, Progressing
from jaxserve.engine.probation import Probation
from jaxserve.engine.recorder import FlightRecorder, NoRecorder, Recorder
from jaxserve.errors import HostLost, JaxserveError
from jaxserve.protocol.flight import NUM_STEPS, flight_requests
from jaxserve.protocol.parent import follow_parent
from jaxserve.protocol.server import ServerTransport
from jaxserve.protocol.spawn import EngineSettings, fingerprint
from jaxserve.scheduler.copies import Schedulers

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_HUNG = 3
EXIT_STEP_FAILED = 5

#: Tokens beyond what may be launched and unread that a request on trial must come to.
TRIAL_TOKENS = 4


def main(factory: Factory | None = None) -> int:
    """The child's entry; returns its exit status.

    Args:
        factory: loads and compiles the model; `engine.load.load_parts` where None.
    """
    signal.signal(signal.SIGTERM, _exit_early)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which drains us
    follow_parent(int(sys.argv[2]))
    settings: EngineSettings = pickle.load(sys.stdin.buffer)  # from our parent, through its pipe
    config = settings.config
    logging.basicConfig(level=config.logging.level.upper(), stream=sys.stderr)
    if config.logging.level == "info":
        logging.getLogger("jax").setLevel("WARNING")  # it tells which back ends are not there
    if settings.messages != fingerprint():
        return _tell("the code on the disk has changed since the server was started: start it anew")
    from jaxserve.protocol.zmq import ZmqServer  # the bare accelerator image has no zmq

    server = ZmqServer(sys.argv[1])
    if config.parallel.host:
        _leave(follow(config, server, factory or _load_parts))
    try:
        status = run(settings, server, factory or _load_parts)
    finally:
        server.close()
    if config.parallel.hosts > 1:
        _leave(status)
    return status


def run(settings: EngineSettings, server: ServerTransport, factory: Factory) -> int:
    """Loads, then serves until SIGTERM; returns the exit status.

    Args:
        factory: loads and compiles the model, reporting progress.
    """
    config = settings.config
    recorder = _recorder(settings)
    greeter = Greeter(server, recorder.turned)
    greeter.start()
    try:
        parts = factory(config, greeter.progress)
        tokens = (NUM_STEPS + 1) * config.scheduler.decode_steps + TRIAL_TOKENS
        probation = Probation(settings.trials, settings.quarantined, tokens, recorder)
        engine = build_engine(config, server, parts, recorder, probation, GarbageCollector())
    except HostLost as error:
        return _give_up(greeter, error.message, EXIT_LOST)
    except JaxserveError as error:
        return _give_up(greeter, error.message)
    except Exception as error:
        logger.exception("start-up failed")
        return _give_up(greeter, f"{type(error).__name__}: {error}")
    hosts = parts.hosts
    greeter.progress("ready", 1, 1)
    greeter.stop()
    signal.signal(signal.SIGTERM, lambda *_: engine.stop())
    recorder.serving()
    engine.greet(greeter.clients)
    watch_steps(engine, config.engine.step_timeout_s, _exit_hung)
    try:
        engine.serve()
    except Exception:
        return _failed("the step loop failed", hosts)  # the clients have been told
    finally:
        _ignore_sigterm()
    if hosts is not None:
        hosts.close("it was told to end")
    return 0


def follow(config: Config, server: ServerTransport, factory: Factory) -> int:
    """Loads, then makes the device calls of host 0 until this process ends; returns its status.

    SIGTERM ends it at once.

    Args:
        server: by which it says how it is.
        factory: loads and compiles the model, reporting progress.
    """
    greeter = Greeter(server)
    greeter.start()
    try:
        return _follow(config, greeter, factory)
    finally:
        greeter.stop()


def _follow(config: Config, greeter: Greeter, factory: Factory) -> int:
    progressed: set[str] = set()

    def progress(phase: str, done: int, total: int) -> None:
        greeter.progress(phase, done, total)
        if phase not in progressed:
            progressed.add(phase)
            logger.info("host %d: %s", config.parallel.host, phase)

    try:
        parts = factory(config, progress)
    except HostLost as error:
        return _tell(error.message, EXIT_LOST)
    except JaxserveError as error:
        return _tell(error.message)
    except Exception as error:
        logger.exception("start-up failed")
        return _tell(f"{type(error).__name__}: {error}")
    assert parts.follow is not None
    hosts = parts.hosts
    greeter.following(lambda: hosts.behind_s if hosts is not None else 0.0)
    progress("ready", 1, 1)
    try:
        parts.follow()
    except Exception:
        return _failed("a step failed", hosts)
    return 0


def build_engine(
    config: Config,
    server: ServerTransport,
    parts: Parts,
    recorder: Recorder | None = None,
    probation: Probation | None = None,
    collector: Collector | None = None,
) -> Engine:
    """An engine over a loaded model."""
    scheduler = Schedulers(
        config.scheduler,
        parts.model,
        page_size=parts.page_size,
        num_pages=parts.num_pages,
        host_pages=parts.host_pages,
        preemption=config.cache.preemption,
        copies=parts.copies,
        cache=config.cache,
        batch_invariant=config.engine.batch_invariant,
        adapter_slots=parts.adapter_slots,
    )
    recorder = recorder or NoRecorder()
    attribution = None
    if config.telemetry.enabled:
        attribution = Attribution(parts.work, config.scheduler.max_rows, parts.copies)
    on_cpu = parts.device is not None and parts.device.kind == "cpu"
    return Engine(
        *(parts.model, scheduler, parts.batch, parts.executor, server),
        recorder=recorder,
        probation=probation,
        adapters=parts.adapters,
        grammars=Grammars(config.structured, parts.model, spares_cores=on_cpu),
        embedding=Embedding(parts.embedding, config.embeddings, config.scheduler, recorder),
        attribution=attribution,
        collector=collector,
        device=parts.device,
    )


def _recorder(settings: EngineSettings) -> Recorder:
    """The flight recorder, where the parent wants one."""
    if settings.flight is None:
        return NoRecorder()
    config = settings.config
    max_rows, copies = config.scheduler.max_rows, config.parallel.data
    return FlightRecorder(
        settings.flight, config.engine, max_rows, copies, max_requests=flight_requests(config)
    )


def watch_steps(engine: Engine, timeout_s: float, on_hang: Callable[[float], None]) -> None:
    """Calls `on_hang` with the step's age once the loop has not turned for `timeout_s`."""

    def watch() -> None:
        while True:
            age_s = (time.monotonic_ns() - engine.step_ns) / 1e9
            if age_s > timeout_s:
                on_hang(age_s)
                return
            time.sleep(timeout_s - age_s + 0.01)

    threading.Thread(target=watch, name="jaxserve step watch", daemon=True).start()


def _exit_hung(age_s: float) -> None:
    sys.stderr.write(f"jaxserve: a step has hung for {age_s:.0f} s; the engine process ends\n")
    sys.stderr.flush()
    os._exit(EXIT_HUNG)


def _load_parts(config: Config, progress: Progressing) -> Parts:
    from jaxserve.engine.load import load_parts  # JAX; clients are greeted meanwhile

    return load_parts(config, progress)


def _exit_early(signum: int, frame: object) -> None:
    """SIGTERM before the engine serves: nothing is lost, and compiling threads are not awaited."""
    os._exit(0)


def _ignore_sigterm() -> None:
    """The exit status is settled; a SIGTERM while the interpreter winds up must not change it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _give_up(greeter: Greeter, sentence: str, status: int = EXIT_FAILED) -> int:
    _ignore_sigterm()
    greeter.fail(sentence)
    return _tell(sentence, status)


def _tell(sentence: str, status: int = EXIT_FAILED) -> int:
    sys.stderr.write(f"jaxserve: {sentence}\n")
    return status


def _failed(what: str, hosts: Hosts | None) -> int:
    """A step raised: its own fault, or, where there are several hosts, that one was lost."""
    logger.exception(what)
    if hosts is not None:
        hosts.await_loss()  # ends the process
        hosts.close(what)
    return EXIT_STEP_FAILED


def _leave(status: int) -> NoReturn:
    """Ends the process without JAX's exit handler, which would wait for the other hosts."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
