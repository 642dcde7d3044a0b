"""The BERT family of encoders: BERT (MiniLM among it), RoBERTa and XLM-RoBERTa.

Post-norm layers with biases, learned positions, attention over the whole sequence. Sequences lie
one behind the other along the token axis, `[T, …]`, without padding between them, and there is no
cache: an encoder declares no cache groups. A checkpoint for the classification of one label has a
head on top, and is a cross-encoder. Source: arXiv 1810.04805, 1907.11692, 1911.02116 and
transformers' `modeling_bert`, `modeling_roberta`, `modeling_xlm_roberta`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxserve.errors import UnsupportedModel
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.hf_tensors import Path, Rules, within
from jaxserve.models.layers import ACTIVATIONS
from jaxserve.models.linear import Embedding, Linear, exact_param, weight_bytes
from jaxserve.models.options import ModelOptions
from jaxserve.models.spec import TensorRule
from pallas_kernels.segment_attention import segment_attention

#: HF architecture: the word before `.encoder` in its tensors' names, where there is one.
ARCHITECTURES: dict[str, str] = {
    "BertModel": "bert",
    "BertForSequenceClassification": "bert",
    "RobertaModel": "roberta",
    "RobertaForSequenceClassification": "roberta",
    "XLMRobertaModel": "roberta",
    "XLMRobertaForSequenceClassification": "roberta",
}


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder.

    Attributes:
        family: "bert" or "roberta", which differ in their head's tensors and first position.
        max_context: tokens of a sequence, special ones included.
        num_positions, first_position: rows of the position table, and which is the first token's.
        num_types: kinds of segment: 2 where the second text of a pair is marked.
        num_labels: of the head; 0 where there is none.
        prefix: what stands before `encoder.` in this checkpoint's tensor names.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    feed_forward: int
    num_layers: int
    num_heads: int
    num_positions: int
    first_position: int
    num_types: int
    activation: str
    norm_eps: float
    num_labels: int = 0
    prefix: str = ""

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def max_context(self) -> int:
        """See the class."""
        return self.num_positions - self.first_position


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a checkpoint with this HF config is one of these."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in ARCHITECTURES


def encoder_spec(config: dict[str, Any], names: Collection[str] = ()) -> EncoderSpec:
    """Reads a Hugging Face config.

    Args:
        names: of the checkpoint's tensors, by which their prefix is known.

    Raises:
        UnsupportedModel: a field is missing, malformed, or asks for what is not implemented.
    """
    fields = HfConfig(config)
    if not is_encoder(config):
        raise UnsupportedModel(
            f"the architecture {config.get('architectures')} is not an encoder that is supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    architecture = config["architectures"][0]
    family = ARCHITECTURES[architecture]
    fields.refuse("position_embedding_type", "absolute")
    fields.refuse("is_decoder", False)
    fields.refuse("quantization_config")
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if hidden_size % num_heads:
        raise UnsupportedModel(
            f"config: num_attention_heads={num_heads} must divide hidden_size={hidden_size}"
        )
    prefix = f"{family}."
    return EncoderSpec(
        architecture=architecture,
        family=family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        feed_forward=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_positions=fields.count("max_position_embeddings", 512),
        first_position=fields.count("pad_token_id", 1, least=0) + 1 if family == "roberta" else 0,
        num_types=fields.count("type_vocab_size", 2),
        activation=fields.activation("hidden_act", "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        num_labels=_labels(config) if "Classification" in architecture else 0,
        prefix=prefix if any(name.startswith(prefix) for name in names) else "",
    )


def _labels(config: dict[str, Any]) -> int:
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise UnsupportedModel(
            f"config: num_labels={count}: a cross-encoder has one label, the score"
        )
    return count


class LayerNorm(nnx.Module):
    """(x − mean) over the standard deviation, times a scale, plus a bias (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps = eps
        self.scale = exact_param(jnp.ones(size), ("embed",))
        self.bias = exact_param(jnp.zeros(size), ("embed",))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Computed in float32, returned in x's dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class EncoderLayer(nnx.Module):
    """norm(x + attention x), then norm(x + mlp x)."""

    def __init__(self, spec: EncoderSpec, options: ModelOptions, rngs: nnx.Rngs) -> None:
        size = spec.hidden_size
        self.scale = spec.head_dim**-0.5
        self.activation = spec.activation
        self.backend = options.attention
        self.qkv = Linear(
            size,
            (3, spec.num_heads, spec.head_dim),
            options,
            axes=("embed", None, "heads", None),
            rngs=rngs,
            bias=True,
        )
        self.out = Linear(size, (size,), options, axes=("heads", "embed"), rngs=rngs, bias=True)
        self.attention_norm = LayerNorm(size, spec.norm_eps)
        self.up = Linear(
            size, (spec.feed_forward,), options, axes=("embed", "mlp"), rngs=rngs, bias=True
        )
        self.down = Linear(
            spec.feed_forward, (size,), options, axes=("mlp", "embed"), rngs=rngs, bias=True
        )
        self.mlp_norm = LayerNorm(size, spec.norm_eps)

    def __call__(
        self, x: Float[Array, "T D"], starts: Int[Array, "R+1"], max_len: int
    ) -> Float[Array, "T D"]:
        """Applies it to packed sequences."""
        num_live = starts[-1]
        mixed = segment_attention(
            self.qkv(x, num_live),
            starts,
            scale=self.scale,
            max_len=max_len,
            backend=self.backend,
        )
        x = self.attention_norm(x + self.out(mixed.reshape(x.shape), num_live))
        inner = ACTIVATIONS[self.activation](self.up(x, num_live).astype(jnp.float32))
        return self.mlp_norm(x + self.down(inner.astype(x.dtype), num_live))


@jax.jit(static_argnames="max_len")
def _run_layer(
    layer: EncoderLayer, x: Float[Array, "T D"], starts: Int[Array, "R+1"], max_len: int
) -> Float[Array, "T D"]:
    with jax.named_scope("layer"):
        return layer(x, starts, max_len)


class Head(nnx.Module):
    """From the first token's state to labels: dense, tanh, dense."""

    def __init__(self, spec: EncoderSpec, options: ModelOptions, rngs: nnx.Rngs) -> None:
        size = spec.hidden_size
        self.dense = Linear(size, (size,), options, axes=("embed", None), rngs=rngs, bias=True)
        self.labels = Linear(
            size, (spec.num_labels,), options, axes=("embed", None), rngs=rngs, bias=True
        )

    def __call__(self, first: Float[Array, "R D"]) -> Float32[Array, "R labels"]:
        """Scores, before any sigmoid."""
        return self.labels(jnp.tanh(self.dense(first))).astype(jnp.float32)


class Encoder(nnx.Module):
    """An encoder of the BERT family; may be built abstractly, under `nnx.eval_shape`."""

    def __init__(self, spec: EncoderSpec, options: ModelOptions, *, rngs: nnx.Rngs) -> None:
        """Builds it with random weights."""
        self.spec = spec
        self.options = options
        tables = replace(options, matmul="xla", quantization="none")  # looked up, never multiplied
        size = spec.hidden_size
        self.words = Embedding(spec.vocab_size, size, tables, rngs)
        self.positions = Embedding(spec.num_positions, size, tables, rngs)
        self.types = Embedding(spec.num_types, size, tables, rngs)
        self.norm = LayerNorm(size, spec.norm_eps)
        self.layers = nnx.List([EncoderLayer(spec, options, rngs) for _ in range(spec.num_layers)])
        self.head = Head(spec, tables, rngs) if spec.num_labels else None

    def params(self) -> dict[Path, nnx.Param]:
        """Every parameter by its path; abstract ones take their arrays through `set_value`."""
        found = {path: p for path, p in nnx.iter_graph(self) if isinstance(p, nnx.Param)}
        return cast(dict[Path, nnx.Param], found)

    def __call__(
        self,
        token_ids: Int[Array, "T"],
        positions: Int[Array, "T"],
        types: Int[Array, "T"],
        starts: Int[Array, "R+1"],
        max_len: int,
    ) -> Float[Array, "T D"]:
        """Hidden states after the last layer.

        Args:
            positions: of each token in its own sequence.
            types: kind of segment, 1 for the second text of a pair.
            starts: row r owns tokens starts[r] : starts[r + 1]; from the last on there is padding,
                for which anything within the tables may stand.
            max_len: no row has more tokens.
        """
        spec = self.spec
        x = self.words.lookup(token_ids)
        x = x + self.positions.lookup(positions + spec.first_position)
        x = self.norm(x + self.types.lookup(jnp.minimum(types, spec.num_types - 1)))
        for layer in self.layers:
            x = _run_layer(layer, x, starts, max_len)
        return x

    def count_work(self, lengths: Collection[int]) -> tuple[int, int]:
        """Floating-point operations and bytes that sequences of such lengths cannot do without.

        Two operations a multiply-add, matrices and attention only; every matrix's bytes once.
        """
        spec = self.spec
        num_tokens = sum(lengths)
        matrices = spec.num_layers * (
            4 * spec.hidden_size**2 + 2 * spec.hidden_size * spec.feed_forward
        )
        pairs = sum(length**2 for length in lengths)
        flops = 2 * matrices * num_tokens + 4 * spec.num_layers * spec.hidden_size * pairs
        return flops, round(matrices * weight_bytes(self.options))


def encoder_tensors(spec: EncoderSpec) -> Rules:
    """How every parameter is made of HF's tensors, by its path in `Encoder.params`."""
    size, prefix = spec.hidden_size, spec.prefix
    embeddings = f"{prefix}embeddings"
    rules: Rules = {
        ("words", "table"): _as_it_is(
            f"{embeddings}.word_embeddings.weight", (spec.vocab_size, size)
        ),
        ("positions", "table"): _as_it_is(
            f"{embeddings}.position_embeddings.weight", (spec.num_positions, size)
        ),
        ("types", "table"): _as_it_is(
            f"{embeddings}.token_type_embeddings.weight", (spec.num_types, size)
        ),
        **_norm(("norm",), f"{embeddings}.LayerNorm", size),
    }
    for index in range(spec.num_layers):
        rules |= within(("layers", index), _layer(spec, f"{prefix}encoder.layer.{index}"))
    if spec.num_labels:
        dense, labels = "classifier.dense", "classifier.out_proj"
        if spec.family == "bert":
            dense, labels = f"{prefix}pooler.dense", "classifier"
        rules |= _linear(("head", "dense"), dense, size, size)
        rules |= _linear(("head", "labels"), labels, size, spec.num_labels)
    return rules


def _layer(spec: EncoderSpec, prefix: str) -> Rules:
    size, wide = spec.hidden_size, spec.feed_forward
    names = [f"{prefix}.attention.self.{part}" for part in ("query", "key", "value")]
    heads = (3, spec.num_heads, spec.head_dim)

    def weight(tensors: list[np.ndarray]) -> Float[np.ndarray, "D 3 N H"]:
        return np.stack([t.T for t in tensors], axis=1).reshape(size, *heads)

    return {
        ("qkv", "weight"): TensorRule(
            names=tuple(f"{name}.weight" for name in names),
            shapes=((size, size),) * 3,
            build=weight,
        ),
        ("qkv", "bias"): TensorRule(
            names=tuple(f"{name}.bias" for name in names),
            shapes=((size,),) * 3,
            build=lambda tensors: np.stack(tensors).reshape(heads),
        ),
        **_linear(("out",), f"{prefix}.attention.output.dense", size, size),
        **_norm(("attention_norm",), f"{prefix}.attention.output.LayerNorm", size),
        **_linear(("up",), f"{prefix}.intermediate.dense", size, wide),
        **_linear(("down",), f"{prefix}.output.dense", wide, size),
        **_norm(("mlp_norm",), f"{prefix}.output.LayerNorm", size),
    }


def _linear(path: Path, name: str, fan_in: int, fan_out: int) -> Rules:
    return {
        (*path, "weight"): TensorRule(
            names=(f"{name}.weight",),
            shapes=((fan_out, fan_in),),
            build=lambda tensors: tensors[0].T,
        ),
        (*path, "bias"): _as_it_is(f"{name}.bias", (fan_out,)),
    }


def _norm(path: Path, name: str, size: int) -> Rules:
    return {
        (*path, "scale"): _as_it_is(f"{name}.weight", (size,)),
        (*path, "bias"): _as_it_is(f"{name}.bias", (size,)),
    }


def _as_it_is(name: str, shape: tuple[int, ...]) -> TensorRule:
    return TensorRule(names=(name,), shapes=(shape,), build=lambda tensors: tensors[0])
