"""Whose work the device's time went into: each step's time is divided over its rows.

A row's share is in proportion to the work that it caused, as `WorkRates` counts it: linear in its
tokens, in the positions that they attend to, and in the keys and values that are read; what all
rows share, the weights, is split by tokens. The shares of a step add up to its time, to the
nanosecond, whatever copies of the model its rows ran on.

A share belongs to the row's sequence, as prefill, decode or waste: waste is what was computed
before, and tokens that were sampled for nothing (rejected drafts, decode steps behind a stop
token). A row whose sequence has ended meanwhile is nobody's, since that sequence's record has been
told; so is the time that pages took to the host and back. Nobody's time is `unowned_ns`:

    sum of the steps' device_ns = sum of all records' shares + unowned_ns (+ of those that run)

Every row of every step passes here, so rows are added up in arrays, by an account of each sequence
that holds a slot; only chunks, and rows that end, are visited. Where nobody asks what a request
cost (`telemetry.enabled=false`, offline use) there is `NoAttribution`: all shares are 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float64, Int

from jaxserve.device.step import StepInputs, StepOutputs
from jaxserve.engine.turn import InFlight
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.embedding import Text
from jaxserve.scheduler.plan import Chunk, Plan
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Owners

PREFILL, DECODE, WASTED = range(3)
#: Operations that a device does in the time in which it moves a byte, by JAX's platform: of an
#: H100 (989 TFLOP/s, 3.35 TB/s) and a TPU v5e (197, 0.8), and as measured on AVX2 cores.
FLOPS_PER_BYTE = {"gpu": 295.0, "tpu": 246.0, "cpu": 5.0}
_FIRST_ACCOUNTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkRates:
    """What rows cost beside each other, in bytes moved: operations count as the bytes that the
    device moves in the time that they take.

    Attributes:
        token: of each token: matrix products, its key and value written.
        sample: of each token after which one is sampled.
        attend: of each position that a token attends to; read: of each whose key and value is
            read, once a row and decode step.
        weights: of a step, whatever it holds: split by tokens.
        windows: (positions that are seen at most, share of the layers); None: all.
    """

    token: float = 1.0
    sample: float = 0.0
    attend: float = 0.0
    read: float = 0.0
    weights: float = 0.0
    windows: tuple[tuple[int | None, float], ...] = ((None, 1.0),)

    @classmethod
    def measured(
        cls,
        count_work: Callable[[int, int, int], tuple[int, int]],
        flops_per_byte: float,
        windows: Iterable[int | None],
    ) -> WorkRates:
        """Of a model, by what it counts for the smallest steps.

        Args:
            count_work: FLOPs and bytes of a step by tokens, rows sampled and context tokens.
            flops_per_byte: operations that the device does while it moves a byte.
            windows: of each layer.
        """
        base, token = count_work(1, 1, 0), count_work(2, 1, 0)
        sample, position = count_work(1, 2, 0), count_work(1, 1, 1)
        layers = list(windows)
        moved = max(token[1] - base[1], 0)
        return cls(
            token=(token[0] - base[0]) / flops_per_byte + moved,
            sample=(sample[0] - base[0]) / flops_per_byte,
            attend=(position[0] - base[0]) / flops_per_byte,
            read=position[1] - base[1],
            weights=max(base[1] - moved, 0),
            windows=tuple((w, layers.count(w) / len(layers)) for w in dict.fromkeys(layers)),
        )

    def seen(self, contexts: Float64[np.ndarray, "R"]) -> Float64[np.ndarray, "R"]:
        """Positions that a token at the end of so many sees, on average over the layers."""
        if self.windows == ((None, 1.0),):
            return contexts
        parts = (
            share * (contexts if window is None else np.minimum(contexts, window))
            for window, share in self.windows
        )
        return np.add.reduce(list(parts))


class Dividing(Protocol):
    """What the loop tells (`Attribution`, or `NoAttribution` where nobody asks)."""

    def launched(
        self,
        plans: Seq[Plan | None],
        inputs: Seq[StepInputs],
        owners: Callable[[int], Owners],
    ) -> list[Int[np.ndarray, "R"]]:
        """A step is launched; the account of each copy's live rows."""
        ...

    def divide(
        self, step: InFlight, outputs: Seq[StepOutputs], commits: Seq[Commit | None]
    ) -> None:
        """A step has been read."""
        ...

    def divide_texts(self, texts: Seq[Text], work: Seq[float], device_ns: int) -> None:
        """An embedding step has been read."""
        ...

    def take(self, sequence: Sequence) -> tuple[int, int, int]:
        """A sequence ends: its prefill, decode and waste, in ns."""
        ...


class NoAttribution:
    """Nobody asks: no step is divided."""

    def launched(
        self,
        plans: Seq[Plan | None],
        inputs: Seq[StepInputs],
        owners: Callable[[int], Owners],
    ) -> list[Int[np.ndarray, "R"]]:
        """See `Dividing`."""
        return []

    def divide(
        self, step: InFlight, outputs: Seq[StepOutputs], commits: Seq[Commit | None]
    ) -> None:
        """See `Dividing`."""

    def divide_texts(self, texts: Seq[Text], work: Seq[float], device_ns: int) -> None:
        """See `Dividing`."""

    def take(self, sequence: Sequence) -> tuple[int, int, int]:
        """See `Dividing`."""
        return 0, 0, 0


class Attribution:
    """Divides steps; see the module.

    Args:
        rates: of the model.
        max_rows: slots of each copy of the model; copies: how many.

    Attributes:
        unowned_ns: of the device's time so far, what is in no sequence's record.
    """

    def __init__(self, rates: WorkRates, max_rows: int, copies: int = 1) -> None:
        self.unowned_ns = 0
        self._rates = rates
        self._of_slot = [np.zeros(max_rows + 1, np.int64) for _ in range(copies)]
        self._ns = np.zeros((3, _FIRST_ACCOUNTS), np.int64)
        self._decode_ns = self._ns[DECODE]
        self._alive = np.zeros(_FIRST_ACCOUNTS, np.bool_)
        self._accounts: dict[Sequence, int] = {}
        self._free = list(range(_FIRST_ACCOUNTS - 1, -1, -1))
        # (steps launched when it was closed, account): may change hands once those were divided.
        self._closed: deque[tuple[int, int]] = deque()
        self._num_launched = self._num_divided = 0
        self._texts: dict[Sequence, int] = {}

    def launched(
        self,
        plans: Seq[Plan | None],
        inputs: Seq[StepInputs],
        owners: Callable[[int], Owners],
    ) -> list[Int[np.ndarray, "R"]]:
        """A step is launched: notes who joins.

        Args:
            owners: of a copy of the model that has a plan: who held which slot in it.

        Returns:
            The account of each copy's live rows.
        """
        self._num_launched += 1
        found = []
        for copy, (plan, own) in enumerate(zip(plans, inputs, strict=True)):
            of_slot = self._of_slot[copy]
            if plan is not None and plan.joins:
                holders = owners(copy)
                for join in plan.joins:
                    sequence = holders[join.slot]
                    assert sequence is not None, f"nobody joined slot {join.slot}"
                    of_slot[join.slot] = self._account(sequence)
            found.append(of_slot[own.rows[: own.num_live_rows]])
        return found

    def divide(
        self, step: InFlight, outputs: Seq[StepOutputs], commits: Seq[Commit | None]
    ) -> None:
        """Divides a step that has been read, before those that ended in it are told.

        Args:
            commits: of each copy; None where it had no plan.
        """
        device_ns = outputs[0].device_ns
        paging_ns = min(device_ns, sum(map(_paging_ns, step.plans, outputs)))
        rows = [own.num_live_rows for own in step.inputs]
        shares = apportion(device_ns - paging_ns, self._weights(step.plans, step.inputs))
        self.unowned_ns += paging_ns if len(shares) else device_ns
        start = 0
        for plan, own, accounts, commit, num_rows in zip(
            step.plans, step.inputs, step.accounts, commits, rows, strict=True
        ):
            if plan is not None and commit is not None:
                self._add(plan, own, accounts, commit, shares[start : start + num_rows])
            start += num_rows
        self._num_divided += 1
        while self._closed and self._closed[0][0] <= self._num_divided:
            self._free.append(self._closed.popleft()[1])

    def divide_texts(self, texts: Seq[Text], work: Seq[float], device_ns: int) -> None:
        """Divides an embedding step that has been read, before its texts are told.

        Args:
            work: that each text was.
        """
        shares = apportion(device_ns, np.asarray(work, np.float64)).tolist()
        for text, share in zip(texts, shares, strict=True):
            if text.reason is None:
                self._texts[text] = share
            else:
                self.unowned_ns += share

    def take(self, sequence: Sequence) -> tuple[int, int, int]:
        """A sequence ends: its shares so far, as prefill, decode and waste."""
        account = self._accounts.pop(sequence, None)
        if account is None:
            return self._texts.pop(sequence, 0), 0, 0
        prefill_ns, decode_ns, wasted_ns = self._ns[:, account].tolist()
        self._alive[account] = False
        self._closed.append((self._num_launched, account))
        return prefill_ns, decode_ns, wasted_ns

    # ------------------------------------------------------------------ accounts

    def _account(self, sequence: Sequence) -> int:
        """The sequence's account, opened where it has none."""
        account = self._accounts.get(sequence)
        if account is not None:
            return account
        if not self._free:
            size = len(self._alive)
            self._free = list(range(2 * size - 1, size - 1, -1))
            self._ns = np.concatenate([self._ns, np.zeros_like(self._ns)], axis=1)
            self._decode_ns = self._ns[DECODE]
            self._alive = np.concatenate([self._alive, np.zeros_like(self._alive)])
        account = self._accounts[sequence] = self._free.pop()
        self._ns[:, account] = 0
        self._alive[account] = True
        return account

    def _add(
        self,
        plan: Plan,
        inputs: StepInputs,
        accounts: Int[np.ndarray, "R"],
        commit: Commit,
        shares: Int[np.ndarray, "R"],
    ) -> None:
        """Adds the shares of one copy's rows to their accounts."""
        if self._closed:  # some of the rows may have ended
            alive = self._alive[accounts]
            self.unowned_ns += int(shares[~alive].sum())
            shares = shares * alive
        num_decode = inputs.num_decode_rows
        self._decode_ns[accounts[:num_decode]] += shares[:num_decode]
        needed = dict(commit.ends)
        if plan.decode_steps > 1:
            for row, num_needed in needed.items():
                self._waste(accounts[row], int(shares[row]), num_needed, plan.decode_steps)
        verified = iter(commit.verified)
        for row, chunk in enumerate(plan.chunks, num_decode):
            share = int(shares[row])
            if chunk.num_drafts:
                num_needed = needed.get(row, next(verified)[2])
                self._ns[DECODE, accounts[row]] += share
                self._waste(accounts[row], share, num_needed, len(chunk.token_ids))
            else:
                self._add_chunk(accounts[row], share, chunk)

    def _waste(self, account: int, share: int, num_needed: int, num_tokens: int) -> None:
        """Of a share that counts as decode, what its tokens were not needed for is waste."""
        wasted = share * (num_tokens - num_needed) // num_tokens
        self._ns[DECODE, account] -= wasted
        self._ns[WASTED, account] += wasted

    def _add_chunk(self, account: int, share: int, chunk: Chunk) -> None:
        """Known tokens: those computed before, then of the prompt, then of the output."""
        num_tokens = len(chunk.token_ids)
        wasted = share * chunk.num_again // num_tokens
        decode = share * chunk.num_outputs // num_tokens
        self._ns[WASTED, account] += wasted
        self._ns[DECODE, account] += decode
        self._ns[PREFILL, account] += share - wasted - decode

    # ------------------------------------------------------------------ work

    def _weights(
        self, plans: Seq[Plan | None], inputs: Seq[StepInputs]
    ) -> Float64[np.ndarray, "R"]:
        """The work of each live row, of all copies in order."""
        decode_steps = inputs[0].program.decode_steps
        num_tokens = sum(int(own.query_starts[own.num_live_rows]) for own in inputs)
        each = self._rates.token + self._rates.weights / max(num_tokens, 1)
        found = [
            self._decode_weights(own, each, decode_steps)
            if plan is None or not plan.chunks
            else self._mixed_weights(own, each)
            for plan, own in zip(plans, inputs, strict=True)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _decode_weights(
        self, inputs: StepInputs, each: float, decode_steps: int
    ) -> Float64[np.ndarray, "R"]:
        """Of rows that bring a token in each of some decode steps; up to the common factor."""
        rates = self._rates
        contexts = inputs.context_lens[: inputs.num_live_rows] + (decode_steps - 1) / 2
        return rates.seen(contexts) * (rates.attend + rates.read) + (each + rates.sample)

    def _mixed_weights(self, inputs: StepInputs, each: float) -> Float64[np.ndarray, "R"]:
        """Of rows that bring one token or several."""
        rates, num_rows = self._rates, inputs.num_live_rows
        num_tokens = np.diff(inputs.query_starts[: num_rows + 1]).astype(np.float64)
        contexts = inputs.context_lens[:num_rows].astype(np.float64)
        sampled = num_tokens if inputs.program.draft_tokens else inputs.samples[:num_rows]
        attended = num_tokens * rates.seen(contexts - (num_tokens - 1) / 2)
        work = num_tokens * each + sampled * rates.sample + attended * rates.attend
        return work + rates.seen(contexts) * rates.read


def apportion(total: int, weights: Float64[np.ndarray, "R"]) -> Int[np.ndarray, "R"]:
    """A whole number, divided in proportion to weights, so that the parts add up to it."""
    if not len(weights):
        return np.zeros(0, np.int64)
    ends = np.cumsum(weights)
    if not ends[-1] > 0:
        return apportion(total, np.ones(len(weights)))
    parts = np.empty(len(weights) + 1, np.int64)
    parts[0] = 0
    np.multiply(ends, total / ends[-1], out=parts[1:], casting="unsafe")
    parts[-1] = total
    return parts[1:] - parts[:-1]


def _paging_ns(plan: Plan | None, outputs: StepOutputs) -> int:
    """What a plan's pages took to the host and from it; `page_ns` is of both ways."""
    if plan is None or not outputs.page_ns or not (plan.page_saves or plan.page_loads):
        return 0
    moves = (*plan.page_saves, *plan.page_loads)
    return int(sum(outputs.page_ns[move.group] for move in moves) / 2)
