"""One host of several, without a front end; run as a program.

    python -m tests.device.several MODEL COORDINATOR HOST HOSTS LOCAL_DEVICES SETTING ...

Host 0 serves what `tests.device.sharded` serves and prints what came; the others follow. With
COORDINATOR "none" it is the only one.
"""

from __future__ import annotations

import json
import logging
import os
import sys

import jax

from jaxserve.config import load_config
from jaxserve.engine.load import load_parts
from jaxserve.engine.process import follow
from tests.device.sharded import SETTINGS, serve


def main(model: str, coordinator: str, host: str, hosts: str, local: str, *settings: str) -> None:
    """Serves, or follows."""
    logging.basicConfig(level="INFO", stream=sys.stderr)
    jax.config.update("jax_num_cpu_devices", int(local))
    place = [f"parallel.coordinator={coordinator}", f"parallel.host={host}"]
    place += [f"parallel.hosts={hosts}"]
    common = [f"model.path={model}", *SETTINGS, *([] if coordinator == "none" else place)]
    config = load_config(None, [*common, *settings], {})
    if config.parallel.host:
        os._exit(follow(config, load_parts))
    parts = load_parts(config, lambda *_: None)
    print(json.dumps(serve(config, parts)), flush=True)
    if parts.hosts is not None:
        parts.hosts.close("it was told to end")
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
