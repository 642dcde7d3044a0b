"""Texts that wait or run when the engine dies: asked for again, each answered once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxserve.config import EmbeddingsConfig
from jaxserve.errors import DeviceFailure
from jaxserve.protocol.client import Stream
from jaxserve.protocol.messages import Embed, Finished, SequenceRecord, TokenEvents
from jaxserve.protocol.streams import Dispatcher
from jaxserve.protocol.transport import embed_message
from jaxserve.protocol.zmq import TO_ENGINE
from jaxserve.types import EmbeddingParams, FinishReason
from tests.fakes.embedder import vector_of
from tests.protocol import test_replay
from tests.protocol.test_replay import Lives, with_lives

PARAMS = EmbeddingParams(pooling="mean", normalize=True)
EMBEDS = dataclasses.replace(
    test_replay.CONFIG, embeddings=EmbeddingsConfig(model="fake", embed_tokens=16)
)


@pytest.fixture(autouse=True)
def embeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of this file embed."""
    monkeypatch.setattr(test_replay, "CONFIG", EMBEDS)


async def read(stream: Stream) -> dict[int, np.ndarray]:
    found = {}
    async for event in stream:
        assert event.finished is not None and event.choice not in found
        found[event.choice] = np.frombuffer(event.finished.vector, np.float32)
    return found


def check(found: dict[int, np.ndarray], texts: list[list[int]]) -> None:
    assert sorted(found) == list(range(len(texts)))
    for place, vector in found.items():
        np.testing.assert_allclose(vector, vector_of(texts[place]), rtol=1e-6)


def test_texts_are_asked_for_again():
    texts = [[1 + n, *range(2, 12)] for n in range(15)]

    async def body(lives: Lives) -> None:
        stream = lives.client.embed(texts, PARAMS)
        lives.die()  # before this loop could take anything in
        lives.start()
        check(await read(stream), texts)
        assert lives.replays[-1] == (1, 0)

    with_lives(body)


def test_only_what_is_not_answered_is_asked_for_again():
    dispatcher = Dispatcher(journal=True)
    state = dispatcher.open(3)
    message = embed_message(state, [[1], [2, 2], [3]], PARAMS, second_starts=[1, 2, 3])
    dispatcher.begin(state, message)
    finished = Finished(
        sequence_id=1, reason=FinishReason.STOP, record=SequenceRecord(), vector=b"abcd"
    )
    dispatcher.dispatch(TokenEvents(step_id=0, at_ns=0, finished=[finished]))
    dispatcher.lose()
    (again,) = dispatcher.replay()
    assert isinstance(again, Embed)
    assert (again.texts, again.second_starts) == ([[1], [3]], [1, 3])
    assert again.sequence_ids == [3, 5] and again.attempt == 1
    event = state.take()
    assert event is not None and event.choice == 1 and event.finished is finished


def test_texts_that_come_between_two_lives():
    async def body(lives: Lives) -> None:
        lives.die()
        stream = lives.client.embed([[1, 2], [3]], PARAMS)
        cancelled = lives.client.embed([[4]], PARAMS)
        cancelled.cancel()
        event = await anext(cancelled)
        assert event.finished is not None
        assert event.finished.reason is FinishReason.CANCELLED
        assert event.finished.record.prompt_tokens == 1
        lives.start()
        check(await read(stream), [[1, 2], [3]])

    with_lives(body)


def test_the_last_death_is_an_error():
    async def body(lives: Lives) -> None:
        stream = lives.client.embed([[1]] * 10, PARAMS)
        lives.die()
        lives.client.fail(DeviceFailure("gone for good"))
        with pytest.raises(DeviceFailure, match="gone for good"):
            await read(stream)

    with_lives(body)


def test_messages_cross_a_process():
    message = Embed(
        sequence_ids=[3, 4],
        texts=[[1, 2], [5]],
        params=EmbeddingParams(pooling="cls", normalize=False, dimensions=7),
        arrived_ns=5,
        second_starts=[1, 0],
        tenant="a",
    )
    assert TO_ENGINE.decode(TO_ENGINE.encode(message)) == message
