"""`serve` over the fake engine and worker, as a process: `python -m tests.fakes.serve key=value…`.

Settings are as after `--set`; `engine=MODULE` chooses another fake engine.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jaxserve.http.serve import serve
from jaxserve.settings import load_config


def main(arguments: list[str]) -> int:
    """Serves; returns the exit status."""
    engine = "tests.fakes.engine"
    settings = []
    for argument in arguments:
        if argument.startswith("engine="):
            engine = argument.removeprefix("engine=")
        else:
            settings.append(argument)
    return serve(
        load_config(settings=settings, environ={}),
        resolve=lambda model, weights, progress: Path(model.path),
        engine_module=engine,
        worker_module="tests.fakes.http_worker",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
