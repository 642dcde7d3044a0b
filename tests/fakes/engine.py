"""A whole engine over the fake device: in a thread, or as a process of its own.

`EngineThread(config, fake_parts)` for tests in one process; `EngineProcess.start(config,
module="tests.fakes.engine")` for a real child over ZeroMQ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jaxserve.config import Config, LoraConfig
from jaxserve.engine import process
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.formats.peft import read_adapter
from jaxserve.lora.host import HostAdapters, Ready
from jaxserve.types import AdapterBase, CacheGroup, ModelInfo, SamplingParams
from tests.fakes import executor
from tests.fakes.batch import ExactBatch
from tests.fakes.embedder import fake_embedding
from tests.fakes.executor import FULL, FakeExecutor

VOCAB_SIZE = 512
EOS = 2
MAX_CONTEXT = 4096
#: What a page of the fake takes of `cache.host_bytes`.
PAGE_BYTES = 1024
#: What an adapter of the fake takes of `lora.host_bytes`, and the module that it may change.
ADAPTER_BYTES = 1024
MODULES = {"model.layers.*.self_attn.q_proj": (8, 8)}
GROUPS: tuple[CacheGroup, ...] = (FULL,)


def fake_parts(config: Config, progress: Progressing) -> Parts:
    """A loaded fake; `model.max_context` and `cache.num_pages` are honoured."""
    max_context = config.model.max_context or MAX_CONTEXT
    progress("loading", 1, 1)
    num_pages = config.cache.num_pages or 1 + 64 * max_context // config.cache.page_size
    host_pages = (max(config.cache.host_bytes, 0) // PAGE_BYTES,)
    device = FakeExecutor(
        GROUPS,
        page_size=config.cache.page_size,
        num_pages=(num_pages,),
        max_rows=config.scheduler.max_rows,
        vocab_size=VOCAB_SIZE,
        max_context=max_context,
        host_pages=host_pages,
    )
    slots, adapters, base = _adapters(config.lora) if config.lora.enabled else ((), None, None)
    for done in range(3):
        progress("compiling", done + 1, 3)
    return Parts(
        model=ModelInfo(
            name=config.model.served_name or "fake",
            max_context=max_context,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            cache_groups=GROUPS,
            adapters=base,
        ),
        batch=ExactBatch(),
        executor=device,
        page_size=config.cache.page_size,
        num_pages=(num_pages,),
        host_pages=host_pages,
        embedding=fake_embedding(config) if config.embeddings.model else None,
        adapter_slots=slots,
        adapters=adapters,
    )


def _adapters(lora: LoraConfig) -> tuple[tuple[int, ...], RequestAdapters, AdapterBase]:
    """Slots, those of live requests, and the base: one layer with one module of 8 by 8."""
    classes = [tuple(map(int, text.split("x"))) for text in lora.classes]

    def load(key: str, path: Path) -> Ready:
        rank = read_adapter(path, max_rank=classes[-1][0]).rank
        index = next(i for i, (most, _) in enumerate(classes) if most >= rank)
        return Ready(rank_class=index, arrays=key, num_bytes=ADAPTER_BYTES)

    host = HostAdapters(
        load, lambda _: ADAPTER_BYTES, largest_bytes=ADAPTER_BYTES, max_bytes=lora.host_bytes
    )
    base = AdapterBase(modules=MODULES, num_layers=1, table="", max_rank=classes[-1][0])
    return tuple(count for _, count in classes), RequestAdapters(host), base


def oracle(
    prompt: list[int], sampling: SamplingParams, choice: int = 0, adapter: str | None = None
) -> list[int]:
    """The tokens that this engine emits."""
    allowed = None
    if sampling.grammar is not None:
        from tests.fakes.grammar import allowed_by

        allowed = allowed_by(sampling.grammar, sampling.stop_token_ids)
    return executor.oracle(
        prompt,
        sampling,
        choice,
        groups=GROUPS,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS,),
        allowed=allowed,
        adapter=adapter,
    )


if __name__ == "__main__":
    sys.exit(process.main(fake_parts))
