"""One host of several, without a front end; run as a program.

    python -m tests.device.several once|forever MODEL LOCAL_DEVICES SETTING ...

Host 0 serves what `tests.device.sharded` serves, or with adapters `tests.device.sharded_lora`, and
prints what came, once or again and again; the others follow. (Gloo writes to stdout too: what
counts are the lines that begin with a brace.)
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jaxserve.config import Config
from jaxserve.engine.load import load_parts
from jaxserve.engine.parts import Parts
from jaxserve.engine.process import follow
from jaxserve.protocol.thread import ThreadRoad
from jaxserve.settings import load_config
from tests.device import sharded, sharded_lora


def main(how_often: str, model: str, local_devices: str, *settings: str) -> int:
    """Serves, or follows; returns the exit status."""
    logging.basicConfig(level="INFO", stream=sys.stderr)
    jax.config.update("jax_num_cpu_devices", int(local_devices))
    config = load_config(None, [f"model.path={model}", *settings], {})
    if config.parallel.host:
        return follow(config, ThreadRoad().server, load_parts)
    parts = load_parts(config, lambda *_: None)
    while True:
        print("\n" + json.dumps(serve(config, parts)), flush=True)
        if how_often == "once":
            break
    if parts.hosts is not None:
        parts.hosts.close("it was told to end")
    return 0


def serve(config: Config, parts: Parts) -> dict[str, Any]:
    """What each request brought; adapters are written and loaded only now."""
    if not config.lora.enabled:
        return sharded.serve(config, parts)
    with TemporaryDirectory() as directory:
        return sharded_lora.serve(config, parts, Path(directory))


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # JAX's exit handler would wait for the other hosts
