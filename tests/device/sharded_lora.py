"""As `tests.device.sharded`, with adapters: the same requests on a mesh and on one device.

python -m tests.device.sharded_lora MODEL DATA EXPERT MODEL_AXIS DIRECTORY [SETTING ...]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.config import Config
from jaxserve.engine.parts import Parts
from jaxserve.engine.process import build_engine
from jaxserve.formats.peft import adapter_digest, write_adapter
from jaxserve.protocol.messages import AdapterRef, GetStatus, UseVocabulary
from tests.device.sharded import BYTES, PROMPT_LENS, Pocket, answers, on_both, request
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
    while engine._lobby.num_held:  # turns the loop meanwhile, as the engine does
        engine.receive(0.0)
        engine.step()
    found = answers(engine, pocket)
    found["compiles"] = parts.executor.compiles_after_warmup
    found["joins"] = engine.status().adapter_joins
    return found


if __name__ == "__main__":
    words, place, settings = sys.argv[1:5], Path(sys.argv[5]), sys.argv[6:]
    on_both(words, [*LORA, *settings], lambda config, parts: serve(config, parts, place))
