"""The features that trials combine. A new feature of the engine joins `FEATURES`."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from jaxserve.structured.grammars import Tag, regex, tagged
from jaxserve.types import EmbeddingParams, FinishReason
from tests.fakes.executor import FakeExecutor
from tests.interplay.features import Feature, Trial
from tests.interplay.worlds import Probe

CALL = Tag(
    begin="@",
    schema={
        "type": "object",
        "properties": {"z": {"type": "string", "minLength": 40}},
        "required": ["z"],
        "additionalProperties": False,
    },
    end="@",
)
#: Features of which a probe has one.
GRAMMARS = ("grammar", "tool", "watched call")


def _choices(probe: Probe) -> None:
    probe.n = 3


def _logprobs(probe: Probe) -> None:
    probe.shape(logprobs=2)


def _penalties(probe: Probe) -> None:
    probe.shape(repetition_penalty=1.2, presence_penalty=0.5, bad_words=((3, 4),))


def _stop_token(probe: Probe) -> None:
    """Stops at its ninth token, which its own run without a stop token tells."""
    token = probe.expected(0)[8]
    probe.shape(stop_token_ids=(token,))


def _stop_string(probe: Probe) -> None:
    """The front end ends the first choice when it has matched one."""
    probe.cut, probe.cut_reason = {0: 5}, FinishReason.STOP


def _cancel(probe: Probe) -> None:
    probe.cut = {probe.n - 1: 3}


def _seed(probe: Probe) -> None:
    probe.shape(seed=2**63 + len(probe.prompt), temperature=0.7)


def _echo(probe: Probe) -> None:
    probe.world.echo(probe)


def _draft_alone(trial: Trial) -> None:
    """Drafts for sure; the probes do when few others run beside them."""
    probe = trial.world.probes()[0]
    trial.world.echo(probe)
    probe.shape(max_tokens=60)
    trial.finish(trial.client.submit(probe.prompt, probe.sampling))


def _drafted_if_it_may(trial: Trial) -> bool:
    """Beside batch invariance nothing is drafted."""
    settings = [setting for feature in trial.features for setting in feature.settings]
    may_draft = "engine.batch_invariant=true" not in settings
    return any(record.drafted_tokens for record in trial.records) == may_draft


def _prompts_first(trial: Trial) -> None:
    """Each probe's beginning has been computed for another request."""
    for probe in trial.probes:
        sampling = replace(probe.sampling, max_tokens=3, prompt_logprobs=None, stop_token_ids=())
        prompt = [*probe.prompt[:-2], 1]
        trial.finish(trial.client.submit(prompt, sampling, adapter=probe.adapter))


def _was_found(trial: Trial) -> bool:
    """Where pages run out they may have been taken before: tests/scheduler/test_prefix_runs.py."""
    if trial.engine.scheduler.prefix_lookup_tokens == 0:  # none where output is batch-invariant
        return any("engine.batch_invariant=true" in f.settings for f in trial.features)
    if len(trial.engines) > 1:  # the last one's cache began empty
        found = any(engine.scheduler.prefix_hit_tokens for engine in trial.engines)
        return found or any(record.preemptions for record in trial.records)
    found = any(outcomes[0].record.cached_tokens >= 16 for outcomes in trial.outcomes)
    return found or any(record.preemptions for record in trial.records)


def _grammar(probe: Probe) -> None:
    """Some tokens must come, others may; it does not end before the probe does."""
    probe.shape(grammar=regex("(k=[0-9]{9};){20}"), ignore_eos=False)


def _tool(probe: Probe) -> None:
    """A call must come, and nothing else. What must come of it is short: a stop token may not be
    among that."""
    probe.shape(grammar=tagged([CALL], text=False, required=True), ignore_eos=False)


def _watched(probe: Probe) -> None:
    """Free text, in which a call that is begun is carried through (`tool_choice: auto`)."""
    probe.shape(grammar=tagged([CALL]), ignore_eos=False)


def _was_masked(trial: Trial) -> bool:
    """The output is what the grammar says, and the fake device knows that it got masks."""
    words = trial.world.vocabulary().tokens
    said = [b"".join(words[token] for token in own[0].token_ids) for own in trial.outcomes]
    assert trial.probes[0].sampling.grammar is not None
    if trial.probes[0].sampling.grammar.kind == "regex":
        assert all(re.match(rb"(k=[0-9]{9};)*(k(=[0-9]*)?)?$", text) for text in said), said
    devices = [e.executor for e in trial.engines if isinstance(e.executor, FakeExecutor)]
    return not devices or any(device.num_masked for device in devices)


def _urgent(probe: Probe) -> None:
    probe.priority = -1


def _adapter(probe: Probe) -> None:
    """Two of the probes have adapters, for which there is one slot."""
    probe.adapter = probe.world.adapter(probe.index)


def _embed(trial: Trial) -> None:
    """Texts that wait and run beside everything else."""
    texts = [[1 + place, *range(3, 3 + place % 9)] for place in range(40)]
    params = EmbeddingParams(pooling="mean", normalize=True)
    trial.embedding = texts, trial.client.embed(texts, params)


def _read_vectors(trial: Trial) -> None:
    assert trial.embedding is not None
    for event in trial.embedding[1]:
        assert event.finished is not None and event.choice not in trial.vectors
        trial.vectors[event.choice] = event.finished.vector
        trial.text_records.append(event.finished.record)


def _were_embedded(trial: Trial) -> bool:
    assert trial.embedding is not None
    for place, text in enumerate(trial.embedding[0]):
        vector = np.frombuffer(trial.vectors.pop(place), np.float32)
        trial.world.check_vector(text, vector)
    return not trial.vectors


def _was_set_back(trial: Trial, then: str) -> bool:
    """And what became of it: a count of its record. A life that ends takes its records along."""
    if len(trial.engines) > 1 and any(e.scheduler.num_preemptions for e in trial.engines):
        return True
    return any(record.preemptions and getattr(record, then) for record in trial.records)


FEATURES = (
    Feature(
        name="adapters",
        settings=("lora.enabled=true", "lora.classes=4x1"),
        shape=_adapter,
        acted=lambda trial: trial.engine.scheduler.num_adapter_joins > 0,
    ),
    Feature(name="choices", shape=_choices),
    Feature(
        name="speculation",
        settings=("scheduler.draft_tokens=5",),
        shape=_echo,
        before=_draft_alone,
        acted=_drafted_if_it_may,
    ),
    Feature(name="grammar", shape=_grammar, acted=_was_masked),
    Feature(name="tool", shape=_tool, acted=_was_masked),
    Feature(name="watched call", shape=_watched, acted=_was_masked),
    Feature(name="logprobs", shape=_logprobs),
    Feature(name="penalties", shape=_penalties),
    Feature(name="seed", shape=_seed),
    Feature(name="stop token", shape=_stop_token),
    Feature(name="stop string", shape=_stop_string),
    Feature(name="cancel", shape=_cancel),
    Feature(name="chunked prefill", settings=("scheduler.max_step_tokens=8",)),
    Feature(name="several decode steps", settings=("scheduler.decode_steps=4",)),
    Feature(name="prefix hit", before=_prompts_first, acted=_was_found),
    Feature(
        name="embedding",
        settings=("embeddings.model=fake", "embeddings.shared_embed_tokens=16"),
        before=_embed,
        after=_read_vectors,
        acted=_were_embedded,
    ),
    Feature(
        name="replay",
        lives=3,
        # What was cancelled ends with the engine, or before it does.
        acted=lambda trial: any(r.replays for r in trial.records) or bool(trial.probes[0].cut),
    ),
)
#: What becomes of a sequence that is set back: one or the other.
PREEMPTION = (
    Feature(
        name="batch invariant",
        settings=("engine.batch_invariant=true",),
        acted=lambda trial: trial.num_mixed == 0,
    ),
    Feature(
        name="recompute",
        settings=("cache.num_pages=31", "cache.preemption=recompute"),
        shape=_urgent,
        background=3,
        acted=lambda trial: _was_set_back(trial, "recomputed_tokens"),
    ),
    Feature(
        name="swap",
        settings=("cache.num_pages=31", "cache.preemption=swap", "cache.host_bytes=1000000"),
        shape=_urgent,
        background=3,
        acted=lambda trial: _was_set_back(trial, "swapped_tokens"),
    ),
)
