"""Perplexity of a served model on a stored text, for what quantization may cost.

The text is the opening of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865), which is in the
public domain. It goes through the real engine, as one prompt whose log-probabilities are asked for.
"""

from __future__ import annotations

import math
from pathlib import Path

from jaxserve.config import Config
from jaxserve.offline import LLM

TEXT = Path(__file__).parent / "data" / "alice.txt"


def perplexity(config: Config) -> float:
    """exp of the mean negative log-probability of the text's tokens after the first."""
    with LLM(config=config) as llm:
        (answer,) = llm.generate(
            [TEXT.read_text(encoding="utf-8")], max_tokens=1, prompt_logprobs=0
        )
    logprobs = [entry.logprob for entry in answer.prompt_logprobs]
    return math.exp(-sum(logprobs) / len(logprobs))
