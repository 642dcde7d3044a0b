"""Start-up over a real road: status and progress come while the model loads."""

from __future__ import annotations

import threading

import pytest

from jaxserve.engine.greeter import Greeter
from jaxserve.errors import DeviceFailure, Overloaded
from jaxserve.protocol.client import SyncClient
from jaxserve.protocol.status import Progress
from jaxserve.protocol.thread import ThreadRoad
from jaxserve.types import EmbeddingParams, SamplingParams


@pytest.fixture
def road():
    """A road, its greeter, a client and the progress it was told."""
    road = ThreadRoad()
    greeter = Greeter(road.server)
    greeter.start()
    progress: list[Progress] = []
    client = SyncClient(road.connect(), on_progress=progress.append)
    client.start()
    yield greeter, client, progress
    client.close()


def test_progress_and_refusals_before_the_engine_is_ready(road):
    greeter, client, progress = road
    assert client.get_status().state == "loading"
    assert progress[0] == Progress(phase="loading", done=0, total=0)
    greeter.progress("compiling", 3, 9)
    while len(progress) < 2:
        client.wait()
    assert progress[1] == Progress(phase="compiling", done=3, total=9)
    assert client.get_status().state == "compiling"
    with pytest.raises(Overloaded, match="compiling"):
        list(client.submit([1], SamplingParams(max_tokens=1, seed=0), n=2))
    with pytest.raises(Overloaded, match="compiling"):
        list(client.embed([[1]], EmbeddingParams(pooling="mean", normalize=True)))
    assert list(greeter.clients.values()) == [False]
    greeter.stop()
    assert "jaxserve greeter" not in {thread.name for thread in threading.enumerate()}


def test_a_failed_start_reaches_the_clients(road):
    greeter, client, _ = road
    assert client.get_status().state == "loading"
    greeter.fail("the file is truncated")
    with pytest.raises(DeviceFailure, match="the file is truncated"):
        client.ready()


def test_a_host_that_follows_says_how_far_behind_it_is(road):
    greeter, client, _ = road
    greeter.following(lambda: 2.5)
    greeter.progress("ready", 1, 1)
    status = client.ready()  # the first word may be of before
    assert (status.state, status.step_age_s) == ("ready", 2.5)
    with pytest.raises(Overloaded, match="this host follows host 0, which takes the requests"):
        list(client.submit([1], SamplingParams(max_tokens=1, seed=0)))
    greeter.stop()
