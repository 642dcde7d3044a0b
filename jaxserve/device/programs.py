"""The step's programs; the small ones that change device state before it are in `changes`.

A step: page-table deltas → each row's page table → tokens (the host's, or the one that the device
sampled last for the slot) → model over the paged cache → hidden states of the rows that end →
logits → the next token of each row, which stays here as the slot's last token. With several decode
steps the part from the tokens on is a loop inside the call. A verification program samples after
every token, and keeps the samples that its drafts led to (`acceptance`). A masked step ends with
the hidden states, which stay in the state until `masked` goes on from there.

A program for adapters is given those in the slots beside the parameters, and which slot each row
uses; all others have no trace of them.

Everything is a pure function of (parameters, state, host's arrays) and returns the new state,
whose buffers are the donated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxserve.device.acceptance import accept
from jaxserve.device.packing import ENTRY_FIELDS, StepArrays, StepLayout
from jaxserve.device.state import DeviceState
from jaxserve.device.step import NO_ADAPTER, LogprobArrays
from jaxserve.models.context import StepContext
from jaxserve.models.decoder import Decoder
from jaxserve.models.deltas import SlotClass, StepDeltas
from jaxserve.sampling.history import observe
from jaxserve.sampling.logprobs import Logprobs, logprobs_if, no_logprobs, prompt_logprobs
from jaxserve.sampling.sample import any_asks, sample, sample_plainly
from jaxserve.sampling.spread import ONE_DEVICE, Spread
from jaxserve.sampling.state import SamplingState
from jaxserve.types import MAX_LOGPROBS
from pallas_kernels.ragged import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepResults:
    """What the host may read; log-probabilities as int32, floats by their bits."""

    token_ids: Int[Array, "steps R"]
    logprobs: Int[Array, "steps R 42"]
    prompt_logprobs: Int[Array, "T 42"] | None


# Traced once for each number of rows, not once for each program.
_sample = jax.jit(sample, static_argnames="spread")
_logprobs_if = jax.jit(logprobs_if, static_argnames="spread")

#: The slots' last tokens, the tokens that rows got, and their log-probabilities.
Chosen = tuple[Int[Array, "S+1"], Int[Array, "*B R"], Int[Array, "*B R 42"]]
_LOGPROB_COLUMNS = 2 + 2 * MAX_LOGPROBS

#: Parameters, or these and the classes of adapter slots; state; packed inputs.
Step = Callable[[Any, DeviceState, Array], tuple[DeviceState, StepResults]]


def make_step(
    model_structure: Any, layout: StepLayout, page_size: int, spread: Spread = ONE_DEVICE
) -> Step:
    """The step of one program.

    Args:
        model_structure: the PyTreeDef of the model, whose leaves are the step's first argument.
        spread: how the logits lie on the devices.
    """

    def step(
        params: Any, state: DeviceState, packed: Int[Array, "X"]
    ) -> tuple[DeviceState, StepResults]:
        params, classes = params if layout.program.adapters else (params, ())
        model: Decoder = jax.tree.unflatten(model_structure, params)
        inputs = layout.unpack(packed)
        tables = write_entries(state.page_tables, inputs.entries)
        state = replace(state, page_tables=tables)
        tables = tuple(table[inputs.rows] for table in tables)
        run = _Run(model, layout, inputs, tables, page_size, spread, classes)
        num_steps = layout.program.decode_steps
        if layout.program.draft_tokens:
            state, accepted, beside = run.verify(state, inputs.context_lens)
            return state, StepResults(token_ids=accepted, logprobs=beside, prompt_logprobs=None)
        if num_steps == 1:
            state, sampled, beside, of_prompt = run.step(state, inputs.context_lens)
            return state, StepResults(
                token_ids=sampled[None], logprobs=beside[None], prompt_logprobs=of_prompt
            )

        def body(
            carry: tuple[DeviceState, Int[Array, "R"]], _: None
        ) -> tuple[tuple[DeviceState, Int[Array, "R"]], tuple[Array, Array]]:
            state, context_lens = carry
            state, token_ids, logprobs, _of_prompt = run.step(state, context_lens)
            return (state, context_lens + run.live_rows), (token_ids, logprobs)

        carry = (state, inputs.context_lens)
        (state, _), (token_ids, logprobs) = jax.lax.scan(body, carry, length=num_steps)
        return state, StepResults(token_ids=token_ids, logprobs=logprobs, prompt_logprobs=None)

    return step


@dataclass(frozen=True)
class _Tokens:
    """A step's tokens after the model: what they are, and what has been made of them.

    Attributes:
        token_ids: that entered the model.
        slots, positions, live: of each token.
        hidden: states to compute logits from.
        state: with their keys and values, and with them in the sampler's history.
    """

    token_ids: Int[Array, "T"]
    slots: Int[Array, "T"]
    positions: Int[Array, "T"]
    live: Bool[Array, "T"]
    hidden: Float[Array, "T D"]
    state: DeviceState


class _Run:
    """One decode step, one mixed step or one verification of a call."""

    def __init__(
        self,
        model: Decoder,
        layout: StepLayout,
        inputs: StepArrays,
        tables: tuple[Int[Array, "R M"], ...],
        page_size: int,
        spread: Spread,
        classes: tuple[SlotClass, ...],
    ) -> None:
        self.model = model
        self.layout = layout
        self.inputs = inputs
        self.tables = tables
        self.page_size = page_size
        self.spread = spread
        num_rows = layout.program.num_rows
        row = jnp.arange(num_rows, dtype=jnp.int32)
        self.live_rows: Bool[Array, "R"] = row < inputs.num_live_rows
        self.decode_rows: Bool[Array, "R"] = row < inputs.num_decode_rows
        self.deltas: StepDeltas | None = None
        if inputs.adapters is not None:
            batch = self._batches(inputs.context_lens)[0]
            used = inputs.adapters[batch.token_rows(layout.program.num_tokens)]
            live = batch.live_tokens(layout.program.num_tokens)
            self.deltas = StepDeltas.of(classes, jnp.where(live, used, NO_ADAPTER))

    def step(
        self, state: DeviceState, context_lens: Int[Array, "R"]
    ) -> tuple[DeviceState, Int[Array, "R"], Int[Array, "R 42"], Int[Array, "T 42"] | None]:
        """Returns the state, the sampled tokens, and log-probabilities."""
        inputs = self.inputs
        tokens = self._run_model(state, context_lens)
        state, ends = tokens.state, tokens.hidden
        with jax.named_scope("sampling"):
            if not self.layout.program.is_decode:
                ends = ends[jnp.maximum(inputs.query_starts[1:] - 1, 0)]

            def choose() -> Chosen:
                logits = self.model.logits(ends, inputs.num_live_rows, self.deltas, inputs.adapters)
                places = inputs.rows, context_lens, inputs.samples
                sampled, logprobs = sample_rows(
                    logits, None, state.sampling, places, inputs.logprobs, self.spread
                )
                last = keep_last(state.last_tokens, inputs.rows, inputs.samples, sampled)
                return last, sampled, pack_logprobs(logprobs)

            state, sampled, logprobs = self._choose_or_leave(state, ends, choose)
        return state, sampled, logprobs, self._of_prompt(tokens.hidden)

    def verify(
        self, state: DeviceState, context_lens: Int[Array, "R"]
    ) -> tuple[DeviceState, Int[Array, "steps R"], Int[Array, "steps R 42"]]:
        """Returns the state, the tokens that stand after each row, and log-probabilities."""
        inputs = self.inputs
        tokens = self._run_model(state, context_lens)
        state = tokens.state
        with jax.named_scope("sampling"):

            def choose() -> Chosen:
                used = None if self.deltas is None else self.deltas.slots
                logits = self.model.logits(
                    tokens.hidden, inputs.query_starts[-1], self.deltas, used
                )
                places = tokens.slots, tokens.positions + 1, tokens.live
                sampled, logprobs = sample_rows(
                    logits, None, state.sampling, places, inputs.logprobs, self.spread
                )
                num_drafts = self.layout.program.draft_tokens
                accepted = accept(sampled, tokens.token_ids, inputs.query_starts, num_drafts)
                last = keep_last(state.last_tokens, inputs.rows, inputs.samples, accepted.last)
                return last, accepted.token_ids, pack_logprobs(logprobs)[accepted.places]

            return self._choose_or_leave(state, tokens.hidden, choose)

    def _choose_or_leave(
        self, state: DeviceState, hidden: Float[Array, "N D"], choose: Callable[[], Chosen]
    ) -> tuple[DeviceState, Int[Array, "*B R"], Int[Array, "*B R 42"]]:
        """Samples; or leaves that, with the hidden states, to the program that has masks.

        Returns:
            The state, the tokens and their log-probabilities: zeros where that is left.
        """
        program = self.layout.program
        if program.decode_steps > 1:
            last, token_ids, logprobs = choose()
            return replace(state, last_tokens=last), token_ids, logprobs

        def choose_now() -> tuple[Array, ...]:
            return *choose(), state.hidden

        def leave() -> tuple[Array, ...]:
            shape = (program.num_rows,)
            if program.draft_tokens:
                shape = (1 + program.draft_tokens, *shape)
            kept = state.hidden.at[: hidden.shape[0]].set(hidden.astype(state.hidden.dtype))
            beside = jnp.zeros((*shape, _LOGPROB_COLUMNS), jnp.int32)
            return state.last_tokens, jnp.zeros(shape, jnp.int32), beside, kept

        last, token_ids, logprobs, kept = jax.lax.cond(self.inputs.masked, leave, choose_now)
        return replace(state, last_tokens=last, hidden=kept), token_ids, logprobs

    def _run_model(self, state: DeviceState, context_lens: Int[Array, "R"]) -> _Tokens:
        inputs, num_tokens = self.inputs, self.layout.program.num_tokens
        batches = self._batches(context_lens)
        context = StepContext.build(batches, num_tokens, self.page_size)
        context = replace(context, deltas=self.deltas)
        row_of_token = batches[0].token_rows(num_tokens)
        slot_of_token = inputs.rows[row_of_token]
        live = batches[0].live_tokens(num_tokens)
        token_ids = jnp.where(
            self.decode_rows[row_of_token] & live,
            state.last_tokens[slot_of_token],
            inputs.token_ids,
        )
        with jax.named_scope("model"):
            hidden, cache = self.model(token_ids, state.cache, context)
        with jax.named_scope("sampling"):
            sampling = observe(state.sampling, token_ids, slot_of_token, context.positions, live)
        state = replace(state, cache=cache, sampling=sampling)
        return _Tokens(token_ids, slot_of_token, context.positions, live, hidden, state)

    def _batches(self, context_lens: Int[Array, "R"]) -> tuple[RaggedBatch, ...]:
        return tuple(
            RaggedBatch(
                page_table=table,
                query_starts=self.inputs.query_starts,
                context_lens=context_lens,
                max_query_len=self._max_query_len,
                aligned=self.layout.program.is_decode,
            )
            for table in self.tables
        )

    @property
    def _max_query_len(self) -> int:
        program = self.layout.program
        if program.draft_tokens:
            return 1 + program.draft_tokens
        return 1 if program.is_decode else program.num_tokens

    def _of_prompt(self, hidden: Float[Array, "T D"]) -> Int[Array, "T 42"] | None:
        if self.inputs.next_token_ids is None:
            return None
        deltas, model = self.deltas, self.model
        found = prompt_logprobs(
            lambda part, slots=None: model.logits(part, None, deltas, slots),
            hidden,
            self.inputs.next_token_ids,
            self.spread,
            () if deltas is None else (deltas.slots,),
        )
        return pack_logprobs(found)


def sample_rows(
    logits: Float[Array, "N V"],
    masks: UInt[Array, "N W"] | None,
    state: SamplingState,
    places: tuple[Int[Array, "N"], Int[Array, "N"], Bool[Array, "N"]],
    wants_logprobs: Bool[Array, ""],
    spread: Spread,
) -> tuple[Int[Array, "N"], Logprobs]:
    """A token for each place, and its log-probabilities if any are wanted.

    Args:
        masks: of tokens that may be taken, as `mask_logits` has them; all where None.
        places: slot, position of the sampled token, and whether one is wanted.
    """
    slots, _, live = places

    def as_asked() -> tuple[Int[Array, "N"], Logprobs]:
        sampled = _sample(logits, state, *places, spread=spread, masks=masks)
        return sampled, _logprobs_if(wants_logprobs, logits, sampled, spread=spread)

    def plainly() -> tuple[Int[Array, "N"], Logprobs]:
        return sample_plainly(logits, spread, masks), no_logprobs(logits.shape[0])

    # What most steps take is behind one condition: on a GPU the host waits for each of them.
    return jax.lax.cond(any_asks(state, slots, live, spread) | wants_logprobs, as_asked, plainly)


def keep_last(
    last_tokens: Int[Array, "S+1"],
    slots: Int[Array, "R"],
    samples: Bool[Array, "R"],
    sampled: Int[Array, "R"],
) -> Int[Array, "S+1"]:
    """Each sampling row's last token is its slot's next input."""
    slots = jnp.where(samples, slots, last_tokens.shape[0])
    return last_tokens.at[slots].set(sampled, mode="drop")


def write_entries(
    tables: tuple[Int[Array, "S+1 M"], ...], entries: Int[Array, "E 4"]
) -> tuple[Int[Array, "S+1 M"], ...]:
    """Applies page-table deltas (group, slot, index, page); a group that is not there pads."""
    groups, slots, indices, pages = (entries[:, i] for i in range(ENTRY_FIELDS))
    return tuple(
        table.at[jnp.where(groups == group, slots, table.shape[0]), indices].set(pages, mode="drop")
        for group, table in enumerate(tables)
    )


def pack_logprobs(logprobs: Logprobs) -> Int[Array, "*B 42"]:
    """One int32 array for one copy to the host: chosen, rank, top ids, top values."""

    def bits(values: Float[Array, "..."]) -> Int[Array, "..."]:
        return jax.lax.bitcast_convert_type(values, jnp.int32)

    return jnp.concatenate(
        [
            bits(logprobs.chosen)[..., None],
            logprobs.rank[..., None],
            logprobs.top_ids,
            bits(logprobs.top_values),
        ],
        axis=-1,
    )


# ---------------------------------------------------------------------------- the host's side


def unpack_logprobs(columns: Int[np.ndarray, "... 42"]) -> LogprobArrays:
    """See `pack_logprobs`."""
    ends = np.cumsum([1, 1, MAX_LOGPROBS])
    chosen, rank, top_ids, top_values = np.split(columns, ends, axis=-1)
    return LogprobArrays(
        chosen=np.ascontiguousarray(chosen[..., 0]).view(np.float32),
        rank=rank[..., 0],
        top_ids=top_ids,
        top_values=np.ascontiguousarray(top_values).view(np.float32),
    )
