"""From a configuration to a loaded model: what fits, what is refused, one whole load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import Config, KernelsConfig, WeightsConfig
from jaxserve.device.executor import Executor
from jaxserve.device.memory import Memory
from jaxserve.engine import load
from jaxserve.engine.attribution import FLOPS_PER_BYTE
from jaxserve.engine.layout import describe_experts
from jaxserve.engine.load import buckets_for, cache_dtype, load_parts, model_info
from jaxserve.engine.machine import fitting, model_options
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ConfigError
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import MoeSpec
from jaxserve.protocol.sync_client import SyncClient, SyncStream
from jaxserve.settings import load_config
from jaxserve.types import SamplingParams
from pallas_kernels import native
from tests.device.rig import log_softmax, next_tokens, prompt_of
from tests.fakes.compile_cache import kept_cache_settings
from tests.models.driver import Driver
from tests.models.loading import ORACLE, load_tiny


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[list[str]]:
    """Of a tiny engine; JAX's own are put back."""
    with kept_cache_settings():
        yield [
            f"engine.compile_cache_dir={tmp_path / 'compiled'}",
            f"model.path={ORACLE / 'gemma2'}",
            "scheduler.max_rows=2",
            "scheduler.max_step_tokens=16",
            "cache.page_size=4",
        ]


def config_of(settings: list[str], *more: str) -> Config:
    """A configuration that no environment changes."""
    return load_config(settings=[*settings, *more], environ={})


def test_the_context_is_the_models_or_a_smaller_one(settings: list[str]) -> None:
    model = load_tiny("gemma2", ModelOptions())
    info = model_info(config_of(settings), model)
    assert (info.name, info.max_context, info.vocab_size) == ("gemma2", 256, 320)
    assert info.eos_token_ids == (2, 5)
    assert [(group.kind, group.layers) for group in info.cache_groups] == [
        ("full", (1, 3)),
        ("sliding", (0, 2)),
    ]
    assert model_info(config_of(settings, "model.max_context=256"), model).max_context == 256
    assert model_info(config_of(settings, "model.max_context=17"), model).max_context == 17
    with pytest.raises(ConfigError, match="max_context is 257, but .* for 256 positions"):
        model_info(config_of(settings, "model.max_context=257"), model)


def test_the_cache_has_the_dtype_of_the_activations_or_its_own() -> None:
    packed = ModelOptions(dtype="float16", matmul="cpu")
    half = ModelOptions(dtype="bfloat16")
    cache = Config().cache
    assert (cache_dtype(cache, packed), cache_dtype(cache, half)) == ("float32", "bfloat16")
    assert cache_dtype(replace(cache, dtype="float16"), packed) == "float16"


def test_fewer_programs_where_padding_rows_are_nearly_free() -> None:
    def num_programs(options: ModelOptions, platform: str) -> int:
        return len(buckets_for(Config(), options, platform).programs)

    dense, packed = ModelOptions(), ModelOptions(matmul="cpu")
    # A GPU's smallest has two rows, and it has several decode steps at one more number of rows.
    wanted = (packed, "cpu"), (dense, "tpu"), (dense, "gpu"), (dense, "cpu")
    assert [num_programs(*which) for which in wanted] == [15, 15, 16, 19]


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled at loading."""
    monkeypatch.setattr(Executor, "warm_up", lambda self, progress, threads: None)


def loaded(config: Config) -> Any:
    """The executor of a load."""
    return load_parts(config, lambda phase, done, total: None).executor


def test_experts_that_a_tpu_would_copy_are_told() -> None:
    moe = MoeSpec(num_experts=8, top_k=2, feed_forward=768, norm_topk_prob=True)
    assert [describe_experts(moe, parts) for parts in (1, 2, 3)] == [""] * 3
    assert "192 columns of each" in describe_experts(moe, 4)
    assert "parallel.expert" in describe_experts(moe, 4)
    # five devices do not share the columns: each holds all
    assert describe_experts(moe, 5) == ""
    odd = describe_experts(replace(moe, feed_forward=700), 1)
    assert "700 columns" in odd and "parallel" not in odd
    assert describe_experts(None, 4) == ""


def test_a_mixture_of_experts_is_loaded(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    settings = [*settings, f"model.path={ORACLE / 'qwen3_moe'}"]
    assert loaded(config_of(settings))._model.options.matmul == "xla"
    if native.load().reason is None:
        with pytest.raises(ConfigError, match=r"matmul=cpu cannot run here: .*by expert"):
            loaded(config_of(settings, "kernels.matmul=cpu"))
    with pytest.raises(ConfigError, match=r"int4 cannot run a mixture .*: set .*=int8"):
        loaded(config_of(settings, "weights.quantization=int4"))


@pytest.mark.skipif(native.load().reason is not None, reason="no native kernels")
def test_heads_that_the_native_attention_does_not_take(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensors, read as twice as many heads of half the size."""
    quick(monkeypatch)
    config = json.loads((ORACLE / "llama3" / "config.json").read_text())
    config |= {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = (ORACLE / "llama3" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(tensors)
    settings = [*settings, f"model.path={tmp_path}"]
    executor = loaded(config_of(settings))
    assert executor._model.options.attention == "xla"
    assert executor._model.options.matmul == "cpu"
    with pytest.raises(ConfigError, match=r"attention=cpu cannot run this model: head_dim 8 is"):
        loaded(config_of(settings, "kernels.attention=cpu"))
    assert loaded(config_of(settings, f"model.path={ORACLE / 'gemma2'}"))._model.options == (
        model_options(WeightsConfig(), KernelsConfig(), "cpu")
    )


@pytest.mark.skipif(native.load().reason is not None, reason="no native kernels")
@pytest.mark.parametrize(("asked", "held"), [("int8", "int8"), ("fp8", "float8_e4m3fn")])
def test_pages_of_codes_are_left_to_xla(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, asked: str, held: str
) -> None:
    quick(monkeypatch)
    executor = loaded(config_of(settings, f"cache.dtype={asked}"))
    assert executor._state.cache.groups[0].kv.kind == held
    assert executor._model.options.attention == "xla"
    assert executor._model.options.matmul == "cpu"
    with pytest.raises(
        ConfigError, match=rf"attention=cpu cannot run this model: pages are {held}"
    ):
        loaded(config_of(settings, f"cache.dtype={asked}", "kernels.attention=cpu"))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_pages_of_codes_are_read_by_the_tpu_s_kernel(settings: list[str], dtype: str) -> None:
    config = config_of(settings, f"cache.dtype={dtype}", "cache.page_size=32")
    on_tpu = model_options(config.weights, config.kernels, "tpu")
    held = cache_dtype(config.cache, on_tpu)
    options = fitting(on_tpu, config.kernels, 64, held)
    assert options.attention == "tpu"
    info = model_info(config, load_tiny("gemma2", ModelOptions()))
    memory = Memory(total_bytes=1 << 30, free_bytes=1 << 30)
    pools = load.size_cache(config, options, info, memory)
    assert len(pools) == len(info.cache_groups)
    config = config_of(settings, f"cache.dtype={dtype}", "cache.page_size=48")
    with pytest.raises(ConfigError, match=rf"{held} .* multiple of 32: set cache.page_size=32"):
        load.size_cache(config, options, info, memory)


def test_pages_of_codes_on_a_gpu_are_read_by_its_kernel_up_to_a_head_of_128() -> None:
    on_gpu = model_options(WeightsConfig(), KernelsConfig(), "gpu", capability="9.0")
    for head_dim, attention in ((64, "gpu"), (128, "gpu"), (256, "xla")):
        assert fitting(on_gpu, KernelsConfig(), head_dim, "int8").attention == attention
    with pytest.raises(ConfigError, match="head_dim is 256, beyond 128"):
        fitting(on_gpu, KernelsConfig(attention="gpu"), 256, "float8_e4m3fn")


def test_a_device_that_does_not_tell_its_memory_needs_a_size(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)

    def least_memory(devices: Any) -> Memory:
        raise ConfigError("it does not tell: set cache.memory_bytes")

    monkeypatch.setattr(load, "least_memory", least_memory)
    with pytest.raises(ConfigError, match=r"set cache\.memory_bytes"):
        loaded(config_of(settings))
    for setting in ("cache.num_pages=70", "cache.memory_bytes=1000000"):
        pages = loaded(config_of(settings, setting))._state.cache.groups[0].kv.shape[1]
        assert 65 < pages < 130


def test_a_pool_that_does_not_fit_is_refused(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    memory = Memory(total_bytes=1 << 22, free_bytes=1 << 20)
    monkeypatch.setattr(load, "least_memory", lambda devices: memory)
    with pytest.raises(ConfigError, match=r"num_pages=5000 needs .* 1\.0 MiB are free: set it to"):
        loaded(config_of(settings, "cache.num_pages=5000"))


def tokens_of(stream: SyncStream) -> tuple[list[list[int]], list[Any], list[Any]]:
    """Tokens of each choice, the first one's log-probabilities, and those of the prompt."""
    tokens: dict[int, list[int]] = {}
    beside, of_prompt = [], []
    for event in stream:
        tokens.setdefault(event.choice, []).extend(event.token_ids)
        if event.choice == 0:
            beside += event.logprobs
            of_prompt += event.prompt_logprobs
    return [tokens[choice] for choice in sorted(tokens)], beside, of_prompt


def test_what_rows_cost_is_what_the_model_counts(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    parts = load_parts(config_of(settings), lambda phase, done, total: None)
    work, model = parts.work, parts.executor._model
    assert dict(work.windows).keys() == {kind.window for kind in model.spec.layers}
    assert sum(share for _, share in work.windows) == pytest.approx(1)
    flops, num_bytes = model.count_work(8, 8, 80)
    counted = flops / FLOPS_PER_BYTE["cpu"] + num_bytes
    added = 8 * (work.token + work.sample) + 80 * (work.attend + work.read) + work.weights
    assert added == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
def test_a_checkpoint_is_loaded_and_served(settings: list[str]) -> None:
    """Requests of all kinds come out as the model alone computes them; nothing is compiled."""
    model = load_tiny("gemma2", ModelOptions())
    prompts = [prompt_of(length, length) for length in (3, 30, 60)]
    expected = [next_tokens(model, prompt, 20) for prompt in prompts]
    driver = Driver(model, 1, 96)
    known = prompts[1] + expected[1]
    logprobs = log_softmax(driver.all_logits(driver.step({0: known})[1]))
    told: list[tuple[str, int, int]] = []
    steps: list[Any] = []
    greedy = SamplingParams(max_tokens=20, seed=1, temperature=0.0, ignore_eos=True)
    sampled = SamplingParams(
        max_tokens=15, seed=5, temperature=0.9, repetition_penalty=1.3, bad_words=((7, 8),),
        logit_bias=((9, 1.0),), min_tokens=3, top_k=50, min_p=0.01,
    )  # fmt: skip
    config = config_of(settings)
    with EngineThread(config, load_parts, lambda *args: told.append(args)) as engine:
        client = SyncClient(engine.connect(), on_stats=steps.append)
        client.start()
        assert client.ready().model.name == "gemma2"
        streams = [client.submit(prompt, greedy, n=2) for prompt in prompts]
        wanted = replace(greedy, logprobs=2, prompt_logprobs=1)
        both = [client.submit(prompts[1], wanted), client.submit(prompts[0], sampled, n=3)]
        assert [tokens_of(stream)[0] for stream in streams] == [[one, one] for one in expected]
        (tokens,), beside, of_prompt = tokens_of(both[0])
        assert tokens == expected[1]
        for found, first in ((of_prompt, 1), (beside, len(prompts[1]))):
            assert [one.token_id for one in found] == known[first : first + len(found)]
            for place, one in enumerate(found, first):
                assert one.logprob == pytest.approx(logprobs[place - 1, known[place]], abs=1e-4)
        assert (len(of_prompt), len(beside)) == (29, 20)
        assert len(tokens_of(both[1])[0]) == 3
        status = client.get_status()
        client.close()
    assert status.compiles_after_warmup == 0
    assert status.pages_used == 0
    assert status.device is not None and status.device.kind == "cpu"
    assert status.device.count == config.parallel.data * max(1, config.parallel.model)
    assert status.device.flops_per_s == 0  # of a CPU nothing is claimed
    phases = [phase for phase, _, _ in told]
    assert phases == sorted(phases, reverse=True) and set(phases) == {"loading", "compiling"}
    assert told[-1][1] == told[-1][2]
    assert all(step.flops > 0 and step.bytes > 0 and step.device_ns > 0 for step in steps)
    assert any(Path(config.engine.compile_cache_dir).iterdir())
