"""Runs steps on the device: compiles every program, launches, reads back.

`launch` applies the step's changes of state, transfers its inputs as one vector and starts its
program without waiting; `collect` waits for that step's tokens. Calls form one chain, since each
takes the state that the one before returned. Owned by the engine's thread.

Invariant: after `warm_up` nothing is compiled any more; `compiles_after_warmup` counts and stays 0.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.device import programs
from jaxserve.device.compiles import compile_counter
from jaxserve.device.programs import Layout, StepResult
from jaxserve.device.state import DeviceState
from jaxserve.device.step import LogprobArrays, Program, SlotWrite, StepInputs, StepOutputs
from jaxserve.models.decoder import Decoder
from jaxserve.sampling.logprobs import Logprobs
from jaxserve.sampling.slots import SlotArrays, SlotSettings, pack_writes, padding_writes

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs: its results, which may not be there yet."""

    inputs: StepInputs
    result: StepResult
    launched_ns: int


class Executor:
    """One model on its devices.

    Args:
        model: loaded.
        state: fresh device state; the executor's from then on.
        steps: the programs to compile.
        page_size: tokens a page.
    """

    def __init__(
        self, model: Decoder, state: DeviceState, steps: Sequence[Program], page_size: int
    ) -> None:
        self._graph, self._params = nnx.split(model)
        self._model = model
        self._state = state
        self._page_size = page_size
        self._max_rows = state.last_tokens.shape[0] - 1
        self._layouts = {program: Layout(program) for program in steps}
        self._compiled: dict[Any, Callable[..., Any]] = {}
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
        wanted = self._programs()
        start = time.monotonic()
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, "jaxserve compile") as pool:
            futures = {pool.submit(self._compile, *what): key for key, what in wanted.items()}
            for done, future in enumerate(as_completed(futures), 1):
                self._compiled[futures[future]] = future.result()
                progress("compiling", done, len(wanted))
        self._run_empty()
        self._compiles_at_warmup = self._counter.count
        seconds = time.monotonic() - start
        logger.info("%d programs ready after %.1f s", len(wanted), seconds)

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled while serving; stays 0."""
        return self._counter.count - self._compiles_at_warmup

    def _programs(self) -> dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Key → function (state donated) and its arguments' shapes."""
        state = _shapes(self._state)
        wanted: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        params = _shapes(self._params)
        # The largest first: threads end together.
        for program, layout in sorted(self._layouts.items(), reverse=True, key=_compile_cost):
            run = functools.partial(programs.run_step, self._graph, program, self._page_size)
            wanted[program] = run, (params, state, _vector(sum(layout.sizes)))
        for writes in self._padding_writes():
            wanted[_write_key(writes)] = programs.write_slots, (state, _shapes(writes))
        entries = jax.ShapeDtypeStruct((programs.ENTRIES_A_CALL, 4), np.int32)
        wanted["entries"] = programs.write_entries, (state, entries)
        prefix = _vector(3 + programs.PREFIX_TOKENS_A_CALL)
        wanted["prefix"] = programs.write_prefix, (state, prefix)
        copies = jax.ShapeDtypeStruct((programs.COPIES_A_CALL, 2), np.int32)
        for group in range(len(self._state.tables)):
            copy = functools.partial(programs.copy_group_pages, group)
            wanted["copy", group] = copy, (state, copies)
        return wanted

    def _compile(self, function: Callable[..., Any], shapes: tuple[Any, ...]) -> Callable[..., Any]:
        """The state is the only argument, or the one after the weights, and is donated."""
        donated = 1 if len(shapes) == 3 else 0
        named = jax.jit(function, donate_argnums=donated)
        return named.lower(*shapes).compile()

    def _run_empty(self) -> None:
        for program in self._layouts:
            scratch = np.full(program.num_rows, self._max_rows, np.int32)
            zeros = np.zeros(program.num_rows, np.int32)
            inputs = StepInputs(
                program=program,
                rows=scratch,
                num_live_rows=0,
                num_decode_rows=0,
                query_starts=np.zeros(program.num_rows + 1, np.int32),
                context_lens=zeros,
                token_ids=np.zeros(program.num_tokens, np.int32),
                next_token_ids=np.zeros(program.num_tokens, np.int32),
                samples=np.zeros(program.num_rows, np.bool_),
                logprobs=True,
            )
            self.collect(self.launch(inputs))
        for writes in self._padding_writes():
            self._state = self._compiled[_write_key(writes)](self._state, writes)
        self._write_entries([(len(self._state.tables), 0, 0, 0)])
        self._write_prefix(self._max_rows, [0])
        for group in range(len(self._state.tables)):
            self._copy_pages([(group, 0, 0)])
        jax.block_until_ready(self._state)

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
        entries = inputs.page_entries
        surplus = len(entries) - layout.num_entries
        if surplus > 0:
            self._write_entries(entries[:surplus])
            entries = entries[surplus:]
        vector = layout.pack(inputs, entries, no_group=len(self._state.tables))
        launched_ns = time.monotonic_ns()
        self._state, result = self._compiled[inputs.program](self._params, self._state, vector)
        return Launched(inputs, result, launched_ns)

    def collect(self, launched: Launched) -> StepOutputs:
        """Waits for a step's results."""
        inputs, result = launched.inputs, launched.result
        token_ids = np.asarray(result.token_ids)
        ready_ns = time.monotonic_ns()
        began_ns = max(launched.launched_ns, self._ready_ns)
        outputs = StepOutputs(
            token_ids=token_ids,
            device_ns=ready_ns - began_ns,
            idle_ns=max(0, launched.launched_ns - self._ready_ns) if self._ready_ns else 0,
        )
        self._ready_ns = ready_ns
        if inputs.logprobs:
            outputs.logprobs = _to_host(result.logprobs)
        if result.prompt_logprobs is not None:
            outputs.prompt_logprobs = _to_host(result.prompt_logprobs)
        return outputs

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """FLOPs and bytes of a step, counted from shapes."""
        steps, rows = inputs.program.decode_steps, inputs.num_live_rows
        contexts = int(inputs.context_lens.sum())
        context_tokens = steps * contexts + rows * steps * (steps - 1) // 2
        flops, moved = self._model.count_work(
            steps * int(inputs.query_starts[-1]), steps * rows, context_tokens
        )
        once, _ = divmod(moved, 1)
        return flops, once

    # ------------------------------------------------------------------ changes of state

    def _write_slots(self, writes: Sequence[SlotWrite]) -> None:
        spec = self._model.spec
        arrays = pack_writes(
            [
                SlotSettings(
                    slot=w.slot, sampling=w.sampling, prompt_len=w.prompt_len, choice=w.choice
                )
                for w in writes
            ],
            eos_token_ids=spec.eos_token_ids,
            vocab_size=spec.vocab_size,
            max_rows=self._max_rows,
        )
        self._state = self._compiled[_write_key(arrays)](self._state, arrays)
        for write in writes:
            if write.prefix:
                self._write_prefix(write.slot, write.prefix)

    def _write_prefix(self, slot: int, tokens: Sequence[int]) -> None:
        size = programs.PREFIX_TOKENS_A_CALL
        for first in range(0, len(tokens), size):
            part = tokens[first : first + size]
            vector = np.zeros(3 + size, np.int32)
            vector[:3] = slot, first, len(part)
            vector[3 : 3 + len(part)] = part
            self._state = self._compiled["prefix"](self._state, vector)

    def _write_entries(self, entries: Sequence[tuple[int, int, int, int]]) -> None:
        size = programs.ENTRIES_A_CALL
        for first in range(0, len(entries), size):
            part = entries[first : first + size]
            padded = np.full((size, 4), len(self._state.tables), np.int32)
            padded[: len(part)] = part
            self._state = self._compiled["entries"](self._state, padded)

    def _copy_pages(self, copies: Sequence[tuple[int, int, int]]) -> None:
        size = programs.COPIES_A_CALL
        for group in sorted({copy[0] for copy in copies}):
            pairs = [(source, target) for g, source, target in copies if g == group]
            for first in range(0, len(pairs), size):
                part = pairs[first : first + size]
                padded = np.zeros((size, 2), np.int32)
                padded[: len(part)] = part
                self._state = self._compiled["copy", group](self._state, padded)


def _compile_cost(item: tuple[Program, Layout]) -> tuple[int, bool]:
    return item[0].num_tokens * item[0].decode_steps, item[0].prompt_logprobs


def _write_key(writes: SlotArrays) -> tuple[str, int, bool]:
    return "slots", writes.settings.shape[0], writes.lists is not None


def _vector(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _shapes(tree: Any) -> Any:
    def shape(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.Array) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def _to_host(values: Logprobs) -> LogprobArrays:
    chosen, rank, top_ids, top_values = (np.asarray(x) for x in values)
    return LogprobArrays(chosen=chosen, rank=rank, top_ids=top_ids, top_values=top_values)
