"""Where trials run: which engine, and what its tokens must be. The fake engine's world is here."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float32

from jaxserve.config import Config
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.formats.peft import adapter_digest, write_adapter
from jaxserve.protocol.messages import AdapterRef, SequenceRecord
from jaxserve.types import FinishReason, SamplingParams, TokenLogprobs, Vocabulary
from tests.fakes import grammar
from tests.fakes.embedder import vector_of
from tests.fakes.engine import GROUPS, MODULES, fake_parts, oracle
from tests.fakes.executor import ECHO, oracle_logprob
from tests.lora.adapters import random_adapter


@dataclass(kw_only=True)
class Probe:
    """A request that is held against the world's oracle.

    Attributes:
        cut: choice → tokens after which the client ends it.
        cut_reason: with which word.
        index: among the world's probes.
        adapter: a LoRA adapter; None for the base.
    """

    world: World
    prompt: list[int]
    sampling: SamplingParams
    index: int = 0
    n: int = 1
    priority: int = 0
    cut: dict[int, int] = field(default_factory=dict)
    cut_reason: FinishReason = FinishReason.CANCELLED
    adapter: AdapterRef | None = None

    @property
    def adapter_key(self) -> str | None:
        """What the oracle wants to know of it."""
        return self.adapter.key if self.adapter is not None else None

    def shape(self, **sampling: object) -> None:
        """Changes how tokens are sampled."""
        self.sampling = replace(self.sampling, **sampling)

    def expected(self, choice: int) -> list[int]:
        """The tokens that it must bring, if nobody ends it early."""
        return self.world.expected(self.prompt, self.sampling, choice, self.adapter_key)


@dataclass
class Outcome:
    """What came of one choice."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    record: SequenceRecord | None = None


class World(Protocol):
    """An engine that trials can be run on.

    Attributes:
        settings: a small engine, that fills up and chunks.
    """

    settings: tuple[str, ...]

    def load(self, config: Config, progress: Progressing) -> Parts:
        """What one life of the engine is built from; the life before has ended."""
        ...

    def vocabulary(self) -> Vocabulary:
        """What its tokens say."""
        ...

    def probes(self) -> list[Probe]:
        """Three requests, as yet plain."""
        ...

    def expected(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None = None
    ) -> list[int]:
        """The tokens of a request that is alone."""
        ...

    def num_certain(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None = None
    ) -> int:
        """How many of them, the first ones, every engine must bring; more than all: its end too."""
        ...

    def adapter(self, index: int) -> AdapterRef | None:
        """The adapter of the probe in this place: the first two have one each."""
        ...

    def echo(self, probe: Probe) -> None:
        """Has a probe's output repeat what came before, so that drafts of it are right."""
        ...

    def check_logprobs(self, probe: Probe, outcome: Outcome) -> None:
        """Log-probabilities are those of the tokens beside them."""
        ...

    def check_vector(self, text: list[int], vector: Float32[np.ndarray, "D"]) -> None:
        """It is the mean of the text's states, as of a text that is alone."""
        ...


@functools.cache
def random_adapters() -> list[AdapterRef]:
    """Two that the fake takes, on the disk."""
    directory = Path(tempfile.mkdtemp(prefix="jaxserve-test-adapters-"))
    atexit.register(shutil.rmtree, directory)
    refs = []
    for seed in range(2):
        path = directory / str(seed)
        modules = {name.replace("*", "0"): sizes for name, sizes in MODULES.items()}
        write_adapter(path, random_adapter(modules, 4, seed))
        refs.append(AdapterRef(key=adapter_digest(path), path=str(path)))
    return refs


class FakeWorld:
    """The fake engine: logits are a function of the history."""

    settings = (
        "cache.page_size=4",
        "cache.num_pages=200",
        "scheduler.max_rows=6",
        "scheduler.max_step_tokens=64",
        "scheduler.decode_steps=1",
    )

    def load(self, config: Config, progress: Progressing) -> Parts:
        """See `World`."""
        return fake_parts(config, progress)

    def vocabulary(self) -> Vocabulary:
        """See `World`."""
        return grammar.vocabulary()

    def probes(self) -> list[Probe]:
        """See `World`."""
        return [
            Probe(
                world=self,
                index=index,
                prompt=[7 + index, *range(20, 40 + 5 * index)],
                sampling=SamplingParams(max_tokens=14 + index, seed=index, ignore_eos=True),
            )
            for index in range(3)
        ]

    def expected(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None = None
    ) -> list[int]:
        """See `World`."""
        return oracle(prompt, sampling, choice, adapter)

    def num_certain(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None = None
    ) -> int:
        """See `World`."""
        return sampling.max_tokens + 1

    def adapter(self, index: int) -> AdapterRef | None:
        """See `World`."""
        return random_adapters()[index] if index < 2 else None

    def echo(self, probe: Probe) -> None:
        """See `World`."""
        probe.shape(top_k=ECHO, max_tokens=probe.sampling.max_tokens + 30)

    def check_logprobs(self, probe: Probe, outcome: Outcome) -> None:
        """See `World`."""
        if probe.sampling.repetition_penalty != 1:
            return  # the fake mixes what was seen into the hash, then
        for place, entry in enumerate(outcome.logprobs):
            history = [*probe.prompt, *outcome.token_ids[:place]]
            expected = oracle_logprob(history, entry.token_id, GROUPS, probe.adapter_key)
            assert entry.logprob == expected

    def check_vector(self, text: list[int], vector: Float32[np.ndarray, "D"]) -> None:
        """See `World`."""
        np.testing.assert_allclose(vector, vector_of(text), rtol=1e-6)
