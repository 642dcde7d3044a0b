"""Bytes on the wire: every message survives, hostile frames stop nobody, slow clients neither."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import types
import typing

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.protocol import zmq as zmq_module
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    EngineMessage,
    GetStatus,
    Goodbye,
    TokenEvents,
)
from jaxserve.protocol.status import EngineStatus, StepStats
from jaxserve.protocol.zmq import TO_CLIENT, TO_ENGINE, ZmqClient, ZmqServer
from jaxserve.types import DeviceInfo, FinishReason


def values(annotation) -> st.SearchStrategy:
    """Any value of a type that messages use."""
    if dataclasses.is_dataclass(annotation):
        return instances(typing.cast(type, annotation))
    if annotation is int:
        return st.integers(-(2**63), 2**64 - 1)
    if annotation is float:
        return st.floats(allow_nan=False)
    if annotation is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    if annotation is bytes:
        return st.binary(max_size=9)
    if annotation is bool:
        return st.booleans()
    if annotation is FinishReason:
        return st.sampled_from(FinishReason)
    if annotation is type(None):
        return st.none()
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    assert origin is tuple, annotation
    if arguments[1:] == (Ellipsis,):
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    return st.tuples(*map(values, arguments))


def instances(kind: type) -> st.SearchStrategy:
    """Any instance of a message dataclass."""
    hints = typing.get_type_hints(kind)
    return st.fixed_dictionaries({n: values(t) for n, t in hints.items()}).map(lambda v: kind(**v))


@settings(max_examples=300, deadline=None)
@given(st.one_of(*map(instances, typing.get_args(ClientMessage))))
def test_client_messages_survive(message):
    assert TO_ENGINE.decode(TO_ENGINE.encode(message)) == message


@settings(max_examples=300, deadline=None)
@given(st.one_of(*map(instances, typing.get_args(EngineMessage))))
def test_engine_messages_survive(message):
    assert TO_CLIENT.decode(TO_CLIENT.encode(message)) == message


HOSTILE = [
    b"",
    b"\xc1",
    b"\x00",
    b"\xff" * 100,
    b"\x91" * 100_000,
    TO_CLIENT.encode(TokenEvents(step_id=0, at_ns=0)),
    TO_ENGINE.encode(GetStatus())[:-1],
    TO_ENGINE.encode(GetStatus()) + b"\x00",
    msgspec.msgpack.encode([1, "not a list", "stop"]),
    msgspec.msgpack.encode([1, [1], "no such reason"]),
    msgspec.msgpack.encode([99]),
    msgspec.msgpack.encode({"sequence_ids": [1]}),
    msgspec.msgpack.encode([0, [1], [[[1.5]]], {}, 0, 0, ""]),
]


@pytest.mark.parametrize("frame", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_not_a_message_is_a_value_error(frame):
    with pytest.raises(ValueError, match="not a message"):
        TO_ENGINE.decode(frame)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_decode_or_raise_a_value_error(frame):
    with contextlib.suppress(ValueError):
        TO_ENGINE.decode(frame)


@pytest.fixture
def address(tmp_path):
    """A private ipc address."""
    return f"ipc://{tmp_path}/engine"


@pytest.fixture
def server(address):
    """A bound engine's end."""
    server = ZmqServer(address)
    yield server
    server.close()


def receive(server: ZmqServer) -> list:
    """What comes next; fails after a while without anything."""
    for _ in range(100):
        arrivals = server.receive(0.1)
        if arrivals:
            return arrivals
    raise AssertionError("nothing came")


def raw_client(address: str) -> tuple[zmq.Context, zmq.Socket]:
    """A DEALER without manners."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.connect(address)
    return context, socket


def test_hostile_frames_are_counted_and_the_next_message_arrives(server, address):
    context, socket = raw_client(address)
    for frame in HOSTILE:
        socket.send(frame)
    socket.send_multipart([b"two", b"frames"])
    socket.send(TO_ENGINE.encode(GetStatus()))
    assert [message for _, message in receive(server)] == [GetStatus()]
    assert server.num_malformed == len(HOSTILE) + 1
    socket.close()
    context.term()


def test_a_client_that_never_reads_blocks_nobody_and_loses_nothing(server, address):
    context, socket = raw_client(address)
    socket.send(TO_ENGINE.encode(GetStatus()))
    ((client, _),) = receive(server)
    # Large events fill the socket's buffers soon; what follows is merged into few messages.
    num_events, padding = 3000, list(range(1000, 1300))
    for step in range(num_events):
        events = TokenEvents(
            step_id=step, at_ns=step, sequence_ids=[7], token_ids=[[step, *padding]]
        )
        server.send(client, events)
    assert client in server._backlogs
    received: list[TokenEvents] = []
    tokens: list[int] = []
    while len(tokens) < num_events * 301:
        server.receive(0.0)  # gives the backlog its chance
        if socket.poll(10):
            received.append(TO_CLIENT.decode(socket.recv()))
            tokens += received[-1].token_ids[0]
    assert tokens[::301] == list(range(num_events))
    assert len(received) < num_events / 2
    assert received[-1].step_id == num_events - 1
    socket.close()
    context.term()


def test_a_client_that_is_gone_is_reported_at_the_next_send(server, address):
    context, socket = raw_client(address)
    socket.send(TO_ENGINE.encode(GetStatus()))
    ((client, _),) = receive(server)
    socket.close()
    context.term()
    arrivals: list = []
    for step in range(200):
        server.send(client, TokenEvents(step_id=step, at_ns=0))
        if arrivals := server.receive(0.01):
            break
    assert arrivals == [(client, Goodbye())]
    server.send(client, TokenEvents(step_id=0, at_ns=0))  # no more trouble


def test_a_silent_client_is_reported(address):
    server = ZmqServer(address, silence_s=0.0)
    context, socket = raw_client(address)
    socket.send(TO_ENGINE.encode(GetStatus()))
    ((client, _),) = receive(server)
    assert receive(server) == [(client, Goodbye())]
    socket.close()
    context.term()
    server.close()


def test_what_waited_while_a_step_ran_is_no_silence(address, monkeypatch):
    """The engine stood still for longer than clients may be silent; one of them sent heartbeats."""
    server = ZmqServer(address, silence_s=60.0)
    context, socket = raw_client(address)
    socket.send(TO_ENGINE.encode(GetStatus()))
    ((client, _),) = receive(server)
    socket.send(TO_ENGINE.encode(GetStatus(stats=True)))
    server._socket.poll(10_000)  # it is there
    start = time.monotonic()
    monkeypatch.setattr(zmq_module.time, "monotonic", lambda: start + 100.0)
    assert server.receive(0) == [(client, GetStatus(stats=True))]
    monkeypatch.setattr(zmq_module.time, "monotonic", lambda: start + 200.0)
    assert server.receive(0) == [(client, Goodbye())]
    socket.close()
    context.term()
    server.close()


def test_client_and_server_talk_both_ways(server, address):
    client = ZmqClient(address)
    got: list[EngineMessage] = []
    came = threading.Event()

    def deliver(message: EngineMessage) -> None:
        got.append(message)
        came.set()

    client.open(deliver)
    client.send(Cancel(sequence_ids=[1, 2], reason=FinishReason.STOP))
    ((name, message),) = receive(server)
    assert message == Cancel(sequence_ids=[1, 2], reason=FinishReason.STOP)
    device = DeviceInfo(kind="x", count=4, flops_per_s=1e12)
    status = EngineStatus(state="ready", pid=1, step_age_s=0.5, device=device)
    server.send(name, status)
    assert came.wait(10)
    assert got == [status]
    client.send(Goodbye())
    client.close()
    assert receive(server) == [(name, Goodbye())]


def test_statistics_for_a_slow_client_keep_their_order():
    from jaxserve.protocol.server import Backlog

    def stats(step: int) -> StepStats:
        hints = typing.get_type_hints(StepStats)
        fields = {name: "" if kind is str else 0 for name, kind in hints.items()}
        return StepStats(**fields | {"step_id": step})

    backlog = Backlog()
    for step in range(3):
        backlog.add(stats(step))
        backlog.add(TokenEvents(step_id=step, at_ns=0, sequence_ids=[1], token_ids=[[step]]))
        backlog.add(EngineStatus(state="ready", pid=step, step_age_s=0))
    tokens, status = backlog.pop(), backlog.pop()
    assert isinstance(tokens, TokenEvents) and tokens.token_ids == [[0, 1, 2]]
    assert isinstance(status, EngineStatus) and status.pid == 2
    first = backlog.pop()
    backlog.push_back(first)
    assert [backlog.pop() for _ in range(3)] == [stats(step) for step in range(3)]
    assert not backlog
