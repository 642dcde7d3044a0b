"""A whole engine with a small real model: requests with adapters, each against its merged model."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.config import (
    CacheConfig,
    Config,
    KernelsConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
)
from jaxserve.device.sharding import make_mesh
from jaxserve.engine.load import load_parts
from jaxserve.engine.lora import rank_classes, with_lora_kernel
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ConfigError, InvalidAdapter, InvalidRequest
from jaxserve.formats.peft import Adapter, adapter_digest, write_adapter
from jaxserve.models.adapters import AdapterLayout
from jaxserve.models.options import ModelOptions
from jaxserve.protocol.client import SyncClient
from jaxserve.protocol.messages import AdapterRef, UseVocabulary
from jaxserve.structured.grammars import regex
from jaxserve.types import SamplingParams, Vocabulary
from jaxserve.weights.load import load_model
from pallas_kernels import native
from tests.device.rig import next_tokens
from tests.lora.adapters import all_but, merge, random_adapter
from tests.models.loading import ORACLE, load_tiny

CASE = "llama3"
OPTIONS = ModelOptions(layers="scanned", matmul="cpu", attention="cpu")
NUM_TOKENS = 6
#: More than there are slots, of both classes.
RANKS = (2, 3, 4, 4, 6, 8, 1, 16)


def config() -> Config:
    """Few programs, few pages, few slots."""
    return Config(
        model=ModelConfig(path=str(ORACLE / CASE), max_context=128),
        cache=CacheConfig(page_size=4, num_pages=60, host_bytes=0),
        scheduler=SchedulerConfig(
            max_rows=4, max_step_tokens=16, decode_steps=2, draft_tokens=2, draft_rows=2
        ),
        kernels=KernelsConfig(layers="scanned"),
        lora=LoraConfig(enabled=True, classes=("4x2", "16x1"), vocabulary=True),
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineThread]:
    """One for all tests."""
    with EngineThread(config(), load_parts) as thread:
        yield thread


@pytest.fixture
def client(engine: EngineThread) -> Iterator[SyncClient]:
    """A client of it."""
    own = SyncClient(engine.connect())
    own.start()
    own.ready()
    yield own
    own.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Adapter, AdapterRef]]:
    """Written to the disk, with their names by content."""
    directory = tmp_path_factory.mktemp("adapters")
    targets = AdapterLayout(load_tiny(CASE, OPTIONS), vocabulary=True).targets
    made = []
    for seed, rank in enumerate(RANKS):
        wanted = all_but("embed_tokens", "lm_head") if seed % 2 else all_but("v_proj")
        adapter = random_adapter(targets, rank, seed, wanted=wanted, scale=0.3)
        path = directory / str(seed)
        write_adapter(path, adapter)
        made.append((adapter, AdapterRef(key=adapter_digest(path), path=str(path))))
    return made


@pytest.fixture(scope="module")
def expected(
    adapters: list[tuple[Adapter, AdapterRef]], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """Greedy tokens of each merged model, and behind them the base's."""
    directory = tmp_path_factory.mktemp("merged")
    models = [
        load_model(merge(ORACLE / CASE, adapter, directory / str(i)), options=OPTIONS)
        for i, (adapter, _) in enumerate(adapters)
    ]
    return [next_tokens(m, prompt(), NUM_TOKENS) for m in (*models, load_tiny(CASE, OPTIONS))]


def prompt() -> list[int]:
    """All requests begin alike, so that a page of another adapter would be found if it could."""
    return np.load(ORACLE / CASE / "reference.npz")["tokens"].tolist()[:11]


def greedy(num_tokens: int = NUM_TOKENS) -> SamplingParams:
    """The likeliest token, always."""
    return SamplingParams(max_tokens=num_tokens, seed=1, temperature=0.0, ignore_eos=True)


def tokens_of(stream) -> list[int]:
    """All that comes."""
    return [token for event in stream for token in event.token_ids]


def test_each_request_has_its_own_adapter(
    client: SyncClient, adapters: list[tuple[Adapter, AdapterRef]], expected: list[list[int]]
) -> None:
    """More adapters than slots, mixed with the base; twice, then with cached prefixes."""
    before = client.get_status().compiles_after_warmup
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for _ in range(2):
        refs: list[AdapterRef | None] = [ref for _, ref in adapters]
        refs.insert(3, None)
        wanted = [*expected[:3], expected[-1], *expected[3:-1]]
        streams = [client.submit(prompt(), greedy(), adapter=ref) for ref in refs]
        assert [tokens_of(stream) for stream in streams] == wanted
    status = client.get_status()
    assert status.compiles_after_warmup == before
    assert status.adapter_slots == status.adapters_held == 3
    assert status.adapter_joins == 2 * len(RANKS)
    assert status.adapter_loads == len(RANKS)
    assert status.prefix_hit_tokens > 0
    assert status.waiting == status.running == 0


def test_choices_and_prompt_logprobs(
    client: SyncClient, adapters: list[tuple[Adapter, AdapterRef]], expected: list[list[int]]
) -> None:
    """Of one request with an adapter, beside one without."""
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS, seed=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0
    )
    ref = adapters[2][1]
    stream = client.submit(prompt(), sampling, n=2, adapter=ref)
    base = client.submit(prompt(), sampling)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    logprobs = []
    for event in stream:
        tokens[event.choice] += event.token_ids
        logprobs += event.prompt_logprobs
    assert tokens[0] == tokens[1] == expected[2]
    of_base = [entry for event in base for entry in event.prompt_logprobs]
    assert len(logprobs) == len(of_base) == len(prompt()) - 1
    assert any(abs(a.logprob - b.logprob) > 0.01 for a, b in zip(logprobs, of_base, strict=True))


def test_grammars_with_deltas_of_the_head(
    client: SyncClient, adapters: list[tuple[Adapter, AdapterRef]], tmp_path: Path
) -> None:
    """Masked rows have their adapters' logits, also beside other rows and where drafts are."""
    spec = load_tiny(CASE, OPTIONS).spec
    size, ends = spec.vocab_size, spec.eos_token_ids
    words = tuple(b"%s%04d" % (b"ab"[t % 3 > 0 :][:1], t) for t in range(size))
    client.send(UseVocabulary(vocabulary=Vocabulary(tokens=words, special_token_ids=())))
    grammar = regex(r"(a[0-9]{4})*")
    sampling = dataclasses.replace(greedy(), ignore_eos=False, grammar=grammar)
    rows: list[tuple[AdapterRef | None, SamplingParams]] = [
        (None, sampling), *((ref, sampling) for _, ref in adapters[:4]), (None, greedy())
    ]  # fmt: skip
    before = client.get_status().compiles_after_warmup
    streams = [client.submit(prompt(), own, adapter=ref) for ref, own in rows]
    found = [tokens_of(stream) for stream in streams]
    assert client.get_status().compiles_after_warmup == before

    def best(logits: np.ndarray, known: list[int]) -> int:
        """Of the tokens that the grammar allows; the end token too."""
        allowed = [t for t in range(size) if t % 3 == 0 or t in ends]
        return allowed[int(np.argmax(logits[allowed]))]

    for place, (ref, own) in enumerate(rows):
        model = load_tiny(CASE, OPTIONS)
        if ref is not None:
            merged = merge(ORACLE / CASE, adapters[place - 1][0], tmp_path / str(place))
            model = load_model(merged, options=OPTIONS)
        if own.grammar is None:
            assert found[place] == next_tokens(model, prompt(), NUM_TOKENS)
            continue
        expected = next_tokens(model, prompt(), NUM_TOKENS, best)
        stops = [i for i, token in enumerate(expected) if token in ends]
        assert found[place] == expected[: stops[0] if stops else None]
    assert len({tuple(tokens) for tokens in found}) > 3


def test_a_broken_adapter_ends_its_own_requests_only(
    client: SyncClient, expected: list[list[int]], tmp_path: Path
) -> None:
    """With what is wrong; the base goes on."""
    gone = client.submit(prompt(), greedy(), n=2, adapter=AdapterRef(key="0" * 32, path="/none"))
    base = client.submit(prompt(), greedy())
    assert tokens_of(base) == expected[-1]
    with pytest.raises(InvalidAdapter, match="adapter_config.json"):
        tokens_of(gone)
    wrong = client.submit(prompt(), greedy(), adapter=AdapterRef(key="../x", path=str(tmp_path)))
    with pytest.raises(InvalidRequest, match="named by a hash"):
        tokens_of(wrong)
    assert client.get_status().waiting == 0


def test_content_that_is_not_what_its_name_says(
    client: SyncClient, adapters: list[tuple[Adapter, AdapterRef]]
) -> None:
    """Is refused: KV is known by the name."""
    ref = AdapterRef(key="ab" * 16, path=adapters[0][1].path)
    with pytest.raises(InvalidAdapter, match="does not hold"):
        tokens_of(client.submit(prompt(), greedy(), adapter=ref))


def test_cancel_while_an_adapter_is_loaded(
    client: SyncClient, adapters: list[tuple[Adapter, AdapterRef]], expected: list[list[int]]
) -> None:
    """Ends at once, and leaves nothing behind."""
    for _ in range(5):
        stream = client.submit(prompt(), greedy(50), n=2, adapter=adapters[-1][1])
        stream.cancel()
        assert len(tokens_of(stream)) < 100
    assert tokens_of(client.submit(prompt(), greedy(), adapter=adapters[-1][1])) == expected[-2]
    status = client.get_status()
    assert status.waiting == status.running == status.pages_used == 0


class OnTpu:
    """A mesh of one device, as far as it is looked at."""

    size = 1
    devices = np.array([types.SimpleNamespace(platform="tpu")])


def test_the_tpu_kernel_is_taken_where_it_fits() -> None:
    """XLA's products elsewhere; asked for by name it is refused."""
    spec = load_tiny(CASE, OPTIONS).spec
    options = ModelOptions(dtype="bfloat16", attention="tpu")
    assert with_lora_kernel(options, config(), spec, OnTpu()) == options
    asked = dataclasses.replace(config(), kernels=KernelsConfig(lora="tpu"))
    with pytest.raises(ConfigError, match="no multiples of 128"):
        with_lora_kernel(options, asked, spec, OnTpu())
    sizes = dataclasses.replace(spec.attention, num_heads=8, num_kv_heads=4, head_dim=64)
    wide = dataclasses.replace(
        spec, attention=sizes, hidden_size=512, feed_forward=1024, vocab_size=1280
    )
    for parts in (1, 2):
        split = dataclasses.replace(options, tensor_parallel=parts)
        assert with_lora_kernel(split, config(), wide, OnTpu()).lora == "tpu"
    off = dataclasses.replace(asked, lora=LoraConfig())
    assert with_lora_kernel(options, off, spec, OnTpu()) == options


def test_the_native_kernel_is_taken_on_a_cpu() -> None:
    """For float32 activations, which packed weights always have."""
    mesh, spec = make_mesh(jax.devices()[:1]), load_tiny(CASE, OPTIONS).spec
    expected = "xla" if native.load().reason else "cpu"
    assert with_lora_kernel(ModelOptions(), config(), spec, mesh).lora == expected
    half = ModelOptions(dtype="bfloat16")
    assert with_lora_kernel(half, config(), spec, mesh).lora == "xla"
    asked = dataclasses.replace(config(), kernels=KernelsConfig(lora="cpu"))
    with pytest.raises(ConfigError, match="float32"):
        with_lora_kernel(half, asked, spec, mesh)


class OnGpu:
    """A mesh of one device, as far as it is looked at."""

    size = 1

    def __init__(self, capability: str = "9.0") -> None:
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        self.devices = np.array([device])


def test_the_hopper_kernel_is_taken_where_it_fits() -> None:
    """And refused with the reason where it was asked for and does not."""
    spec = load_tiny(CASE, OPTIONS).spec
    sizes = dataclasses.replace(spec.attention, num_heads=8, num_kv_heads=4, head_dim=64)
    wide = dataclasses.replace(
        spec, attention=sizes, hidden_size=512, feed_forward=1024, vocab_size=1280
    )
    options = ModelOptions(dtype="bfloat16", attention="gpu")
    fitting = dataclasses.replace(config().lora, classes=("8x2", "128x1"))
    plain = dataclasses.replace(config(), lora=fitting)
    asked = dataclasses.replace(plain, kernels=KernelsConfig(lora="gpu"))
    for parts in (1, 2):
        split = dataclasses.replace(options, tensor_parallel=parts)
        assert with_lora_kernel(split, asked, wide, OnGpu()).lora == "gpu"
        assert with_lora_kernel(split, plain, wide, OnGpu()).lora == "gpu"
    low = dataclasses.replace(asked, lora=config().lora)
    for given, model, on, said in (
        (options, wide, OnGpu("8.0"), "Hopper, compute capability 9.0, not 8.0"),
        (options, wide, OnTpu(), "the platform is tpu"),
        (options, spec, OnGpu(), "no multiples of 64"),
        (ModelOptions(), wide, OnGpu(), "not float32"),
    ):
        with pytest.raises(ConfigError, match=said):
            with_lora_kernel(given, asked, model, on)
    assert with_lora_kernel(options, plain, spec, OnGpu()).lora == "xla"
    with pytest.raises(ConfigError, match="ranks of 4 "):
        with_lora_kernel(options, low, wide, OnGpu())


@pytest.mark.parametrize("classes", [("8",), ("0x4",), ("6x2",), ("8x0",), (), ("8x1", "8x2")])
def test_malformed_classes(classes: tuple[str, ...]) -> None:
    """Are refused at the start."""
    with pytest.raises(ConfigError, match=r"lora\.classes"):
        rank_classes(LoraConfig(enabled=True, classes=classes))
