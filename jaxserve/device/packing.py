"""All integers of a step in one int32 array: one host-to-device copy a step.

`StepLayout` gives each field of `StepInputs` its place for one program; the host packs, the
program unpacks with static slices. Page-table deltas ride along up to a fixed number; the rest, as
when a long shared prefix joins, goes through a program of its own (see `executor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxserve.device.step import Program, StepInputs

ENTRY_FIELDS = 4  # group, slot, index, page
#: Group of the entries that pad: no group has it.
NO_GROUP = -1
_MIN_ENTRIES = 8
_SCALARS = 4  # live rows, decode rows, logprobs, masked


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepArrays:
    """`StepInputs` on the device; `entries` are rows (group, slot, index, page)."""

    rows: Int[Array, "R"]
    query_starts: Int[Array, "R+1"]
    context_lens: Int[Array, "R"]
    samples: Bool[Array, "R"]
    token_ids: Int[Array, "T"]
    next_token_ids: Int[Array, "T"] | None
    entries: Int[Array, "E 4"]
    num_live_rows: Int[Array, ""]
    num_decode_rows: Int[Array, ""]
    logprobs: Bool[Array, ""]
    masked: Bool[Array, ""]
    adapters: Int[Array, "R"] | None


class StepLayout:
    """Where each field of a program's inputs is.

    Args:
        num_groups: cache groups, each of which may get a page for every row.
        page_size: tokens a page.

    Attributes:
        num_entries: page-table deltas that fit.
        size: of the packed array.
    """

    def __init__(self, program: Program, *, num_groups: int, page_size: int) -> None:
        self.program = program
        rows, tokens = program.num_rows, program.num_tokens
        opened = -(-max(tokens, program.decode_steps * rows) // page_size) + rows
        self.num_entries = max(_MIN_ENTRIES, num_groups * opened)
        sizes = {
            "scalars": _SCALARS,
            "rows": rows,
            "query_starts": rows + 1,
            "context_lens": rows,
            "samples": rows,
            "token_ids": tokens,
            "next_token_ids": tokens if program.prompt_logprobs else 0,
            "adapters": rows if program.adapters else 0,
            "entries": self.num_entries * ENTRY_FIELDS,
        }
        ends = np.cumsum(list(sizes.values())).tolist()
        self.size: int = ends[-1]
        self._places = {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    def pack(
        self, inputs: StepInputs, *, logprobs: bool, masked: bool = False
    ) -> Int[np.ndarray, "X"]:
        """A new array with everything but the entries beyond `num_entries`.

        Args:
            logprobs: whether the step computes log-probabilities of sampled tokens.
            masked: whether it leaves sampling to another program.
        """
        packed = np.empty(self.size, np.int32)
        places = self._places
        scalars = (inputs.num_live_rows, inputs.num_decode_rows, logprobs, masked)
        packed[places["scalars"]] = scalars
        packed[places["rows"]] = inputs.rows
        packed[places["query_starts"]] = inputs.query_starts
        packed[places["context_lens"]] = inputs.context_lens
        packed[places["samples"]] = inputs.samples
        packed[places["token_ids"]] = inputs.token_ids
        if self.program.prompt_logprobs:
            packed[places["next_token_ids"]] = inputs.next_token_ids
        if self.program.adapters:
            assert inputs.adapters is not None
            packed[places["adapters"]] = inputs.adapters
        fill_entries(
            packed[places["entries"]].reshape(-1, ENTRY_FIELDS),
            inputs.page_entries[-self.num_entries :],
        )
        return packed

    def overflow(self, inputs: StepInputs) -> Sequence[tuple[int, int, int, int]]:
        """The entries that `pack` leaves out: the earlier ones, to be applied before."""
        return inputs.page_entries[: -self.num_entries]

    def unpack(self, packed: Int[Array, "X"]) -> StepArrays:
        """The fields, on the device."""
        fields = {name: packed[place] for name, place in self._places.items()}
        scalars = fields["scalars"]
        return StepArrays(
            rows=fields["rows"],
            query_starts=fields["query_starts"],
            context_lens=fields["context_lens"],
            samples=fields["samples"] != 0,
            token_ids=fields["token_ids"],
            next_token_ids=fields["next_token_ids"] if self.program.prompt_logprobs else None,
            entries=fields["entries"].reshape(-1, ENTRY_FIELDS),
            num_live_rows=scalars[0],
            num_decode_rows=scalars[1],
            logprobs=scalars[2] != 0,
            masked=scalars[3] != 0,
            adapters=fields["adapters"] if self.program.adapters else None,
        )


def fill_entries(
    rows: Int[np.ndarray, "E 4"], entries: Sequence[tuple[int, int, int, int]]
) -> None:
    """Writes page-table deltas into `rows`, the last of several for one place, and pads."""
    latest = {(group, slot, index): page for group, slot, index, page in entries}
    if latest:
        rows[: len(latest)] = [(*place, page) for place, page in latest.items()]
    rows[len(latest) :] = (NO_GROUP, 0, 0, 0)
