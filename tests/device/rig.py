"""A small real model under the real executor, turned as the engine turns it; and what it must do.

`warm` gives an executor with everything compiled; `Rig` fills its pages with NaN and turns a
scheduler and a batch builder over it. Several rigs follow each other on one executor: what an
earlier one left in slots and page tables must not matter.

The reference is `tests.models.driver`: one sequence alone, one token a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.device.buckets import Buckets
from jaxserve.device.cache import init_cache, pages_per_sequence
from jaxserve.device.executor import Executor
from jaxserve.device.sharding import make_mesh
from jaxserve.device.state import DeviceState, hidden_states, init_device_state
from jaxserve.device.step import StepOutputs
from jaxserve.engine.batches import Batches
from jaxserve.models.decoder import Decoder
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.structured.constraint import token_bits
from jaxserve.types import ModelInfo, SamplingParams
from tests.models.driver import Driver

PAGE_SIZE = 4
MAX_CONTEXT = 192
NUM_PAGES = 201
NUM_HOST_PAGES = 40
LIMITS = SchedulerConfig(
    max_rows=4, max_step_tokens=16, decode_steps=4, max_waiting=100, draft_tokens=0
)

MESH = make_mesh(jax.devices()[:1])

_poison = jax.jit(lambda x: jnp.full_like(x, jnp.nan), donate_argnums=0)


def fresh_state(
    model: Decoder, limits: SchedulerConfig = LIMITS, *, num_pages: int = NUM_PAGES, dtype: str = ""
) -> DeviceState:
    """Device state as at start-up."""
    groups = model.cache_groups()
    cache = init_cache(
        groups,
        [num_pages] * len(groups),
        page_size=PAGE_SIZE,
        dtype=dtype or model.options.activations,
        mesh=MESH,
        backend=model.options.attention,
    )
    return init_device_state(
        cache,
        max_rows=limits.max_rows,
        vocab_size=model.spec.vocab_size,
        pages_per_sequence=pages_per_sequence(MAX_CONTEXT, PAGE_SIZE),
        hidden=hidden_states(
            Buckets(limits, row_growth=4).programs,
            model.spec.hidden_size,
            model.options.activations,
        ),
        mesh=MESH,
    )


@dataclass
class Warm:
    """A model and its executor, ready."""

    model: Decoder
    limits: SchedulerConfig
    buckets: Buckets
    executor: Executor
    progress: list[tuple[str, int, int]]

    def poison(self) -> None:
        """Fills every page with NaN: what was not written must not matter."""
        state = self.executor._state
        self.executor._state = replace(state, cache=jax.tree.map(_poison, state.cache))

    def greedy(self, prompt: Seq[int], num: int) -> list[int]:
        """The tokens that must follow a prompt."""
        return next_tokens(self.model, prompt, num)


def warm(model: Decoder, limits: SchedulerConfig = LIMITS) -> Warm:
    """Compiles all programs of a model."""
    buckets = Buckets(limits, row_growth=4)
    executor = Executor(
        model,
        fresh_state(model, limits),
        buckets.programs,
        PAGE_SIZE,
        MESH,
        host_pages=[NUM_HOST_PAGES] * len(model.cache_groups()),
    )
    progress: list[tuple[str, int, int]] = []
    executor.warm_up(lambda *told: progress.append(told))
    return Warm(model, limits, buckets, executor, progress)


def next_tokens(
    model: Decoder,
    prompt: Seq[int],
    num: int,
    choose: Callable[[np.ndarray, list[int]], int] = lambda logits, known: int(np.argmax(logits)),
) -> list[int]:
    """Continues a prompt, alone and one token a step.

    Args:
        choose: the next token, given the logits after the known tokens; greedy by itself.
    """
    driver = Driver(model, 1, MAX_CONTEXT)
    known = list(prompt)
    logits = driver.step({0: known}, num_rows=1, num_tokens=MAX_CONTEXT)[0][0]
    while True:
        known.append(choose(logits, known))
        if len(known) == len(prompt) + num:
            return known[len(prompt) :]
        logits = driver.step({0: known[-1:]})[0][0]


def all_logits(model: Decoder, tokens: Seq[int]) -> np.ndarray:
    """[T, V]: logits after each of these tokens."""
    driver = Driver(model, 1, MAX_CONTEXT)
    _, hidden = driver.step({0: tokens}, num_rows=1, num_tokens=MAX_CONTEXT)
    padded = np.zeros((MAX_CONTEXT, hidden.shape[1]), hidden.dtype)
    padded[: len(tokens)] = hidden
    return driver.all_logits(padded)[: len(tokens)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Some tokens, none of them an end token."""
    return np.random.default_rng(seed).integers(10, 320, length).tolist()


@dataclass
class Beside:
    """Log-probabilities of some tokens, one entry each."""

    chosen: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_values: list[list[float]] = field(default_factory=list)

    def add(self, arrays, place: tuple[int, ...]) -> None:
        """The entry at one place of `LogprobArrays`."""
        self.chosen.append(float(arrays.chosen[place]))
        self.rank.append(int(arrays.rank[place]))
        self.top_ids.append(arrays.top_ids[place].tolist())
        self.top_values.append(arrays.top_values[place].tolist())


class Rig:
    """A fresh scheduler and batch builder over a warm executor.

    Args:
        pages: that the scheduler may hand out, at most as many as there are.
        host_pages: likewise, in the host's memory.

    Attributes:
        programs: names of the programs that ran; outputs: what they brought.
        copies, prefixes: page copies and shared prefixes that were sent.
    """

    def __init__(self, warm: Warm, pages: int = NUM_PAGES - 1, host_pages: int = 0) -> None:
        self.warm = warm
        self.executor = warm.executor
        assert pages < self.executor._state.cache.groups[0].kv.shape[1]
        groups = warm.model.cache_groups()
        spec = warm.model.spec
        info = ModelInfo(
            name="tiny",
            max_context=MAX_CONTEXT,
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            cache_groups=groups,
        )
        assert host_pages <= NUM_HOST_PAGES
        self.scheduler = Scheduler(
            warm.limits,
            info,
            page_size=PAGE_SIZE,
            num_pages=[pages + 1] * len(groups),
            host_pages=[host_pages] * len(groups),
            preemption="swap",
        )
        self.batch = Batches(warm.buckets, warm.limits.max_rows)
        warm.poison()
        self.emitted: dict[Sequence, list[int]] = {}
        self.logprobs: dict[Sequence, Beside] = {}
        self.prompt_logprobs: dict[Sequence, Beside] = {}
        self.programs: list[str] = []
        self.outputs: list[StepOutputs] = []
        self.copies = self.prefixes = self.num_masked = 0
        #: Of a row that has a grammar: tokens that may follow its output.
        self.allowed: Callable[[list[int]], Iterable[int]] = lambda outputs: range(info.vocab_size)
        self._in_flight = None

    def submit(self, prompt: Seq[int], *, n: int = 1, **sampling) -> list[Sequence]:
        """A request, greedy and without end unless told otherwise; its sequences."""
        neutral = {"max_tokens": 8, "seed": 1, "temperature": 0.0, "ignore_eos": True}
        keys = [("client", len(self.emitted) + i) for i in range(n)]
        params = SamplingParams(**neutral | sampling)
        sequences = self.scheduler.submit(keys, list(prompt), params)
        for sequence in sequences:
            self.emitted[sequence] = []
            self.logprobs[sequence], self.prompt_logprobs[sequence] = Beside(), Beside()
        return sequences

    def turn(self) -> None:
        """Plans and launches a step, then reads the one before."""
        plan = self.scheduler.plan()
        launched = None
        if plan is not None:
            (inputs,) = self.batch.build([plan])
            self.programs.append(inputs.program.name)
            self.copies += len(inputs.page_copies)
            self.prefixes += sum(bool(write.prefix) for write in inputs.slot_writes)
            launched = (inputs, self.executor.launch([inputs]))
        if self._in_flight is not None:
            self._read(*self._in_flight)
        if launched is not None and launched[0].masked:
            inputs, step = launched
            launched = (inputs, self.executor.sample(step, [self._masks(inputs)]))
            self.num_masked += 1
        self._in_flight = launched

    def _masks(self, inputs) -> np.ndarray:
        """What `allowed` says, of each place that has a row with a grammar."""
        program, owners = inputs.program, self.scheduler.owners()
        vocab_size = self.scheduler._model.vocab_size
        masks = np.full((program.num_places, -(-vocab_size // 32)), 0xFFFF_FFFF, np.uint32)
        for row in range(inputs.num_live_rows):
            sequence = owners[inputs.rows[row]]
            if sequence is None or sequence.sampling.grammar is None or not inputs.samples[row]:
                continue
            place, draft = row, []
            if program.draft_tokens:
                place, end = inputs.query_starts[row : row + 2].tolist()
                draft = inputs.token_ids[place + 1 : end].tolist()
            for ahead in range(len(draft) + 1):
                outputs = sequence.token_ids[sequence.prompt_len :] + draft[:ahead]
                masks[place + ahead] = token_bits(self.allowed(outputs), vocab_size)
        return masks

    def run(self, limit: int = 1000) -> None:
        """Turns until nothing is left to do; nothing may be compiled meanwhile."""
        compiled = self.executor.compiles_after_warmup
        for _ in range(limit):
            if not self.scheduler.has_work:
                assert self.executor.compiles_after_warmup == compiled
                assert self.scheduler.pages.num_used == self.scheduler.swap.num_used == 0
                return
            self.turn()
        raise AssertionError("the scheduler does not come to an end")

    def generate(self, prompt: Seq[int], **sampling) -> list[int]:
        """The tokens of one request, alone from here on."""
        (sequence,) = self.submit(prompt, **sampling)
        self.run()
        return self.emitted[sequence]

    def _read(self, inputs, launched) -> None:
        (outputs,) = self.executor.collect(launched)
        self.outputs.append(outputs)
        num_rows = inputs.num_live_rows
        rows = inputs.rows[:num_rows].tolist()
        commit = self.scheduler.commit(rows, outputs.token_ids[:, :num_rows].T.tolist())
        for sequence, tokens, row in zip(
            commit.sequences, commit.token_ids, commit.rows, strict=True
        ):
            self.emitted[sequence] += tokens
            if sequence.sampling.logprobs is not None:
                for step in range(len(tokens)):
                    self.logprobs[sequence].add(outputs.logprobs, (step, row))
        for sequence, chunk, row in commit.chunks:
            first = int(inputs.query_starts[row])
            for token in range(len(chunk.token_ids)):
                if chunk.start + token < sequence.prompt_len - 1:
                    self.prompt_logprobs[sequence].add(outputs.prompt_logprobs, (first + token,))
