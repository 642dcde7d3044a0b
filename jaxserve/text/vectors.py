"""The vectors of an offline call's texts, from the engine's events."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from jaxserve.protocol.client import SyncClient, SyncStream
from jaxserve.text.embedding import Tokens, groups_of
from jaxserve.types import EmbeddingParams


def vectors_of(
    client: SyncClient, texts: Sequence[Tokens], params: EmbeddingParams, group: int
) -> Float32[np.ndarray, "R D"]:
    """A vector for each text, in their order.

    Args:
        texts: at least one.
        group: texts that go to the engine at a time; it has the next ones before it is done.

    Raises:
        EmbeddingNotFinite: the model gave no vector for a text.
        DeviceFailure: the engine failed.
    """
    found: list[bytes] = [b""] * len(texts)
    groups = groups_of(texts, group)
    running: deque[tuple[list[int], SyncStream]] = deque()
    while groups or running:
        if groups:
            places = groups.popleft()
            stream = client.embed([texts[place].ids for place in places], params)
            running.append((places, stream))
        if len(running) > 1 or not groups:
            places, stream = running.popleft()
            for event in stream:
                if event.finished is not None:
                    found[places[event.choice]] = event.finished.vector
    return np.frombuffer(b"".join(found), np.float32).reshape(len(found), -1)
