"""Loads the model that embeds beside the one that generates."""

from __future__ import annotations

import logging
from pathlib import Path

from jax.sharding import Mesh, SingleDeviceSharding

from jaxserve.config import Config
from jaxserve.device.clock import DeviceClock
from jaxserve.device.embed_step import EmbedBuckets
from jaxserve.device.embedder import Embedder
from jaxserve.engine.parts import EmbeddingParts, Progressing
from jaxserve.errors import ConfigError
from jaxserve.formats.sentence_files import SentenceFiles, read_sentence_files
from jaxserve.models.bert import Encoder, EncoderSpec, encoder_spec
from jaxserve.models.decoder import Decoder
from jaxserve.models.options import PACKED_DTYPES, ModelOptions
from jaxserve.models.spec import ModelSpec
from jaxserve.scheduler.embedding import group_size
from jaxserve.types import EmbeddingInfo
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_encoder
from jaxserve.weights.sources import SERVED, resolve_encoder
from pallas_kernels import native
from pallas_kernels.segment_attention import unsupported

logger = logging.getLogger(__name__)


def load_embedding(
    config: Config, model: Decoder, mesh: Mesh, clock: DeviceClock, progress: Progressing
) -> EmbeddingParts | None:
    """What `embeddings.model` asks for, its programs not compiled yet; None where it is empty.

    Args:
        model: that generates.
        mesh: its devices; an encoder is on the first of them.
        clock: of the device.

    Raises:
        ConfigError: a setting that does not fit the model or the devices.
        WeightsError: the model is missing, broken or not supported.
    """
    if not config.embeddings.model:
        return None
    if config.parallel.hosts > 1:
        raise ConfigError(
            f"parallel.hosts={config.parallel.hosts}: embeddings run on one host: leave "
            "embeddings.model empty"
        )
    served = config.embeddings.model == SERVED
    if served and mesh.size > 1:
        raise ConfigError(
            f"embeddings.model=served runs on one device, the model is on {mesh.size}: give an "
            "encoder"
        )
    embeds = model if served else _encoder(config, mesh, progress)
    info = embedding_info(config, embeds)
    buckets = buckets_of(config, embeds.spec, embeds.options)
    embedder = Embedder(embeds, buckets, config.cache.page_size, clock)
    return EmbeddingParts(model=info, embedder=embedder, buckets=buckets)


def _encoder(config: Config, mesh: Mesh, progress: Progressing) -> Encoder:
    path = Path(resolve_encoder(config, progress).model)
    device = mesh.devices.flat[0]
    spec = encoder_spec(open_checkpoint(path).config)
    options = encoder_options(config, device.platform, spec.head_dim)
    sharding = SingleDeviceSharding(device)
    return load_encoder(
        path, options=options, sharding=lambda axes, shape: sharding, progress=progress
    )


def encoder_options(config: Config, platform: str, head_dim: int) -> ModelOptions:
    """How an encoder is computed: with the native kernels where they run and nobody forbids it."""
    dtype, kernels = config.embeddings.encoder_dtype, config.kernels
    has_native = platform == "cpu" and native.load().reason is None
    packs = has_native and dtype in PACKED_DTYPES and kernels.matmul != "xla"
    attends = packs and kernels.attention != "xla" and not unsupported("cpu", head_dim=head_dim)
    options = ModelOptions(
        dtype=dtype,
        matmul="cpu" if packs else "xla",
        attention="cpu" if attends else "xla",
        layers="unrolled",
    )
    logger.info("embeddings: matmul %s, attention %s", options.matmul, options.attention)
    return options


def buckets_of(
    config: Config, spec: EncoderSpec | ModelSpec, options: ModelOptions
) -> EmbedBuckets:
    """The embedding programs; raises as `max_length`."""
    in_grid = isinstance(spec, EncoderSpec) and options.attention == "xla"
    return EmbedBuckets(
        max_length(config, spec),
        config.embeddings.embed_tokens,
        in_grid=in_grid,
        batch_invariant=config.engine.batch_invariant,
    )


def max_length(config: Config, spec: EncoderSpec | ModelSpec) -> int:
    """Tokens that a text may have.

    Raises:
        ConfigError: embeddings.max_length is more than the model was made for.
    """
    settings, limit = config.embeddings, spec.max_context
    if isinstance(spec, ModelSpec):
        limit = config.model.max_context or limit
        own = settings.embed_tokens
    else:
        own = _files(config).max_length or limit
    wanted = settings.max_length or min(own, limit)
    if wanted > limit:
        raise ConfigError(
            f"embeddings.max_length is {wanted}, but the model was made for {limit} tokens"
        )
    return wanted


def _files(config: Config) -> SentenceFiles:
    """What is written beside the model, which is none that generates."""
    return read_sentence_files(Path(resolve_encoder(config).model))


def embedding_info(config: Config, model: Encoder | Decoder) -> EmbeddingInfo:
    """What the front end needs to know: settings first, then the model's own files.

    Raises:
        ConfigError: as `max_length`.
    """
    settings = config.embeddings
    served = isinstance(model, Decoder)
    files = SentenceFiles() if served else _files(config)
    pooling = settings.pooling
    if pooling == "auto":
        pooling = files.pooling or ("last" if served else "mean")
    normalize = settings.normalize != "false"
    if settings.normalize == "auto" and files.normalize is not None:
        normalize = files.normalize
    scores_pairs = isinstance(model, Encoder) and model.head is not None
    return EmbeddingInfo(
        name=resolve_encoder(config).name,
        max_length=max_length(config, model.spec),
        vocab_size=model.spec.vocab_size,
        dimensions=1 if scores_pairs else model.spec.hidden_size,
        pooling="cls" if scores_pairs else pooling,
        normalize=normalize,
        scores_pairs=scores_pairs,
        group=group_size(config.scheduler),
    )
