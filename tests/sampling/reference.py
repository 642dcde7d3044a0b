"""Sampling in float64 numpy, written for reading: what the device's sampler is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.types import SamplingParams

RULED_OUT = -1e30


@dataclass(kw_only=True)
class Row:
    """One sequence about to get its next token."""

    logits: np.ndarray
    sampling: SamplingParams
    prompt: Sequence[int] = (0,)
    output: Sequence[int] = ()
    choice: int = 0
    eos_token_ids: Sequence[int] = field(default=())


def adjusted(row: Row) -> np.ndarray:
    """Logits after penalties, biases and masks."""
    sampling = row.sampling
    logits = row.logits.astype(np.float64)
    counts = np.bincount(np.asarray(row.output, int), minlength=logits.size)
    seen = counts.copy()
    seen[list(row.prompt)] += 1
    penalty = sampling.repetition_penalty
    repeated = np.where(logits > 0, logits / penalty, logits * penalty)
    logits = np.where(seen > 0, repeated, logits)
    logits -= sampling.frequency_penalty * counts
    logits -= sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    history = [*row.prompt, *row.output]
    for word in sampling.bad_words:
        prefix = list(word[:-1])
        if len(prefix) <= len(history) and history[len(history) - len(prefix) :] == prefix:
            logits[word[-1]] = RULED_OUT
    if len(row.output) < sampling.min_tokens:
        logits[[*row.eos_token_ids, *sampling.stop_token_ids]] = RULED_OUT
    if sampling.allowed_token_ids is not None:
        forbidden = np.ones(logits.size, bool)
        forbidden[list(sampling.allowed_token_ids)] = False
        logits[forbidden] = -np.inf
    return logits


def kept(logits: np.ndarray, sampling: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Which tokens min_p, top_k and top_p leave; `slack` widens (or narrows) the borders.

    Tokens that tie with the last one kept are kept.
    """
    relative = np.exp((logits - logits.max()) / max(sampling.temperature, 1e-30))
    keep = relative >= sampling.min_p * (1 - slack)
    if 0 < sampling.top_k < logits.size:
        keep &= logits >= np.sort(logits)[-sampling.top_k]
    if sampling.top_p < 1:
        left = np.where(keep, relative, 0)
        above = np.array([left[left > one * (1 + slack)].sum() for one in left])
        keep &= (above < sampling.top_p * left.sum() * (1 + slack)) | (left == left.max())
    return keep


def distribution(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """The probabilities with which each token is drawn."""
    relative = np.exp((logits - logits.max()) / max(sampling.temperature, 1e-30))
    weights = np.where(kept(logits, sampling), relative, 0)
    return weights / weights.sum()
