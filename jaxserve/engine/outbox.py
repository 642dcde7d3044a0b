"""What a step brought, sorted by client: one `TokenEvents` each, sent at the end of the turn.

Also turns the device's log-probability arrays into `TokenLogprobs`, for those that asked.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from jaxserve.device.step import LogprobArrays, StepInputs, StepOutputs
from jaxserve.protocol.messages import TokenEvents
from jaxserve.protocol.server import ServerTransport
from jaxserve.protocol.status import StepStats
from jaxserve.scheduler.plan import Chunk
from jaxserve.scheduler.scheduler import Commit
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import TokenLogprobs


class Outbox:
    """Gathers events for clients until `send`.

    Args:
        server: sends them.
    """

    def __init__(self, server: ServerTransport) -> None:
        self._server = server
        self._events: dict[Hashable, TokenEvents] = {}
        self._subscribers: set[Hashable] = set()
        self._step_id = -1
        self._now_ns = 0

    @property
    def wants_stats(self) -> bool:
        """Whether any client asked for step statistics."""
        return bool(self._subscribers)

    def subscribe(self, client: Hashable, stats: bool) -> None:
        """Whether this client wants step statistics."""
        if stats:
            self._subscribers.add(client)
        else:
            self._subscribers.discard(client)

    def forget(self, client: Hashable) -> None:
        """Nothing more goes to this client."""
        self._subscribers.discard(client)
        self._events.pop(client, None)

    def events(self, client: Hashable) -> TokenEvents:
        """The message that this client will get at the end of the turn."""
        events = self._events.get(client)
        if events is None:
            now_ns = self._now_ns or time.monotonic_ns()
            events = TokenEvents(step_id=self._step_id, at_ns=now_ns)
            self._events[client] = events
        return events

    def add_step(
        self,
        step_id: int,
        now_ns: int,
        commit: Commit,
        inputs: StepInputs,
        outputs: StepOutputs,
    ) -> None:
        """Adds the tokens of one step."""
        self._step_id, self._now_ns = step_id, now_ns
        last_client: Hashable = None
        events = TokenEvents(step_id=step_id, at_ns=now_ns)
        # Each token passes here: keep it small.
        for sequence, token_ids in zip(commit.sequences, commit.token_ids, strict=True):
            client, sequence_id = sequence.key
            if client is not last_client:
                events = self.events(client)
                last_client = client
            events.sequence_ids.append(sequence_id)
            events.token_ids.append(token_ids)
        if outputs.logprobs is not None:
            self._add_logprobs(commit, outputs.logprobs)
        if outputs.prompt_logprobs is not None:
            for sequence, chunk, row in commit.chunks:
                first_token = int(inputs.query_starts[row])
                self._add_prompt_logprobs(sequence, chunk, first_token, outputs.prompt_logprobs)

    def send(self) -> None:
        """Sends what has gathered."""
        for client, events in self._events.items():
            self._server.send(client, events)
        self._events = {}
        self._now_ns = 0

    def send_stats(self, stats: StepStats) -> None:
        """Sends one step's statistics to those that asked."""
        for client in self._subscribers:
            self._server.send(client, stats)

    def _add_logprobs(self, commit: Commit, arrays: LogprobArrays) -> None:
        for sequence, token_ids, row in zip(
            commit.sequences, commit.token_ids, commit.rows, strict=True
        ):
            wanted = sequence.sampling.logprobs
            if wanted is not None:
                client, sequence_id = sequence.key
                self.events(client).logprobs[sequence_id] = [
                    _entry(arrays, (step, row), token_id, wanted)
                    for step, token_id in enumerate(token_ids)
                ]

    def _add_prompt_logprobs(
        self, sequence: Sequence, chunk: Chunk, first_token: int, arrays: LogprobArrays
    ) -> None:
        """Entries of the prompt tokens that follow the chunk's tokens and were not yet reported."""
        assert chunk.prompt_logprobs is not None
        end = chunk.start + len(chunk.token_ids)
        begin = max(chunk.start, sequence.num_prompt_logprobs)
        due = min(end, sequence.prompt_len - 1)
        client, sequence_id = sequence.key
        self.events(client).prompt_logprobs.setdefault(sequence_id, []).extend(
            _entry(
                arrays,
                (first_token + position - chunk.start,),
                sequence.token_ids[position + 1],
                chunk.prompt_logprobs,
            )
            for position in range(begin, due)
        )
        sequence.num_prompt_logprobs = due


def _entry(
    arrays: LogprobArrays, place: tuple[int, ...], token_id: int, num_top: int
) -> TokenLogprobs:
    ids = arrays.top_ids[place][:num_top].tolist()
    values = arrays.top_values[place][:num_top].tolist()
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(arrays.chosen[place]),
        rank=int(arrays.rank[place]),
        top=tuple(zip(ids, values, strict=True)),
    )
