"""`jaxserve convert`: any model that can be served, written as an Orbax checkpoint with its text."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxserve.config import Config
from jaxserve.text.save import save_text
from jaxserve.weights.convert import convert
from jaxserve.weights.sources import resolve


def convert_model(config: Config, target: Path, dtype: str) -> int:
    """Writes weights, configuration, tokenizer and chat template to a new directory.

    Raises:
        WeightsError: the source cannot be read, or the target exists.
    """
    source = resolve(config.model, config.weights)
    convert(source, target, dtype)
    save_text(source, target)
    sys.stdout.write(f"{target}\n")
    return 0
