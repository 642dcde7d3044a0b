"""The rooms before the scheduler: who goes through which, and that nobody leaves a claim behind."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.config import StructuredConfig
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.grammars import Grammars
from jaxserve.engine.lobby import Lobby, Released
from jaxserve.engine.probation import ARRIVAL_S, Probation
from jaxserve.engine.recorder import NoRecorder
from jaxserve.errors import (
    GrammarError,
    InvalidAdapter,
    InvalidRequest,
    JaxserveError,
    RequestQuarantined,
)
from jaxserve.lora.host import HostAdapters, Ready
from jaxserve.protocol.messages import AdapterRef, Embed, Submit
from jaxserve.scheduler.sequence import Sequence
from jaxserve.structured import grammars
from jaxserve.types import EmbeddingParams, FinishReason, Grammar, ModelInfo
from tests.engine.test_loop import submit
from tests.fakes.engine import EOS, GROUPS, VOCAB_SIZE
from tests.fakes.grammar import vocabulary

MODEL = ModelInfo(
    name="fake", max_context=100, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), cache_groups=GROUPS
)
MEAN = EmbeddingParams(pooling="mean", normalize=True)
DIGITS = grammars.regex("[0-9]{3,6}")
WRONG = grammars.regex("[")
ADAPTER, BROKEN = "a" * 32, "b" * 32
SUSPECT, QUARANTINED, OTHER = (f"{number:016x}" for number in (10, 11, 12))


class Arrivals(NoRecorder):
    """Notes which requests are being taken in."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def arriving(self, request: int) -> None:
        self.told.append(request)


class Claims(HostAdapters):
    """Notes who uses which adapter. Loads nothing before it `may_load`."""

    def __init__(self) -> None:
        self.may_load = threading.Event()
        self.users: Counter[str] = Counter()
        super().__init__(self._read, lambda path: 1, largest_bytes=1, max_bytes=10)

    def _read(self, key: str, path: Path) -> Ready:
        assert self.may_load.wait(60)
        if key == BROKEN:
            raise InvalidAdapter("it is broken")
        return Ready(rank_class=0, arrays=key, num_bytes=1)

    def use(self, key: str, path: Path, count: int) -> Ready | None:
        self.users[key] += count
        return super().use(key, path, count)

    def leave(self, key: str, count: int = 1) -> None:
        self.users[key] -= count
        super().leave(key, count)


class Rooms:
    """A lobby over real rooms, and what stands behind them."""

    def __init__(self, *trials: tuple[str, ...]) -> None:
        self.now_s = 0.0
        self.host = Claims()
        self.recorder = Arrivals()
        self.probation = Probation(
            trials, (QUARANTINED,), 4, self.recorder, clock_s=lambda: self.now_s
        )
        self.grammars = Grammars(StructuredConfig(), MODEL)
        self.lobby = Lobby(
            MODEL, self.probation, RequestAdapters(self.host), self.grammars, self.recorder
        )

    def released(self, count: int = 1) -> list[Released]:
        """So many requests that wait no more, once they do."""
        released: list[Released] = []
        deadline_s = time.monotonic() + 60
        while len(released) < count:
            assert time.monotonic() < deadline_s
            released += self.lobby.release()
        return released

    def until(self, condition: Callable[[], bool]) -> None:
        """Turns until then; nobody is released meanwhile."""
        deadline_s = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline_s
            assert self.lobby.release() == []

    @property
    def claims(self) -> int:
        """Sequences that use an adapter."""
        return self.host.users.total()


@pytest.fixture
def rooms() -> Rooms:
    """Nobody is suspected; the vocabulary is here."""
    made = Rooms()
    made.grammars.use(vocabulary())
    return made


def request(
    *numbers: int,
    adapter: str | None = None,
    grammar: Grammar | None = None,
    key: str = OTHER,
    **sampling: object,
) -> Submit:
    message = submit(list(numbers), [5, 6], grammar=grammar, ignore_eos=False, **sampling)
    ref = None if adapter is None else AdapterRef(key=adapter, path="/nowhere")
    return dataclasses.replace(message, adapter=ref, request_key=key)


def waited(message: Submit | Embed) -> list[str]:
    return [interval.kind for interval in message.waited]


def test_what_needs_nothing_passes_through_at_once(rooms):
    embed = Embed(sequence_ids=[1], texts=[[5]], params=MEAN, arrived_ns=1)
    assert not rooms.lobby.holds("a", request(1)) and not rooms.lobby.holds("a", embed)
    assert rooms.lobby.release() == []
    assert rooms.lobby.num_held == 0 and not rooms.lobby.is_loading
    assert rooms.recorder.told == []


def test_the_rooms_stand_one_behind_the_other():
    """On trial, then for its adapter, then for its grammar."""
    rooms = Rooms((SUSPECT,))
    rooms.grammars.use(vocabulary())
    message = request(1, 2, adapter=ADAPTER, grammar=DIGITS, key=SUSPECT)
    other = request(3, key=OTHER)
    assert rooms.lobby.holds("b", other) and rooms.lobby.holds("a", message)
    assert (rooms.lobby.num_held, rooms.claims) == (3, 0)
    rooms.until(lambda: rooms.claims == 2)
    assert (rooms.lobby.num_held, rooms.lobby.is_loading) == (3, True)
    assert waited(message) == ["held"] and rooms.recorder.told == []
    rooms.host.may_load.set()
    released = rooms.released(2)
    assert {(client, *message.sequence_ids) for client, message, _ in released} == {
        ("a", 1, 2),
        ("b", 3),
    }
    assert all(error is None for _, _, error in released)
    assert waited(message) == ["held", "adapter", "grammar"] and waited(other) == ["held"]
    assert (rooms.lobby.num_held, rooms.claims, rooms.lobby.is_loading) == (0, 2, False)
    assert set(rooms.recorder.told) == {int(SUSPECT, 16), 0} and rooms.recorder.told[-1] == 0
    rooms.lobby.refused(message)  # by the scheduler
    assert rooms.claims == 0


def test_what_is_here_is_not_waited_for_again(rooms):
    rooms.host.may_load.set()
    assert rooms.lobby.holds("a", request(1, adapter=ADAPTER, grammar=DIGITS))
    rooms.released()
    assert not rooms.lobby.holds("a", request(2, 3, adapter=ADAPTER, grammar=DIGITS))
    assert rooms.claims == 3


def test_an_adapter_that_does_not_come_is_its_request_s_end(rooms):
    rooms.host.may_load.set()
    assert rooms.lobby.holds("a", request(1, adapter=BROKEN, grammar=DIGITS))
    ((client, message, error),) = rooms.released()
    assert (client, message.sequence_ids, rooms.claims) == ("a", [1], 0)
    assert isinstance(error, InvalidAdapter)


def test_a_wrong_grammar_is_its_request_s_end(rooms):
    """Found after the adapter has come: what was claimed is given back; and known from then on."""
    rooms.host.may_load.set()
    assert rooms.lobby.holds("a", request(1, adapter=ADAPTER, grammar=WRONG))
    ((_, message, error),) = rooms.released()
    assert isinstance(error, GrammarError) and waited(message) == ["adapter", "grammar"]
    assert rooms.claims == 0 and rooms.recorder.told[-1] == 0
    with pytest.raises(GrammarError, match="regex"):
        rooms.lobby.holds("a", request(2, adapter=ADAPTER, grammar=WRONG))
    assert rooms.claims == 0


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (request(1, key=QUARANTINED), RequestQuarantined),
        (request(1, adapter="../a"), InvalidRequest),
        (request(1, grammar=DIGITS, temperature=-1.0), InvalidRequest),
        (request(1, grammar=DIGITS, key="no key"), InvalidRequest),
    ],
)
def test_what_is_refused_at_the_door(rooms, message: Submit, expected: type[JaxserveError]):
    with pytest.raises(expected):
        rooms.lobby.holds("a", message)
    assert (rooms.lobby.num_held, rooms.claims) == (0, 0)
    assert rooms.recorder.told in ([], [0], [int(OTHER, 16), 0])


def test_nothing_is_compiled_for_a_request_that_is_wrong():
    """It is told what is wrong with it, not that there is no vocabulary."""
    with pytest.raises(InvalidRequest, match="temperature"):
        Rooms().lobby.holds("a", request(1, grammar=DIGITS, temperature=-1.0))


def in_probation() -> Rooms:
    rooms = Rooms((SUSPECT,))
    assert rooms.lobby.holds("a", request(1, 2, adapter=ADAPTER))
    return rooms


def before_its_adapter() -> Rooms:
    rooms = Rooms()
    assert rooms.lobby.holds("a", request(1, 2, adapter=ADAPTER))
    return rooms


def before_its_grammar() -> Rooms:
    """Compiled or not: nobody has asked yet who may go."""
    rooms = Rooms()
    rooms.grammars.use(vocabulary())
    rooms.host.may_load.set()
    assert rooms.lobby.holds("b", request(1, adapter=ADAPTER))
    rooms.released()
    rooms.lobby.refused(request(1, adapter=ADAPTER))
    assert rooms.lobby.holds("a", request(1, 2, adapter=ADAPTER, grammar=DIGITS))
    return rooms


@pytest.mark.parametrize("make", [in_probation, before_its_adapter, before_its_grammar])
def test_a_client_may_withdraw_and_leave_in_every_room(make: Callable[[], Rooms]):
    rooms = make()
    claims = rooms.claims
    assert rooms.lobby.num_held == 2 and claims in (0, 2)
    assert rooms.lobby.withdraw("b", [1, 2], FinishReason.STOP) == []  # not its own
    (end,) = rooms.lobby.withdraw("a", [2, 7], FinishReason.STOP)
    assert (end.sequence_id, end.reason) == (2, FinishReason.STOP)
    assert (rooms.lobby.num_held, rooms.claims) == (1, claims // 2)
    rooms.lobby.forget("b")
    assert rooms.lobby.num_held == 1
    rooms.lobby.forget("a")
    assert (rooms.lobby.num_held, rooms.claims) == (0, 0)
    rooms.host.may_load.set()
    rooms.now_s = 2 * ARRIVAL_S
    rooms.until(lambda: not rooms.lobby.is_loading)


@pytest.mark.parametrize("wants", [{"adapter": ADAPTER}, {"grammar": DIGITS}])
def test_a_trial_is_not_over_before_its_request_runs(wants: dict[str, object]):
    """Else who kills the engine would have stood its trial while it waited, and be let off."""
    rooms = Rooms((SUSPECT,))
    rooms.grammars.use(vocabulary())
    suspect, other = request(1, key=SUSPECT, **wants), request(2)
    assert rooms.lobby.holds("a", suspect) and rooms.lobby.holds("b", other)
    rooms.host.may_load.set()
    assert rooms.released() == [("a", suspect, None)]
    runs = Sequence.__new__(Sequence)
    runs.reason, runs.token_ids = None, [5, 6]
    rooms.lobby.let_in(suspect, [runs])
    assert rooms.lobby.release() == [] and rooms.lobby.num_held == 1
    runs.reason = FinishReason.LENGTH
    assert rooms.lobby.release() == [("b", other, None)]
