"""How the hosts of one engine find each other: at an address of host 0, before anything else.

Host 0 listens on `parallel.coordinator`. Each of the others connects, says which host it is and how
it is configured, and is refused or kept; when all are there, they are welcomed and go on together
as `Hosts`, and start `jax.distributed`. The same port leads to JAX's coordination service, through
a relay (`device.relay`), for as long as the engine lives.

Nothing is authenticated, as in JAX's own service: the port is for a private network.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.config import ParallelConfig
from jaxserve.device.hosts import Hosts
from jaxserve.device.link import MAX_HELLO_BYTES, Kind, Link, LinkClosed
from jaxserve.device.relay import listen_locally, relay
from jaxserve.errors import ConfigError, HostLost

logger = logging.getLogger(__name__)

#: How long one that connects may take to say who it is, and be told whether it may.
_HELLO_S = 10.0
_RETRY_S = 0.25
#: JAX's own watch over its processes; ours, `parallel.lost_after_s`, is to be first.
_JAX_WATCH = 10
#: Differences of configuration that a refusal names.
_NAMED = 3

#: Settings that all hosts must have alike, by key, as JSON has them.
Agreed = Mapping[str, Any]


def connect(
    config: ParallelConfig,
    agreed: Agreed,
    on_lost: Callable[[str], None] | None = None,
) -> Hosts | None:
    """Meets the other hosts and starts `jax.distributed`; None where there is only one.

    Comes before anything else that JAX is asked for.

    Args:
        agreed: what must be alike on all hosts.
        on_lost: as `Hosts` takes it; by itself, the process ends.

    Raises:
        HostLost: the others could not be met within `parallel.connect_timeout_s`.
        ConfigError: host 0 refuses this host, or its address is not ours to listen on.
    """
    if config.hosts == 1:
        return None
    deadline_s = time.monotonic() + config.connect_timeout_s
    if config.host:
        link = _join(config, agreed, deadline_s)
        service = listen_locally(lambda: _dial_service(config))
        hosts = Hosts(config, {0: link}, on_lost)
    else:
        gate = _Gate(config, agreed)
        try:
            links = gate.wait(deadline_s)
        except HostLost:
            gate.close()
            raise
        service = gate.service
        hosts = Hosts(config, links, on_lost)
    hosts.gather("met", None)
    _start_jax(config, service)
    return hosts


def split_address(config: ParallelConfig) -> tuple[str, int]:
    """Host and port of `parallel.coordinator`."""
    host, _, port = config.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _start_jax(config: ParallelConfig, service: str) -> None:
    import jax  # after the meeting, which needs none of it

    # It would take SIGTERM, which is ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timeout_s = max(1, round(config.connect_timeout_s))
    watch_s = max(100, round(_JAX_WATCH * config.lost_after_s))
    try:
        jax.distributed.initialize(
            coordinator_address=service,
            coordinator_bind_address=service,
            num_processes=config.hosts,
            process_id=config.host,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=watch_s,
            cluster_detection_method="deactivate",
        )
    except RuntimeError as error:
        raise HostLost(f"jax.distributed did not start: {error}") from error


def _join(config: ParallelConfig, agreed: Agreed, deadline_s: float) -> Link:
    """Host 0's link, once it has let us in."""
    reason = ""
    while time.monotonic() < deadline_s:
        try:
            link = Link(_dial(config, deadline_s))
        except OSError as error:
            reason = str(error.strerror or error)
        else:
            try:
                link.send(Kind.HELLO, _hello(config, agreed))
                answer = _await_answer(link, deadline_s)
            except LinkClosed as error:
                reason = str(error)
            else:
                if answer.get("welcome"):
                    return link
                reason = str(answer.get("refused"))
                if not answer.get("later"):
                    link.close()
                    raise ConfigError(f"host 0 refuses host {config.host}: {reason}")
            link.close()
        time.sleep(_RETRY_S)
    raise HostLost(
        f"host 0 was not met at {config.coordinator} within parallel.connect_timeout_s="
        f"{config.connect_timeout_s:g}: {reason}"
    )


def _await_answer(link: Link, deadline_s: float) -> dict[str, Any]:
    """Host 0's answer, which beats while it waits for the hosts that are not there yet."""
    while time.monotonic() < deadline_s:
        kind, payload = link.receive(_HELLO_S, MAX_HELLO_BYTES)
        if kind is Kind.ANSWER:
            return json.loads(payload)
    raise LinkClosed("it still waits for other hosts")


def _dial(config: ParallelConfig, deadline_s: float) -> socket.socket:
    left_s = max(0.1, deadline_s - time.monotonic())
    return socket.create_connection(split_address(config), timeout=min(_HELLO_S, left_s))


def _dial_service(config: ParallelConfig) -> socket.socket:
    """A connection that host 0 relays to JAX's coordination service."""
    link = Link(_dial(config, time.monotonic() + _HELLO_S))
    link.send(Kind.HELLO, json.dumps({"service": True}).encode())
    return link.detach()


def _hello(config: ParallelConfig, agreed: Agreed) -> bytes:
    hello = {"host": config.host, "hosts": config.hosts, "agreed": dict(agreed)}
    return json.dumps(hello).encode()


class _Gate:
    """Host 0's listening socket: lets the others in, and relays to JAX's service.

    Attributes:
        service: address of JAX's service, of this machine only.
    """

    def __init__(self, config: ParallelConfig, agreed: Agreed) -> None:
        self._config = config
        self._agreed = agreed
        self._links: dict[int, Link] = {}
        self._complete = False
        self._changed = threading.Condition()
        self._listener = _listen(config)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.service = f"127.0.0.1:{free.getsockname()[1]}"
        threading.Thread(target=self._accept, name="jaxserve host gate", daemon=True).start()

    def wait(self, deadline_s: float) -> dict[int, Link]:
        """The links to all others, once they are there and have been welcomed.

        Raises:
            HostLost: the time is over.
        """
        with self._changed:
            while len(self._links) < self._config.hosts - 1:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    missing = sorted(set(range(1, self._config.hosts)) - self._links.keys())
                    raise HostLost(
                        f"host {', host '.join(map(str, missing))} did not come within "
                        f"parallel.connect_timeout_s={self._config.connect_timeout_s:g}"
                    )
            self._complete = True
            self._changed.notify_all()
            for host, link in self._links.items():
                try:
                    link.send(Kind.ANSWER, b'{"welcome": true}')
                except LinkClosed as error:
                    raise HostLost(f"host {host} was lost: {error}") from error
            return dict(self._links)

    def close(self) -> None:
        """Gives up: whoever waits is told by the end of the connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        with self._changed:
            for link in self._links.values():
                link.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed
                self._listener.close()
                return
            arguments = connection, address[0]
            threading.Thread(
                target=self._meet, args=arguments, name="jaxserve host gate", daemon=True
            ).start()

    def _meet(self, connection: socket.socket, address: str) -> None:
        link = Link(connection)
        try:
            hello = link.receive_json(Kind.HELLO, _HELLO_S, MAX_HELLO_BYTES)
            if hello.get("service"):
                host, _, port = self.service.rpartition(":")
                relay(link.detach(), socket.create_connection((host, int(port)), timeout=_HELLO_S))
                return
            refusal = self._judge(hello)
            if refusal is None:
                self._admit(int(hello["host"]), link)
                return
            logger.warning("refused a host at %s: %s", address, refusal["refused"])
            link.send(Kind.ANSWER, json.dumps(refusal).encode())
        except (LinkClosed, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("a connection from %s came to nothing: %s", address, error)
        link.close()

    def _judge(self, hello: dict[str, Any]) -> dict[str, Any] | None:
        """Why a host may not come in; None if it may."""
        config, host, hosts = self._config, int(hello["host"]), int(hello["hosts"])
        if hosts != config.hosts:
            return {"refused": f"its parallel.hosts is {hosts}, here it is {config.hosts}"}
        if not 1 <= host < config.hosts:
            return {"refused": f"its parallel.host is {host}, of {config.hosts} hosts"}
        theirs = dict(hello["agreed"])
        differing = [
            f"{key} is {theirs.get(key)!r} there and {value!r} here"
            for key, value in self._agreed.items()
            if theirs.get(key) != value
        ]
        if differing:
            more = len(differing) - _NAMED
            told = "; ".join(differing[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
            return {"refused": f"it is configured differently: {told}"}
        with self._changed:
            if self._complete or host in self._links:
                return {"refused": f"a host {host} is there already", "later": True}
        return None

    def _admit(self, host: int, link: Link) -> None:
        """Keeps a host until all are there, or it goes."""
        with self._changed:
            if self._complete or host in self._links:
                raise LinkClosed(f"another host {host} was faster")
            self._links[host] = link
            self._changed.notify_all()
        while True:
            quiet = link.is_quiet(self._config.lost_after_s / 5)
            with self._changed:
                if self._complete:
                    return  # the link is `Hosts`'s now
                try:
                    if not quiet:
                        raise LinkClosed("it left while others were waited for")
                    link.beat()
                except LinkClosed:
                    del self._links[host]
                    raise


def _listen(config: ParallelConfig) -> socket.socket:
    """Listens on the coordinator's address; on all of ours where that is another's name for us.

    Raises:
        ConfigError: the port is in use.
    """
    host, port = split_address(config)
    fault: OSError | None = None
    dual = socket.has_dualstack_ipv6()
    for name in (host, ""):
        six = ":" in name or (not name and dual)
        try:
            return socket.create_server(
                (name, port),
                family=socket.AF_INET6 if six else socket.AF_INET,
                dualstack_ipv6=not name and dual,
            )
        except OSError as error:
            fault = fault or error
    assert fault is not None
    raise ConfigError(f"cannot listen on parallel.coordinator={config.coordinator}: {fault}")
