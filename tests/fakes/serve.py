"""`serve` over the fake engine and worker, as a process: `python -m tests.fakes.serve key=value…`.

Settings are as after `--set`; `engine=MODULE` chooses another fake engine, `observer=MODULE` a fake
observer.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jaxserve.http.serve import serve
from jaxserve.settings import load_config


def main(arguments: list[str]) -> int:
    """Serves; returns the exit status."""
    engine, observer = "tests.fakes.engine", "jaxserve.http.observer.process"
    settings = []
    for argument in arguments:
        if argument.startswith("engine="):
            engine = argument.removeprefix("engine=")
        elif argument.startswith("observer="):
            observer = argument.removeprefix("observer=")
        else:
            settings.append(argument)
    return serve(
        load_config(settings=settings, environ={}),
        resolve=lambda model, weights, progress: Path(model.path),
        engine_module=engine,
        worker_module="tests.fakes.http_worker",
        observer_module=observer,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
