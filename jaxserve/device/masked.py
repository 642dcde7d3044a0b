"""Sampling a masked step's rows: the program that follows it, and what the host gives to that.

The step has left its hidden states in the device state (`programs`). While it runs the host reads
the tokens of the step before and makes the masks; so their cost hides behind the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from jaxserve.device.acceptance import accept
from jaxserve.device.programs import StepResults, keep_last, pack_logprobs, sample_rows
from jaxserve.device.state import DeviceState
from jaxserve.device.step import NO_ADAPTER, MaskedSampling, StepInputs
from jaxserve.models.decoder import Decoder
from jaxserve.models.deltas import StepDeltas
from jaxserve.sampling.spread import ONE_DEVICE, Spread
from jaxserve.sampling.state import num_mask_words

#: Rows of `_Inputs.places` that every sampling has.
_NUM_FIELDS = 4


class _Inputs(NamedTuple):
    """What the host gives: N places, of R rows.

    Attributes:
        scalars: live places, and whether log-probabilities are wanted.
        places: slot and position of the token sampled there, whether it is, and the step's token
            there (which says whether a draft held); where adapters have heads, also the slot of its
            row's adapter.
        query_starts: of each row, as `StepInputs`; samples: likewise.
        masks: as `mask_logits` takes them.
    """

    scalars: Int[Array, "2"]
    places: Int[Array, "F N"]
    query_starts: Int[Array, "R+1"]
    samples: Int[Array, "R"]
    masks: UInt[Array, "N W"]


def make_sampling(
    model_structure: Any,
    head: Sequence[int],
    sampling: MaskedSampling,
    spread: Spread = ONE_DEVICE,
) -> Callable[[Any, DeviceState, Array], tuple[DeviceState, StepResults]]:
    """The program; its results are those that the step left out.

    Its first argument is the leaves of the model's output head; where adapters have heads, these
    and the classes of adapter slots.

    Args:
        model_structure: as `programs.make_step`.
        head: which of the model's leaves are the output head's.
        spread: how the logits lie on the devices.
    """

    def choose(
        params: Any, state: DeviceState, packed: UInt[Array, "K+N W"]
    ) -> tuple[DeviceState, StepResults]:
        inputs = _unpack(packed, sampling)
        deltas = used = None
        if sampling.adapters:
            params, classes = params
            used = inputs.places[_NUM_FIELDS]
            deltas = StepDeltas.of(classes, used)
        leaves: list[Any] = [None] * model_structure.num_leaves  # the others are not needed
        for place, leaf in zip(head, params, strict=True):
            leaves[place] = leaf
        model: Decoder = jax.tree.unflatten(model_structure, leaves)
        slots, positions, live, token_ids = inputs.places[:_NUM_FIELDS]
        num_live, wants_logprobs = inputs.scalars
        with jax.named_scope("sampling"):
            logits = model.logits(state.hidden[: sampling.num_places], num_live, deltas, used)
            places = slots, positions, live != 0
            sampled, logprobs = sample_rows(
                logits, inputs.masks, state.sampling, places, wants_logprobs != 0, spread
            )
            beside = pack_logprobs(logprobs)
            samples, starts = inputs.samples != 0, inputs.query_starts
            if sampling.draft_tokens:
                accepted = accept(sampled, token_ids, starts, sampling.draft_tokens)
                rows = slots[jnp.minimum(starts[:-1], sampling.num_places - 1)]
                last = keep_last(state.last_tokens, rows, samples, accepted.last)
                found = accepted.token_ids, beside[accepted.places]
            else:
                last = keep_last(state.last_tokens, slots, samples, sampled)
                found = sampled[None], beside[None]
        state = replace(state, last_tokens=last)
        return state, StepResults(token_ids=found[0], logprobs=found[1], prompt_logprobs=None)

    return choose


# ---------------------------------------------------------------------------- the host's side


def masked_inputs(
    inputs: StepInputs,
    sampling: MaskedSampling,
    masks: UInt[np.ndarray, "N W"],
    *,
    logprobs: bool,
) -> UInt[np.ndarray, "K+N W"]:
    """A step's masks, and what goes with them: one array, since each costs a transfer.

    Args:
        sampling: that follows the step.
        masks: of each of its places.
        logprobs: whether any copy of the model wants log-probabilities.
    """
    places = np.zeros((_NUM_FIELDS + sampling.adapters, sampling.num_places), np.int32)
    adapters = inputs.adapters if sampling.adapters else None
    if adapters is not None:
        places[_NUM_FIELDS] = NO_ADAPTER
    if sampling.draft_tokens:
        num_live = int(inputs.query_starts[inputs.num_live_rows])
        sizes = np.diff(inputs.query_starts)
        row_of = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(num_live)
        behind = inputs.query_starts[1:][row_of] - place - 1  # tokens of the row after this one
        places[0, :num_live] = inputs.rows[row_of]
        places[1, :num_live] = inputs.context_lens[row_of] - behind
        places[2, :num_live] = 1
        places[3] = inputs.token_ids[: sampling.num_places]
        if adapters is not None:
            places[_NUM_FIELDS, :num_live] = adapters[row_of]
    else:
        num_live = inputs.num_live_rows
        places[:3] = inputs.rows, inputs.context_lens, inputs.samples
        if adapters is not None:
            places[_NUM_FIELDS] = adapters
    small = (
        np.array([num_live, logprobs], np.int32),
        places,
        inputs.query_starts.astype(np.int32),
        inputs.samples.astype(np.int32),
    )
    num_words = masks.shape[1]
    packed = np.empty((_num_small(sampling, num_words) + sampling.num_places, num_words), np.uint32)
    packed[-sampling.num_places :] = masks
    flat = np.concatenate([part.ravel() for part in small])
    packed.reshape(-1)[: flat.size] = flat.view(np.uint32)
    return packed


def _unpack(packed: UInt[Array, "K+N W"], sampling: MaskedSampling) -> _Inputs:
    """The parts of `masked_inputs`, on the device."""
    num_small = _num_small(sampling, packed.shape[1])
    flat = jax.lax.bitcast_convert_type(packed[:num_small].reshape(-1), jnp.int32)
    *small, _ = jnp.split(flat, np.cumsum(_small_sizes(sampling)))
    scalars, places, query_starts, samples = small
    places = places.reshape(-1, sampling.num_places)
    return _Inputs(scalars, places, query_starts, samples, packed[num_small:])


def _small_sizes(sampling: MaskedSampling) -> tuple[int, ...]:
    """Numbers in each of the parts but the masks."""
    num_rows, num_fields = sampling.num_rows, _NUM_FIELDS + sampling.adapters
    return 2, num_fields * sampling.num_places, num_rows + 1, num_rows


def _num_small(sampling: MaskedSampling, num_words: int) -> int:
    """Rows of the packed array that those take, before the masks."""
    return -(-sum(_small_sizes(sampling)) // num_words)


def padding_masks(sampling: MaskedSampling, vocab_size: int) -> UInt[np.ndarray, "N W"]:
    """Masks that rule nothing out."""
    shape = (sampling.num_places, num_mask_words(vocab_size))
    return np.full(shape, np.uint32(0xFFFF_FFFF), np.uint32)
