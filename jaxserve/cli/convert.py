"""`jaxserve convert`: a model that can be served, written as an Orbax checkpoint with its text."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from jaxserve.config import Config
from jaxserve.text.save import save_text
from jaxserve.weights.convert import convert
from jaxserve.weights.sources import resolve


def convert_model(config: Config, target: Path, dtype: str) -> int:
    """Writes weights, configuration, tokenizer and chat template to a new directory.

    Raises:
        WeightsError: the source cannot be read, or the target exists or cannot be written.
    """
    model = config.model
    source = resolve(model, config.weights)

    def save(directory: Path) -> None:
        save_text(source, directory, tokenizer=model.tokenizer, chat_template=model.chat_template)

    with tqdm(unit="tensor", disable=None) as bar:

        def show(phase: str, done: int, total: int) -> None:
            bar.set_description(phase)
            bar.total, bar.n = total, done
            bar.refresh()

        convert(source, target, dtype, format=model.format, finish=save, progress=show)
    sys.stdout.write(f"{target}\n")
    return 0
