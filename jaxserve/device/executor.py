"""Runs steps on the device: compiles every program, launches, reads back.

`launch` applies the step's changes of state, transfers its inputs as one array and starts its
program without waiting; `collect` waits for that step's tokens. Calls form one chain, since each
takes the state that the one before returned. Owned by the engine's thread.

Invariant: after `warm_up` nothing is compiled any more; `compiles_after_warmup` counts and stays 0.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxserve.device import programs
from jaxserve.device.compiles import compile_counter
from jaxserve.device.packing import ENTRY_FIELDS, StepLayout, fill_entries
from jaxserve.device.programs import StepResults
from jaxserve.device.state import DeviceState
from jaxserve.device.step import LogprobArrays, Program, SlotWrite, StepInputs, StepOutputs
from jaxserve.models.decoder import Decoder
from jaxserve.sampling.slots import SlotArrays, SlotSettings, pack_writes, padding_writes
from jaxserve.types import MAX_LOGPROBS

logger = logging.getLogger(__name__)

#: Told how far warming up is: "compiling", programs done, of how many.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs: its results, which may not be there yet."""

    inputs: StepInputs
    results: StepResults
    launched_ns: int


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A program to compile: its function, its arguments, and which of them is the state."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    state_argument: int
    cost: int = 0


class Executor:
    """One model on its devices.

    Args:
        model: loaded.
        state: fresh device state; the executor's from then on.
        steps: the step programs to compile.
        page_size: tokens a page.
    """

    def __init__(
        self, model: Decoder, state: DeviceState, steps: Sequence[Program], page_size: int
    ) -> None:
        self._model = model
        self._params, self._structure = jax.tree.flatten(model)
        self._state = state
        self._page_size = page_size
        self._cache_dtype_bytes = state.cache.groups[0].kv.dtype.itemsize
        self._max_rows = state.last_tokens.shape[0] - 1
        self._layouts = {
            program: StepLayout(program, num_groups=len(state.page_tables), page_size=page_size)
            for program in steps
        }
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._counter = compile_counter()
        self._compiles_at_warmup = 0
        self._ready_ns = 0

    # ------------------------------------------------------------------ start-up

    def warm_up(self, progress: Progress, threads: int = 0) -> None:
        """Compiles all programs, in threads, and runs each once without rows.

        Args:
            progress: told "compiling", programs done, of how many.
            threads: 0 takes the cores.
        """
        start = time.monotonic()
        wanted = self._wanted()
        longest_first = sorted(wanted, key=lambda key: -wanted[key].cost)  # threads end together
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, "jaxserve compile") as pool:
            futures = {pool.submit(_compile, wanted[key]): key for key in longest_first}
            for done, future in enumerate(as_completed(futures), 1):
                self._compiled[futures[future]] = future.result()
                progress("compiling", done, len(wanted))
        self._run_empty()
        self._compiles_at_warmup = self._counter.count
        logger.info("%d programs ready after %.1f s", len(wanted), time.monotonic() - start)

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled while serving; stays 0."""
        return self._counter.count - self._compiles_at_warmup

    def _wanted(self) -> dict[Hashable, _Wanted]:
        """Every program, by the key it is found under."""
        params, state = _shapes(self._params), _shapes(self._state)
        wanted: dict[Hashable, _Wanted] = {}
        for program, layout in self._layouts.items():
            step = programs.make_step(self._structure, layout, self._page_size)
            cost = program.num_tokens * (1 + program.prompt_logprobs) * program.decode_steps
            wanted[program] = _Wanted(step, (params, state, _integers(layout.size)), 1, cost)
        for writes in self._padding_writes():
            wanted[_slots_key(writes)] = _Wanted(programs.write_slots, (state, _shapes(writes)), 0)
        entries = _integers(programs.ENTRIES_A_CALL, ENTRY_FIELDS)
        wanted["entries"] = _Wanted(programs.write_page_tables, (state, entries), 0)
        prefix = _integers(programs.PREFIX_SCALARS + programs.PREFIX_TOKENS_A_CALL)
        wanted["prefix"] = _Wanted(programs.write_prefix, (state, prefix), 0)
        copies = _integers(programs.COPIES_A_CALL, 2)
        for group in range(len(self._state.page_tables)):
            copy = programs.make_copy(group)
            wanted["copy", group] = _Wanted(copy, (state, copies), 0)
        return wanted

    def _run_empty(self) -> None:
        """Runs every program once, without effect: nothing is set up lazily later."""
        for program in self._layouts:
            self.collect(self.launch(self._empty_inputs(program)))
        for writes in self._padding_writes():
            self._state = self._compiled[_slots_key(writes)](self._state, writes)
        self._write_entries([(0, 0, 0, 0)])
        self._write_prefix(self._max_rows, [0])
        for group in range(len(self._state.page_tables)):
            self._copy_pages([(group, 0, 0)])
        jax.block_until_ready(self._state)

    def _empty_inputs(self, program: Program) -> StepInputs:
        rows, tokens = program.num_rows, program.num_tokens
        return StepInputs(
            program=program,
            rows=np.full(rows, self._max_rows, np.int32),
            num_live_rows=0,
            num_decode_rows=0,
            query_starts=np.zeros(rows + 1, np.int32),
            context_lens=np.zeros(rows, np.int32),
            token_ids=np.zeros(tokens, np.int32),
            next_token_ids=np.zeros(tokens, np.int32),
            samples=np.zeros(rows, np.bool_),
        )

    def _padding_writes(self) -> list[SlotArrays]:
        return padding_writes(vocab_size=self._model.spec.vocab_size, max_rows=self._max_rows)

    # ------------------------------------------------------------------ steps

    def launch(self, inputs: StepInputs) -> Launched:
        """Starts a step; does not wait for it."""
        if inputs.slot_writes:
            self._write_slots(inputs.slot_writes)
        if inputs.page_copies:
            self._copy_pages(inputs.page_copies)
        layout = self._layouts[inputs.program]
        self._write_entries(layout.overflow(inputs))
        packed = layout.pack(inputs)
        launched_ns = time.monotonic_ns()
        self._state, results = self._compiled[inputs.program](self._params, self._state, packed)
        return Launched(inputs, results, launched_ns)

    def collect(self, launched: Launched) -> StepOutputs:
        """Waits for a step's results."""
        inputs, results = launched.inputs, launched.results
        token_ids = np.asarray(results.token_ids)
        ready_ns = time.monotonic_ns()
        outputs = StepOutputs(
            token_ids=token_ids,
            device_ns=ready_ns - max(launched.launched_ns, self._ready_ns),
            idle_ns=max(0, launched.launched_ns - self._ready_ns) if self._ready_ns else 0,
        )
        self._ready_ns = ready_ns
        if inputs.logprobs:
            outputs.logprobs = _unpack_logprobs(results.logprobs)
        if results.prompt_logprobs is not None:
            outputs.prompt_logprobs = _unpack_logprobs(results.prompt_logprobs)
        return outputs

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """FLOPs and bytes of a call, counted from shapes; several decode steps are so many steps.

        A row's context is counted once a decode step, not once a token of a chunk.
        """
        rows, num_tokens = inputs.num_live_rows, int(inputs.query_starts[inputs.num_live_rows])
        context = int(inputs.context_lens.sum())
        flops = num_bytes = 0
        for step in range(inputs.program.decode_steps):
            done = self._model.count_work(
                num_tokens,
                int(np.count_nonzero(inputs.samples)),
                context + step * rows,
                cache_dtype_bytes=self._cache_dtype_bytes,
            )
            flops, num_bytes = flops + done[0], num_bytes + done[1]
        return flops, num_bytes

    # ------------------------------------------------------------------ changes of state

    def _write_slots(self, writes: Sequence[SlotWrite]) -> None:
        spec = self._model.spec
        arrays = pack_writes(
            [
                SlotSettings(
                    slot=write.slot,
                    sampling=write.sampling,
                    prompt_len=write.prompt_len,
                    choice=write.choice,
                )
                for write in writes
            ],
            eos_token_ids=spec.eos_token_ids,
            vocab_size=spec.vocab_size,
            max_rows=self._max_rows,
        )
        self._state = self._compiled[_slots_key(arrays)](self._state, arrays)
        for write in writes:
            if write.prefix:
                self._write_prefix(write.slot, write.prefix)

    def _write_prefix(self, slot: int, tokens: Sequence[int]) -> None:
        size, scalars = programs.PREFIX_TOKENS_A_CALL, programs.PREFIX_SCALARS
        for first in range(0, len(tokens), size):
            part = tokens[first : first + size]
            packed = np.zeros(scalars + size, np.int32)
            packed[:scalars] = slot, first, len(part)
            packed[scalars : scalars + len(part)] = part
            self._state = self._compiled["prefix"](self._state, packed)

    def _write_entries(self, entries: Sequence[tuple[int, int, int, int]]) -> None:
        size = programs.ENTRIES_A_CALL
        for first in range(0, len(entries), size):
            packed = np.empty((size, ENTRY_FIELDS), np.int32)
            fill_entries(packed, entries[first : first + size])
            self._state = self._compiled["entries"](self._state, packed)

    def _copy_pages(self, copies: Sequence[tuple[int, int, int]]) -> None:
        size = programs.COPIES_A_CALL
        for group in sorted({group for group, _, _ in copies}):
            pairs = [(source, target) for g, source, target in copies if g == group]
            for first in range(0, len(pairs), size):
                part = pairs[first : first + size]
                packed = np.zeros((size, 2), np.int32)
                packed[: len(part)] = part
                self._state = self._compiled["copy", group](self._state, packed)


def _compile(wanted: _Wanted) -> Callable[..., Any]:
    function = jax.jit(wanted.function, donate_argnums=wanted.state_argument)
    return function.lower(*wanted.arguments).compile()


def _slots_key(writes: SlotArrays) -> tuple[str, int, bool]:
    return "slots", writes.settings.shape[0], writes.lists is not None


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _shapes(tree: Any) -> Any:
    def shape(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.Array) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def _unpack_logprobs(packed: Int[jax.Array, "... 42"]) -> LogprobArrays:
    """See `programs.pack_logprobs`."""
    columns = np.asarray(packed)
    ends = np.cumsum([1, 1, MAX_LOGPROBS])
    chosen, rank, top_ids, top_values = np.split(columns, ends, axis=-1)
    return LogprobArrays(
        chosen=np.ascontiguousarray(chosen[..., 0]).view(np.float32),
        rank=rank[..., 0],
        top_ids=top_ids,
        top_values=np.ascontiguousarray(top_values).view(np.float32),
    )
