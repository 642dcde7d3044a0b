"""As `tests.device.sharded`, with adapters: the same requests on a mesh and on one device.

python -m tests.device.sharded_lora MODEL DATA EXPERT MODEL_AXIS DIRECTORY [SETTING ...]
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import Config
from jaxserve.engine import load
from jaxserve.engine.parts import Parts
from jaxserve.engine.process import build_engine
from jaxserve.formats.peft import adapter_digest, write_adapter
from jaxserve.protocol.messages import AdapterRef, GetStatus, UseVocabulary
from jaxserve.settings import load_config
from tests.device.sharded import BYTES, NUM_DEVICES, PROMPT_LENS, SETTINGS, Pocket, answers, request
from tests.lora.adapters import all_but, random_adapter

RANKS = (2, 4, 7, 3)
LORA = ("lora.enabled=true", "lora.classes=4x2,8x1", "lora.vocabulary=true")


def adapters(targets: dict[str, tuple[int, int]], directory: Path) -> list[AdapterRef]:
    """On the disk; half of them with the table and the head."""
    refs = []
    for seed, rank in enumerate(RANKS):
        wanted = all_but("embed_tokens", "lm_head") if seed % 2 else all_but("k_proj")
        path = directory / str(seed)
        write_adapter(path, random_adapter(targets, rank, seed, wanted=wanted, scale=0.2))
        refs.append(AdapterRef(key=adapter_digest(path), path=str(path)))
    return refs


def serve(config: Config, parts: Parts, directory: Path) -> dict[str, Any]:
    """All requests at once; every fifth without an adapter."""
    assert parts.model.adapters is not None
    refs = [*adapters(parts.model.adapters.targets(), directory), None]
    pocket: Any = Pocket()
    engine = build_engine(config, pocket, parts)
    engine.handle("client", UseVocabulary(vocabulary=BYTES))
    for number in range(len(PROMPT_LENS)):
        message = request(number, parts.model.vocab_size)
        engine.handle("client", replace(message, adapter=refs[number % len(refs)]))
    engine.handle("client", GetStatus(stats=False))
    while (
        engine._adapters.num_held or engine._grammars.num_held
    ):  # turns the loop meanwhile, as the engine does
        engine.receive(0.0)
        engine.step()
    found = answers(engine, pocket)
    found["compiles"] = parts.executor.compiles_after_warmup
    found["joins"] = engine.status().adapter_joins
    return found


def main(model: str, data: str, expert: str, model_axis: str, place: str, *settings: str) -> None:
    """Serves on both and prints what came."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    common = [f"model.path={model}", *SETTINGS, *LORA, *settings]
    mesh = [f"parallel.data={data}", f"parallel.expert={expert}", f"parallel.model={model_axis}"]
    devices = jax.devices()
    found = {}
    for name, some, parallel in (("mesh", devices, mesh), ("one", devices[:1], [])):
        load.devices = lambda some=some: some
        config = load_config(None, [*common, *parallel], {})
        parts = load.load_parts(config, lambda *_: None)
        found[name] = serve(config, parts, Path(place))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
