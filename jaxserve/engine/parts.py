"""What an engine is built from: a loaded model behind a batch builder and an executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve.config import Config
from jaxserve.device.embed_step import EmbedBuckets
from jaxserve.device.hosts import Hosts
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.attribution import WorkRates
from jaxserve.engine.turn import Batch, Embedder, Executor
from jaxserve.types import DeviceInfo, EmbeddingInfo, ModelInfo

#: Told how far start-up is: phase ("loading" or "compiling"), done, total.
Progressing = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingParts:
    """A model that embeds, loaded.

    Attributes:
        embedder: has its programs once it was warmed up.
        buckets: which texts fit one step.
    """

    model: EmbeddingInfo
    embedder: Embedder
    buckets: EmbedBuckets


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model that is loaded, with all its step programs compiled.

    Attributes:
        page_size: tokens a page.
        num_pages: pages of each cache group's pool, page 0 included, in each copy of the model.
        host_pages: of each cache group, that each copy may have in the host's memory.
        copies: of the model.
        adapter_slots: of each class of LoRA adapters, in each copy; none where there are none.
        adapters: those of live requests; None where there are none.
        hosts: that share it, where there are several.
        work: what rows of a step cost beside each other.
        embedding: the model that embeds, where there is one.
        follow: on another host than number 0, makes the device calls that host 0 broadcasts, for
            as long as it lives.
        device: what it runs on; None where that is nothing to tell.
    """

    model: ModelInfo
    batch: Batch
    executor: Executor
    page_size: int
    num_pages: tuple[int, ...]
    host_pages: tuple[int, ...] = ()
    copies: int = 1
    adapter_slots: tuple[int, ...] = ()
    adapters: RequestAdapters | None = None
    hosts: Hosts | None = None
    follow: Callable[[], None] | None = None
    work: WorkRates = field(default_factory=WorkRates)
    embedding: EmbeddingParts | None = None
    device: DeviceInfo | None = None


#: Loads and compiles what a configuration asks for.
Factory = Callable[[Config, Progressing], Parts]
