"""The parameters that all generating endpoints share, from a body's fields to `SamplingParams`.

Each parameter is read here once, with its bounds; one that asks for something we do not do is
refused by `refuse_unsupported`. Bounds that depend on the prompt are checked in `plan_outputs`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from jaxserve import types
from jaxserve.errors import ContextTooLong, Forbidden, InvalidRequest
from jaxserve.http.auth import MAX_PRIORITY, Identity
from jaxserve.text.asked_grammar import Wanted, read_grammar
from jaxserve.text.fields import Fields
from jaxserve.text.message import MessageReader
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelInfo, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_BAD_WORD_LENGTH = 256
MAX_TEMPERATURE = 2.0
#: Words for priorities; any integer between will do as well, smaller ones are served first.
PRIORITIES = {"high": -10, "normal": 0, "low": 10}


@dataclass(kw_only=True)
class Options:
    """What a request asks for, apart from its prompt.

    Attributes:
        n: choices to answer with; candidates (best_of): sequences to generate for each prompt.
        max_tokens: None for the endpoint's default; max_tokens_field: which parameter said so.
        wanted: the grammar that the output must match; checked by the endpoint.
        sampling: fields of `SamplingParams` that do not depend on the prompt.
        cache_salt: only requests with the same one share cached pages.
        discard: run the prompt only, and drop the one token the engine must generate.
        reader: makes what reads a choice's text as a message; None where it is plain text.
        shown_tokens: control tokens that this needs to see.
    """

    n: int
    candidates: int
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    return_token_ids: bool
    priority: int
    sampling: dict[str, Any]
    wanted: Wanted | None = None
    cache_salt: str = ""
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    discard: bool = False
    reader: Callable[[], MessageReader] | None = None
    shown_tokens: Collection[int] = ()


def read_options(
    fields: Fields, model: ModelInfo, tokenizer: Tokenizer, identity: Identity, max_choices: int
) -> Options:
    """Reads the shared parameters.

    Raises:
        InvalidRequest: one has a wrong type or is out of bounds.
        Forbidden: the priority is above the key's ceiling.
    """
    stream = fields.flag("stream", False)
    n = fields.integer("n", 1, 1, max_choices)
    candidates = fields.integer("best_of", None, 1, max_choices)
    if candidates is None:
        candidates = n
    elif candidates < n:
        raise InvalidRequest(
            f"best_of must be at least n, got best_of {candidates} and n {n}", param="best_of"
        )
    elif candidates > n and stream:
        raise InvalidRequest(
            f"best_of {candidates} above n {n} cannot be streamed: which choices are best is known "
            "at the end; leave out stream or best_of",
            param="best_of",
        )
    return Options(
        n=n,
        candidates=candidates,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        stop=fields.texts("stop", MAX_STOP_STRINGS, MAX_STOP_LENGTH),
        include_stop=fields.flag("include_stop_str_in_output", False),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        return_token_ids=fields.flag("return_token_ids", False),
        priority=read_priority(fields, identity),
        cache_salt=_cache_salt(fields),
        sampling=_sampling(fields, model, tokenizer),
        wanted=read_grammar(fields, tokenizer),
    )


def refuse_unsupported(fields: Fields) -> None:
    """Accepts what changes nothing, refuses what we do not do (both by name)."""
    fields.text("user")
    fields.mapping("metadata")
    fields.text("safety_identifier")
    fields.text("prompt_cache_key")
    fields.neutral("prompt_cache_retention")
    fields.neutral("store", False)
    fields.neutral("service_tier", "auto", "default")
    fields.neutral("use_beam_search", False)
    fields.neutral("length_penalty", 1.0, 1)
    fields.neutral("truncate_prompt_tokens")
    fields.neutral("detokenize", True)
    fields.neutral("spaces_between_special_tokens", True)


def plan_outputs(
    options: Options,
    prompt_lens: list[int],
    default: int | None,
    model: ModelInfo,
    held: int,
    *,
    prompt_field: str,
) -> list[SamplingParams]:
    """Sampling parameters for each prompt, with its room for output.

    Args:
        default: max_tokens where the request has none; None takes what is left.
        held: positions that the cache can hold, which may be fewer than the context.
        prompt_field: which parameter the prompts came in, for messages.

    Raises:
        ContextTooLong: a prompt, or a prompt with max_tokens, does not fit.
        InvalidRequest: min_tokens is over max_tokens.
    """
    samplings = []
    for prompt_len in prompt_lens:
        # A token that nobody wants need not fit, since it is never an input.
        left = model.max_context - prompt_len + options.discard
        if left < 1:
            raise ContextTooLong(
                f"the prompt has {prompt_len} tokens, but the model's context is "
                f"{model.max_context} and needs room for at least one more; shorten the prompt",
                param=prompt_field,
            )
        max_tokens = options.max_tokens
        if max_tokens is not None and max_tokens > left:
            raise ContextTooLong(
                f"{options.max_tokens_field} is {max_tokens}, but after the prompt's {prompt_len} "
                f"tokens only {left} of the model's context of {model.max_context} are left",
                param=options.max_tokens_field,
            )
        if max_tokens is None:
            usable = max(1, min(left, held - prompt_len))
            max_tokens = usable if default is None else min(default, usable)
        if options.discard:
            max_tokens = 1
        min_tokens = options.sampling["min_tokens"]
        if min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {min_tokens}, over max_tokens, which is {max_tokens}",
                param="min_tokens",
            )
        grammar = None if options.wanted is None else options.wanted.grammar
        samplings.append(SamplingParams(max_tokens=max_tokens, grammar=grammar, **options.sampling))
    return samplings


def with_candidates_ranked(options: Options) -> None:
    """Has the engine report log-probabilities where choices are to be ranked by them."""
    if options.candidates > options.n and options.sampling.get("logprobs") is None:
        options.sampling["logprobs"] = 0


def _sampling(fields: Fields, model: ModelInfo, tokenizer: Tokenizer) -> dict[str, Any]:
    top_k = fields.integer("top_k", 0, -1, 2**31 - 1)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p == 0.0:
        raise InvalidRequest("top_p must be above 0, got 0; temperature 0 is greedy", param="top_p")
    seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
    allowed = fields.token_ids("allowed_token_ids", model.vocab_size, model.vocab_size)
    if allowed == ():
        raise InvalidRequest(
            "allowed_token_ids must name at least one token, got an empty list",
            param="allowed_token_ids",
        )
    num_stops = types.MAX_STOP_TOKEN_IDS
    return {
        "seed": secrets.randbits(63) if seed is None else seed,
        "min_tokens": fields.integer("min_tokens", 0, 0, model.max_context),
        "temperature": fields.number("temperature", 1.0, 0.0, MAX_TEMPERATURE),
        "top_k": max(top_k, 0),
        "top_p": top_p,
        "min_p": fields.number("min_p", 0.0, 0.0, 1.0),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 10.0),
        "stop_token_ids": fields.token_ids("stop_token_ids", model.vocab_size, num_stops) or (),
        "ignore_eos": fields.flag("ignore_eos", False),
        "logit_bias": _logit_bias(fields, model.vocab_size),
        "allowed_token_ids": allowed,
        "bad_words": _bad_words(fields, tokenizer),
        "prompt_logprobs": fields.integer("prompt_logprobs", None, 0, types.MAX_LOGPROBS),
    }


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = fields.mapping("logit_bias")
    if len(pairs) > types.MAX_LOGIT_BIAS:
        limit = f"an object of at most {types.MAX_LOGIT_BIAS} tokens"
        raise fields.wrong("logit_bias", limit, list(pairs))
    inner = Fields(pairs, "logit_bias.")
    biases = {}
    for key in pairs:
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token < vocab_size:
            wanted = f"keyed by token ids between 0 and {vocab_size - 1}"
            raise fields.wrong("logit_bias", wanted, key)
        biases[token] = inner.number(key, 0.0, -100.0, 100.0)
    return tuple(biases.items())


def _bad_words(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenized at the start of a text and inside one."""
    words = fields.texts("bad_words", types.MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for variant in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(variant, add_special_tokens=False))
            if len(ids) > types.MAX_BAD_WORD_TOKENS:
                wanted = f"made of words of at most {types.MAX_BAD_WORD_TOKENS} tokens"
                raise fields.wrong("bad_words", wanted, word)
            if ids:
                sequences[ids] = None
    if len(sequences) > types.MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words come to {len(sequences)} token sequences (with and without a space before "
            f"them), the limit is {types.MAX_BAD_WORDS}; send fewer",
            param="bad_words",
        )
    return tuple(sequences)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.nested("stream_options")
    if options is None:
        return False
    if not stream:
        raise InvalidRequest(
            "stream_options needs stream to be true; leave it out otherwise", param="stream_options"
        )
    include_usage = options.flag("include_usage", False)
    options.neutral("include_obfuscation", False)
    options.neutral("continuous_usage_stats", False)
    options.finish()
    return include_usage


def _cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt", "")
    if len(salt) > types.MAX_CACHE_SALT:
        raise fields.wrong("cache_salt", f"at most {types.MAX_CACHE_SALT} characters", salt)
    return salt


def read_priority(fields: Fields, identity: Identity) -> int:
    """The priority, within what the key may name.

    Raises:
        Forbidden: it is above the ceiling of the key.
    """
    value = fields.take("priority")
    if isinstance(value, str):
        if value not in PRIORITIES:
            wanted = f"an integer, or one of {', '.join(PRIORITIES)}"
            raise fields.wrong("priority", wanted, value)
        priority = PRIORITIES[value]
    else:
        priority = fields.integer("priority", identity.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if priority < identity.priority_ceiling:
        raise Forbidden(
            f"priority {priority} is above this key's ceiling of {identity.priority_ceiling} "
            "(smaller numbers are served first)",
            param="priority",
        )
    return priority
