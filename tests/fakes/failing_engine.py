"""An engine process that fails: at loading, or in its twentieth step."""

from __future__ import annotations

import sys

from jaxserve.config import Config
from jaxserve.engine import process
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.errors import WeightsError
from tests.fakes import engine
from tests.fakes.executor import FakeExecutor


def failing_parts(config: Config, progress: Progressing) -> Parts:
    """A fake whose device fails, unless the model's path does already."""
    if config.model.path.startswith("/no/"):
        raise WeightsError(f"{config.model.path} does not exist")
    parts = engine.fake_parts(config, progress)
    assert isinstance(parts.executor, FakeExecutor)
    parts.executor.fail_at = 20
    return parts


if __name__ == "__main__":
    sys.exit(process.main(failing_parts))
