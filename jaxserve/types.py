"""Words that every layer shares: sampling parameters, finish reasons, the facts about a model.

Part of the floor: plain dataclasses, no JAX, nothing that reads the environment.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

#: Bounds of the per-request lists that live in fixed arrays on the device.
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 512
MAX_STOP_TOKEN_IDS = 32
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 8
MAX_CHOICES = 128
#: Characters of `cache_salt`.
MAX_CACHE_SALT = 256

#: How the states of a text's tokens become one vector (`models.pooling`), by index on the device.
POOLINGS = ("cls", "mean", "max", "last", "weightedmean")

#: Bounds of a tenant's share.
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0


class FinishReason(enum.StrEnum):
    """Why a sequence ended, in OpenAI's words where it has them."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled, or a stop string matched
    LENGTH = "length"  # max_tokens or the context is used up
    CANCELLED = "cancelled"  # the client went away, or asked for it
    ERROR = "error"  # the engine failed


#: Kinds of `Grammar`.
GRAMMAR_KINDS = ("json_schema", "regex", "lark", "ebnf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an output must match (`jaxserve.structured.grammars` makes them).

    Attributes:
        kind: "json_schema", "regex" (of the `regex` crate), "lark" (as llguidance extends it), or
            "ebnf" (as llama.cpp writes it: `root ::= …`).
        text: its source.
    """

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What tokens say, for whoever holds output to a grammar without a tokenizer.

    Attributes:
        tokens: bytes of each, by id.
        special_token_ids: control tokens, which no text spells.
    """

    tokens: tuple[bytes, ...]
    special_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are chosen; every field is honoured on the device.

    The front end validates and fills it in completely (a seed is always there), so that a
    replay or another engine continues the very same stream. Neutral values switch a part off.

    Attributes:
        max_tokens: tokens to generate at most; > 0.
        min_tokens: no end or stop token is sampled before this many.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: tokens below min_p × the largest probability are dropped; 0 keeps all.
        presence_penalty: OpenAI's, over output tokens; likewise frequency_penalty.
        repetition_penalty: CTRL's (arXiv 1909.05858), over prompt and output tokens; 1 is off.
        seed: 64-bit; random bits are keyed by (seed, choice index, position).
        stop_token_ids: end the sequence; the token itself is not part of the text.
        ignore_eos: the model's own end tokens do not end the sequence.
        logit_bias: (token id, bias) pairs, added to the logits.
        allowed_token_ids: if not None, all other tokens are ruled out.
        bad_words: token sequences that must never be completed.
        logprobs: None, or how many alternatives to report beside the sampled token (0 = just it).
        prompt_logprobs: the same for each prompt token after the first.
        grammar: what the output must match; None where it is free.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token that stands there first, then the best ones.

    Attributes:
        token_id: the sampled (or prompt) token; logprob and rank are its own (rank 0 is best).
        top: (token id, logprob) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers of a model whose KV pages share one page table.

    Attributes:
        kind: "full" attention, or "sliding" with a window.
        layers: indices of the model's layers, in order; a layer is in exactly one group.
        num_kv_heads, head_dim: of one layer's K (and V) entry.
        window: positions a query sees, itself included; None for full attention.
    """

    kind: str
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def page_bytes(
        self,
        page_size: int,
        dtype_bytes: int,
        row_width: int | None = None,
        scale_bytes: int = 0,
    ) -> int:
        """Bytes of one page: keys and values of all of the group's layers.

        Args:
            row_width: elements that hold the key and the value of one head, which may be more
                than twice the head's size; that where None.
            scale_bytes: of one head's scales.
        """
        row = (row_width or 2 * self.head_dim) * dtype_bytes
        return len(self.layers) * self.num_kv_heads * (page_size * row + scale_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """What a LoRA adapter must fit.

    Attributes:
        modules: of each module that may take a delta, its inputs and outputs; "layers.*" stands for
            any layer, "experts.*" for any expert of a mixture.
        num_layers, num_experts: of the model.
        table: which of them is the embedding table.
        max_rank: the largest class's.
        settings: by a part of a module's name, the setting without which it takes none.
    """

    modules: dict[str, tuple[int, int]]
    num_layers: int
    table: str
    max_rank: int
    num_experts: int = 0
    settings: dict[str, str] = field(default_factory=dict)

    def targets(self) -> dict[str, tuple[int, int]]:
        """The modules of every layer and expert."""
        found = self.modules
        for part, count in (("layers", self.num_layers), ("experts", self.num_experts)):
            found = {
                name.replace(f".{part}.*.", f".{part}.{number}."): sizes
                for name, sizes in found.items()
                for number in (range(count) if f".{part}.*." in name else (0,))
            }
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What an engine computes on.

    Attributes:
        kind: as its maker calls it.
        count: of devices, on all hosts.
        flops_per_s, bytes_per_s: what one of them can compute and its memory move at best; 0
            where that is not known.
    """

    kind: str
    count: int = 1
    flops_per_s: float = 0.0
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the front end and the scheduler need to know of a loaded model.

    Attributes:
        name: the name it is served under.
        max_context: positions a sequence may have, prompt and output together.
        vocab_size: number of logits; token ids are below it.
        eos_token_ids: end a sequence unless `ignore_eos`.
        cache_groups: empty for encoders.
        adapters: what a LoRA adapter must fit; None where there are none.
    """

    name: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    cache_groups: tuple[CacheGroup, ...]
    adapters: AdapterBase | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingInfo:
    """What the front end and the engine's queue need to know of the model that embeds.

    Attributes:
        name: the name it is served under.
        max_length: tokens that a text may have, special ones included.
        vocab_size: token ids are below it.
        dimensions: of a vector.
        pooling: one of POOLINGS, used where a request names none.
        normalize: whether vectors have length one where a request does not say.
        scores_pairs: it is a cross-encoder, which gives a score for two texts and no vectors.
        group: texts that a client should send together at most, not to fill the queue.
    """

    name: str
    max_length: int
    vocab_size: int
    dimensions: int
    pooling: str
    normalize: bool
    scores_pairs: bool = False
    group: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingParams:
    """How a text's vector is made; filled in completely by the front end.

    Attributes:
        pooling: one of POOLINGS.
        normalize: divide it by its length, after it was cut.
        dimensions: keep only so many of the first ones; 0 keeps all.
    """

    pooling: str
    normalize: bool
    dimensions: int = 0
