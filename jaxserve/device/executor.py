"""Runs steps on the device: compiles every program, launches, reads back.

`launch` applies the step's changes of state, transfers its inputs as one array and starts its
program without waiting; `collect` waits for that step's tokens. Between them a masked step gets its
masks by `sample`, before anything else is launched. Calls form one chain, since each
takes the state that the one before returned. Owned by the engine's thread.

Where the mesh holds several copies of the model, a step has inputs for each of them, all of one
program; every array from the host has one more axis in front, the copies. A change of state that
one copy needs goes to the others as padding.

Where the mesh spans several hosts, each has an executor. Host 0's broadcasts a step's device calls
before it makes them, those of the others `follow`. A step's results are whole on every device, so
that host 0 can read those of every copy: a few numbers a row are gathered, within the step.

Invariant: after `warm_up` nothing is compiled any more; `compiles_after_warmup` counts and stays 0.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import UInt

from jaxserve.device import programs
from jaxserve.device.adapters import AdapterSlots
from jaxserve.device.changes import Changes
from jaxserve.device.clock import DeviceClock
from jaxserve.device.compiles import compile_counter, compiler_options
from jaxserve.device.host_store import HostStore
from jaxserve.device.hosts import Hosts
from jaxserve.device.launched import Launched
from jaxserve.device.lowering import Lowering, Wanted, integers, shapes
from jaxserve.device.masked import make_sampling, masked_inputs, padding_masks
from jaxserve.device.packing import StepLayout
from jaxserve.device.plans import Call, PlanLayout
from jaxserve.device.programs import StepResults
from jaxserve.device.sharding import tensor_parallel
from jaxserve.device.state import DeviceState
from jaxserve.device.step import (
    MaskedSampling,
    Program,
    StepInputs,
    StepOutputs,
    empty_inputs,
)
from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder
from jaxserve.models.parallel import TENSOR_AXES
from jaxserve.sampling.spread import Spread

logger = logging.getLogger(__name__)

#: Told how far warming up is: "compiling", programs done, of how many.
Progress = Callable[[str, int, int], None]


class Executor:
    """One model on its devices.

    Args:
        model: loaded.
        state: fresh device state; the executor's from then on.
        steps: the step programs to compile.
        page_size: tokens a page.
        mesh: that the model and the state are on.
        hosts: that the mesh spans, where it is more than this one.
        host_pages: of each cache group, in the host's memory, for each copy of the model; none
            where there is no host store, nor on several hosts.
        clock: of the devices, where others launch calls on them too.
        adapters: slots of LoRA adapters; None where there are none.
        cuda_graphs: whether steps on a GPU may be graphs.
    """

    def __init__(
        self,
        model: Decoder,
        state: DeviceState,
        steps: Sequence[Program],
        page_size: int,
        mesh: Mesh,
        hosts: Hosts | None = None,
        host_pages: Sequence[int] = (),
        clock: DeviceClock | None = None,
        adapters: AdapterSlots | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self._model = model
        self._params, self._structure = jax.tree.flatten(model)
        self._head = _places(self._params, model.output_head)
        self._state = state
        self._page_size = page_size
        self._mesh = mesh
        kind = mesh.devices.flat[0].device_kind
        self._options = compiler_options(kind, cuda_graphs=cuda_graphs)
        self._hosts = hosts
        self._calls: list[Call] | None = None  # of the next step, where they are broadcast
        self._copies = mesh.shape["data"]
        assert hosts is None or not any(host_pages)
        self._store = HostStore(state.cache, host_pages, mesh) if any(host_pages) else None
        self._adapters = adapters
        classes = adapters.arrays if adapters is not None else ()
        self._lowering = Lowering(
            mesh, self._params, state, shared=hosts is not None, classes=classes
        )
        self._cache_dtype_bytes = state.cache.groups[0].kv.dtype.itemsize
        self._max_rows = state.last_tokens.shape[0] // self._copies - 1
        self._layouts = {
            program: StepLayout(program, num_groups=len(state.page_tables), page_size=page_size)
            for program in steps
        }
        self._has_heads = adapters is not None and adapters.layout.vocabulary
        self._samplings = sorted({self._sampling(p) for p in steps if p.decode_steps == 1})
        self._changes = Changes(
            *(model.spec, state, mesh, self._store, adapters),
            call=self._call,
            move_pages=self._move_pages,
        )
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._plans = PlanLayout({})
        self._counter = compile_counter()
        self._compiles_at_warmup = 0
        self._clock = clock or DeviceClock()

    # ------------------------------------------------------------------ start-up

    def warm_up(self, progress: Progress, threads: int = 0) -> None:
        """Compiles all programs, in threads, and runs each once without rows.

        Args:
            progress: told "compiling", programs done, of how many.
            threads: 0 takes the cores.
        """
        start = time.monotonic()
        wanted = self._wanted()
        if self._hosts is not None:
            self._agree(self._hosts, wanted)
        longest_first = sorted(wanted, key=lambda key: -wanted[key].cost)  # threads end together
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, "jaxserve compile") as pool:
            futures = {pool.submit(self._compile, wanted[key]): key for key in longest_first}
            for done, future in enumerate(as_completed(futures), 1):
                self._compiled[futures[future]] = future.result()
                progress("compiling", done, len(wanted))
        if self._hosts is not None:
            self._hosts.gather("compiled", None)  # a collective does not wait for a compilation
        self._run_empty()
        if self._hosts is not None and self._hosts.host == 0:
            self._calls = []
        self._compiles_at_warmup = self._counter.count
        logger.info("%d programs ready after %.1f s", len(wanted), time.monotonic() - start)

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled while serving; stays 0."""
        return self._counter.count - self._compiles_at_warmup

    @property
    def page_ns(self) -> tuple[float, ...]:
        """As `StepOutputs.page_ns`."""
        return self._store.page_ns if self._store is not None else ()

    def _wanted(self) -> dict[Hashable, Wanted]:
        """Every program, by the key it is found under."""
        wanted: dict[Hashable, Wanted] = {}
        spread = Spread(
            axes=TENSOR_AXES if tensor_parallel(self._mesh) > 1 else (),
            copies=("data",) if self._copies > 1 else (),
        )
        for program, layout in self._layouts.items():
            step = programs.make_step(self._structure, layout, self._page_size, spread)
            cost = program.num_tokens * (1 + program.prompt_logprobs) * program.decode_steps
            wanted[program] = Wanted(step, integers(layout.size), cost, adapters=program.adapters)
        for sampling in self._samplings:
            masks = padding_masks(sampling, self._model.spec.vocab_size)
            inputs = masked_inputs(self._empty(sampling), sampling, masks, logprobs=False)
            choose = make_sampling(self._structure, self._head, sampling, spread)
            wanted[sampling] = Wanted(
                choose,
                shapes(inputs),
                sampling.num_places,
                adapters=sampling.adapters,
                params=self._head_params(),
            )
        return wanted | self._changes.wanted()

    def lower(self, program: Program, platforms: tuple[str, ...] | None = None) -> Lowered:
        """A step program, not yet compiled; model and state may be abstract.

        Args:
            platforms: what to lower for, where the mesh's devices do not say it.
        """
        return self._lowering.lower(self._wanted()[program], platforms)

    def _agree(self, hosts: Hosts, wanted: dict[Hashable, Wanted]) -> None:
        """Sees to it that all hosts are about to compile the same programs.

        Raises:
            ConfigError: they are not.
        """
        inputs = {key: self._lowering.for_copies(program.inputs) for key, program in wanted.items()}
        self._plans = PlanLayout(inputs)
        arrays = [f"{x.dtype}{x.shape}" for x in jax.tree.leaves((self._params, self._state))]
        told = repr((self._plans.describe(), arrays, str(self._structure)))
        digests = hosts.gather("programs", hashlib.sha256(told.encode()).hexdigest())
        for host, digest in enumerate(digests):
            if digest != digests[0]:
                raise ConfigError(
                    f"host {host} would compile other programs than host 0: is its model another?"
                )

    def _compile(self, wanted: Wanted) -> Callable[..., Any]:
        return self._lowering.lower(wanted).compile(compiler_options=self._options)

    def _run_empty(self) -> None:
        """Runs every program once, without effect: nothing is set up lazily later."""
        for program in self._layouts:
            self.collect(self.launch([empty_inputs(program, self._max_rows)] * self._copies))
        for sampling in self._samplings:
            launched = self.launch([self._empty(sampling)] * self._copies)
            masks = padding_masks(sampling, self._model.spec.vocab_size)
            self.collect(self.sample(launched, [masks] * self._copies))
        self._changes.run_empty()
        if self._adapters is not None:
            jax.block_until_ready(self._adapters.arrays)
        if self._store is not None:
            self._store.warm_up(self._move_pages, lambda: jax.block_until_ready(self._state))
        jax.block_until_ready(self._state)

    def _empty(self, sampling: MaskedSampling) -> StepInputs:
        """A masked step without rows, of a program that leaves this sampling."""
        program = next(
            p for p in self._layouts if self._sampling(p) == sampling and p.decode_steps == 1
        )
        return replace(empty_inputs(program, self._max_rows), masked=True)

    def _head_params(self) -> list[Any]:
        """What samples by masks needs of the model: handing over all costs more than it saves."""
        return [self._params[place] for place in self._head]

    def _sampling(self, program: Program) -> MaskedSampling:
        return program.sampling(heads=self._has_heads)

    # ------------------------------------------------------------------ steps

    def launch(self, inputs: Sequence[StepInputs]) -> Launched:
        """Starts a step; does not wait for it.

        Args:
            inputs: of each copy of the model, all of one program.
        """
        program = inputs[0].program
        layout = self._layouts[program]
        for copy, own in enumerate(inputs):
            self._changes.make(copy, own, layout.overflow(own))
        logprobs, masked = (
            any(x) for x in zip(*((i.logprobs, i.masked) for i in inputs), strict=True)
        )
        packed = [layout.pack(own, logprobs=logprobs, masked=masked) for own in inputs]
        launched_ns = time.monotonic_ns()
        results = self._call(program, packed[0] if self._mesh.size == 1 else np.stack(packed))
        return Launched(inputs, results, launched_ns)

    def sample(self, launched: Launched, masks: Sequence[UInt[np.ndarray, "N W"]]) -> Launched:
        """Starts the sampling of the masked step that was launched last; does not wait for it.

        Args:
            masks: of each copy of the model; as `mask_logits` takes them.
        """
        inputs = launched.inputs
        logprobs = any(own.logprobs for own in inputs)
        sampling = self._sampling(inputs[0].program)
        packed: list[Any] = [
            masked_inputs(own, sampling, mask, logprobs=logprobs)
            for own, mask in zip(inputs, masks, strict=True)
        ]
        if self._mesh.size > 1:
            packed = [jax.tree.map(lambda *parts: np.stack(parts), *packed)]
        return replace(launched, sampled=self._call(sampling, packed[0]))

    def collect(self, launched: Launched) -> list[StepOutputs]:
        """Waits for a step's results, those of each copy."""
        token_ids = launched.token_ids()
        device_ns, idle_ns = self._clock.collected(launched.launched_ns)
        outputs = launched.outputs(token_ids, by_copy=self._mesh.size > 1)
        for own in outputs:
            own.device_ns, own.idle_ns, own.page_ns = device_ns, idle_ns, self.page_ns
        return outputs

    def follow(self) -> None:
        """Makes the device calls that host 0 broadcasts, for as long as it lives.

        A step is waited for once the next has been started, as on host 0: so an error shows.
        """
        assert self._hosts is not None
        before = results = None
        for plan in self._hosts.plans():
            for call in self._plans.unpack(plan):
                results = self._run(*call)
            jax.block_until_ready(before)
            before = results

    def _call(self, key: Hashable, inputs: Any) -> StepResults | None:
        """Makes a device call, or keeps it until the step's own, with which all are broadcast."""
        if self._calls is None or self._hosts is None:
            return self._run(key, inputs)
        self._calls.append((key, inputs))
        if not isinstance(key, Program | MaskedSampling):
            return None
        calls, self._calls = self._calls, []
        self._hosts.broadcast(self._plans.pack(calls))
        *changes, step = calls
        for change in changes:
            self._run(*change)
        return self._run(*step)

    def _run(self, key: Hashable, inputs: Any) -> StepResults | None:
        """Starts one program."""
        compiled = self._compiled[key]
        if isinstance(key, tuple) and key[0] == "adapter":
            assert self._adapters is not None
            arrays, index = self._adapters.arrays, key[2]
            arrays[index] = compiled(arrays[index], inputs)
            return None
        if not isinstance(key, Program | MaskedSampling):
            self._state = compiled(self._state, inputs)
            return None
        params = self._params if isinstance(key, Program) else self._head_params()
        if key.adapters and self._adapters is not None:
            params = (params, tuple(self._adapters.arrays))
        self._state, results = compiled(params, self._state, inputs)
        return results

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """FLOPs and bytes of a call, counted from shapes; several decode steps are so many steps.

        A row's context is counted once a decode step, not once a token of a chunk.
        """
        rows, num_tokens = inputs.num_live_rows, int(inputs.query_starts[inputs.num_live_rows])
        context = int(inputs.context_lens.sum())
        verifies = inputs.program.draft_tokens > 0
        flops = num_bytes = 0
        for step in range(inputs.program.decode_steps):
            done = self._model.count_work(
                num_tokens,
                num_tokens if verifies else int(np.count_nonzero(inputs.samples)),
                context + step * rows,
                cache_dtype_bytes=self._cache_dtype_bytes,
            )
            flops, num_bytes = flops + done[0], num_bytes + done[1]
        return flops, num_bytes

    def _move_pages(self, key: Hashable, inputs: Any) -> Any:
        """Runs a program of the host store: it reads the state, or changes it."""
        results = self._compiled[key](self._state, inputs)
        if isinstance(results, DeviceState):
            self._state = results
        return results


def _places(leaves: Sequence[Any], part: Any) -> list[int]:
    """Which of a model's leaves are those of a part of it."""
    own = set(map(id, jax.tree.leaves(part)))
    return [place for place, leaf in enumerate(leaves) if id(leaf) in own]
