"""How hosts meet, agree and notice a loss: in threads of one process, without JAX's own service."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxserve.config import ParallelConfig
from jaxserve.device import hosts as hosts_module
from jaxserve.device import meeting as module
from jaxserve.device.hosts import Hosts
from jaxserve.device.link import Kind, Link, LinkClosed
from jaxserve.device.meeting import connect
from jaxserve.device.relay import listen_locally
from jaxserve.errors import ConfigError, HostLost

TIMEOUT_S = 30
AGREED = {"cache.page_size": 16, "weights.dtype": "float32"}


@dataclass
class Meeting:
    """Hosts that meet in threads of this process; what each was told of a loss."""

    num_hosts: int = 2
    lost_after_s: float = 5.0
    connect_timeout_s: float = TIMEOUT_S
    sentences: dict[int, queue.SimpleQueue[str]] = field(default_factory=dict)
    found: list[Hosts] = field(default_factory=list)

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._pool = ThreadPoolExecutor(8)

    def config(self, host: int, **values: Any) -> ParallelConfig:
        """The section of one host."""
        known = {
            "hosts": self.num_hosts,
            "host": host,
            "coordinator": f"127.0.0.1:{self.port}",
            "lost_after_s": self.lost_after_s,
            "connect_timeout_s": self.connect_timeout_s,
        }
        return ParallelConfig(**known | values)

    def come(self, host: int, agreed: dict[str, Any] | None = None, **values: Any) -> Future[Hosts]:
        """A host that connects."""
        told = self.sentences.setdefault(host, queue.SimpleQueue())

        def meet() -> Hosts:
            hosts = connect(self.config(host, **values), agreed or AGREED, told.put)
            assert hosts is not None
            self.found.append(hosts)
            return hosts

        return self._pool.submit(meet)

    def all(self) -> list[Hosts]:
        """All hosts, met."""
        coming = [self.come(host) for host in range(self.num_hosts)]
        return [host.result(TIMEOUT_S) for host in coming]

    def sentence(self, host: int) -> str:
        """What a host says of the loss it notices."""
        return self.sentences[host].get(timeout=TIMEOUT_S)

    def stranger(self) -> Link:
        """A connection to host 0, once it listens."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return Link(socket.create_connection(("127.0.0.1", self.port)))
            except ConnectionRefusedError:
                assert time.monotonic() < deadline_s

    def close(self) -> None:
        """Ends every host."""
        for hosts in self.found:
            hosts.close("the test is over")
        self._pool.shutdown()


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Meeting]]:
    """Makes meetings, and ends them."""
    monkeypatch.setattr(module, "_start_jax", lambda config, service: None)
    made: list[Meeting] = []

    def make(**values: Any) -> Meeting:
        made.append(Meeting(**values))
        return made[-1]

    yield make
    for meeting in made:
        meeting.close()


def hello(host: int = 1, num_hosts: int = 2, agreed: dict[str, Any] | None = None) -> bytes:
    """The first message of a host."""
    document = {"host": host, "hosts": num_hosts, "agreed": agreed or AGREED}
    return json.dumps(document).encode()


def test_one_host_needs_nobody():
    assert connect(ParallelConfig(), AGREED) is None


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_values_and_plans_reach_all(meet, num_hosts):
    hosts = meet(num_hosts=num_hosts).all()
    assert [each.host for each in hosts] == list(range(num_hosts))
    with ThreadPoolExecutor(num_hosts) as pool:
        for name in ("pages", "compiled"):
            asked = [pool.submit(each.gather, name, [name, each.host]) for each in hosts]
            gathered = [values.result(TIMEOUT_S) for values in asked]
            assert gathered == [[[name, host] for host in range(num_hosts)]] * num_hosts
    sent = [bytes([number]) * size for number, size in enumerate((1, 5000, 0, 3_000_000))]
    for plan in sent:
        hosts[0].broadcast(memoryview(plan))
    for follower in hosts[1:]:
        plans = follower.plans()
        assert [next(plans) for _ in sent] == sent


def test_a_plan_larger_than_a_message_goes_in_pieces(meet, monkeypatch):
    """An adapter may be larger than any message."""
    monkeypatch.setattr(hosts_module, "PIECE_BYTES", 7)
    hosts = meet().all()
    sent = [bytes(range(size)) for size in (7, 8, 100, 3, 0, 14)]
    for plan in sent:
        hosts[0].broadcast(memoryview(plan))
    plans = hosts[1].plans()
    assert [next(plans) for _ in sent] == sent


def test_a_host_is_behind_from_a_plan_s_arrival_until_the_next_is_asked_for(meet):
    hosts = meet().all()
    assert hosts[1].behind_s == 0.0
    plans, started_s = hosts[1].plans(), time.monotonic()
    hosts[0].broadcast(memoryview(b"first"))
    next(plans)
    first_s = hosts[1].behind_s
    assert 0 < first_s <= time.monotonic() - started_s
    assert hosts[1].behind_s > first_s
    started_s = time.monotonic()
    hosts[0].broadcast(memoryview(b"second"))
    next(plans)
    assert 0 < hosts[1].behind_s <= time.monotonic() - started_s


def test_beats_keep_an_idle_meeting_together(meet):
    meeting = meet(lost_after_s=0.5)
    hosts = meeting.all()
    with pytest.raises(queue.Empty):
        meeting.sentences[0].get(timeout=2.0)
    assert meeting.sentences[1].empty()
    hosts[0].broadcast(memoryview(b"still"))
    assert next(hosts[1].plans()) == b"still"


def test_who_ends_says_why(meet):
    meeting = meet()
    hosts = meeting.all()
    hosts[1].close("the model does not fit")
    assert meeting.sentence(0) == "host 1 was lost: the model does not fit"


def test_a_loss_is_passed_on(meet):
    meeting = meet(num_hosts=3)
    hosts = meeting.all()
    hosts[2]._links[0].close()
    assert meeting.sentence(0).startswith("host 2 was lost: its connection ")
    assert meeting.sentence(1).startswith("host 2 was lost: its connection ")


def test_a_silent_host_is_lost(meet):
    meeting = meet(lost_after_s=0.5)
    coming = meeting.come(0)
    silent = meeting.stranger()
    silent.send(Kind.HELLO, hello())
    while (kind := silent.receive(TIMEOUT_S)[0]) is Kind.BEAT:
        pass
    assert kind is Kind.ANSWER
    silent.send(Kind.VALUE, b'["met", null]')
    coming.result(TIMEOUT_S)
    began_s = time.monotonic()
    assert meeting.sentence(0) == "host 1 was lost: nothing was heard of it for 0.5 s"
    assert time.monotonic() - began_s < 5
    silent.close()


def test_a_host_that_sends_nonsense_is_lost(meet):
    meeting = meet()
    hosts = meeting.all()
    hosts[1]._links[0]._connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert meeting.sentence(0) == "host 1 was lost: it sent what is no message of ours"


def test_hosts_that_are_not_at_the_same_place_do_not_go_on(meet):
    meeting = meet()
    hosts = meeting.all()
    hosts[1]._send(0, Kind.VALUE, b'["pages", [1]]')
    threading.Thread(target=hosts[0].gather, args=("programs", 1), daemon=True).start()
    assert meeting.sentence(0) == (
        "host 1 was lost: it is at 'pages' where this host is at 'programs'"
    )


@pytest.mark.parametrize(
    ("host", "agreed", "values", "reason"),
    [
        (
            1,
            AGREED | {"cache.page_size": 8},
            {},
            "it is configured differently: cache.page_size is 8 there and 16 here",
        ),
        (1, None, {"hosts": 3}, "its parallel.hosts is 3, here it is 2"),
        (2, None, {}, "its parallel.host is 2, of 2 hosts"),
    ],
)
def test_who_does_not_fit_is_refused_and_others_are_waited_for(meet, host, agreed, values, reason):
    meeting = meet()
    first = meeting.come(0)
    with pytest.raises(ConfigError) as caught:
        meeting.come(host, agreed, **values).result(TIMEOUT_S)
    assert caught.value.message.endswith(f": {reason}")
    meeting.come(1).result(TIMEOUT_S)
    first.result(TIMEOUT_S)


def test_strangers_harm_nobody(meet):
    meeting = meet()
    first = meeting.come(0)
    for words in (b"", b"hello", b"[]", hello(host="x"), b'{"host": 1}'):
        stranger = meeting.stranger()
        stranger.send(Kind.HELLO, words)
        with pytest.raises(LinkClosed):
            stranger.receive(TIMEOUT_S)
        stranger.close()
    meeting.come(1).result(TIMEOUT_S)
    first.result(TIMEOUT_S)


def test_who_leaves_before_all_are_there_may_come_again(meet):
    meeting = meet(num_hosts=3, lost_after_s=0.5)
    first = meeting.come(0)
    early = meeting.stranger()
    early.send(Kind.HELLO, hello(1, 3))
    assert early.receive(TIMEOUT_S)[0] is Kind.BEAT  # it has been let in
    early.close()
    others = [meeting.come(1), meeting.come(2)]
    assert [host.result(TIMEOUT_S).host for host in (first, *others)] == [0, 1, 2]


def test_a_second_host_of_one_number_waits_in_vain(meet):
    meeting = meet()
    meeting.all()
    with pytest.raises(HostLost) as caught:
        meeting.come(1, connect_timeout_s=1.0).result(TIMEOUT_S)
    assert "within parallel.connect_timeout_s=1: a host 1 is there already" in caught.value.message


def test_a_coordinator_that_is_not_there(meet):
    meeting = meet(connect_timeout_s=1.0)
    began_s = time.monotonic()
    with pytest.raises(HostLost) as caught:
        meeting.come(1).result(TIMEOUT_S)
    assert time.monotonic() - began_s < 5
    assert caught.value.message == (
        f"host 0 was not met at 127.0.0.1:{meeting.port} within parallel.connect_timeout_s=1: "
        "Connection refused"
    )


def test_a_host_that_does_not_come_is_named(meet):
    meeting = meet(num_hosts=3, connect_timeout_s=2.0)
    coming = [meeting.come(0), meeting.come(2)]
    with pytest.raises(HostLost) as caught:
        coming[0].result(TIMEOUT_S)
    assert caught.value.message == "host 1 did not come within parallel.connect_timeout_s=2"
    with pytest.raises(HostLost):
        coming[1].result(TIMEOUT_S)


def test_a_port_in_use_is_one_sentence(meet):
    meeting = meet()
    with socket.create_server(("127.0.0.1", meeting.port)), pytest.raises(ConfigError) as caught:
        meeting.come(0).result(TIMEOUT_S)
    assert f"cannot listen on parallel.coordinator=127.0.0.1:{meeting.port}" in caught.value.message


def test_a_relay_carries_both_ways_and_is_silent_when_the_far_side_breaks():
    far_side = socket.create_server(("127.0.0.1", 0))
    host, _, port = listen_locally(
        lambda: socket.create_connection(far_side.getsockname(), TIMEOUT_S)
    ).rpartition(":")
    with contextlib.ExitStack() as stack:
        stack.enter_context(far_side)
        near = stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT_S))
        far, _ = far_side.accept()
        near.sendall(b"there")
        assert far.recv(100) == b"there"
        far.sendall(b"back")
        assert near.recv(100) == b"back"
        far.close()
        near.settimeout(1.0)
        with pytest.raises(TimeoutError):
            near.recv(100)
        for _ in range(20):
            near.sendall(b"into the void")
        with pytest.raises(TimeoutError):
            near.recv(100)
