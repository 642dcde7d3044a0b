"""The engine's own check of a request, before it can touch device arrays.

The front end validates with OpenAI's field names; this is the last line, against a client that
does not: whatever passes here fits the arrays' types and bounds.
"""

from __future__ import annotations

import re

from jaxserve import types
from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.protocol.messages import Embed, Submit
from jaxserve.types import EmbeddingInfo, ModelInfo, SamplingParams

_KEY = re.compile("[0-9a-f]{16}")


def check_submit(message: Submit, model: ModelInfo) -> list[int]:
    """The prompt as one list of token ids.

    Raises:
        InvalidRequest: a value is outside what the engine can hold; names it and the limit.
    """
    num_choices = len(message.sequence_ids)
    if not 1 <= num_choices <= types.MAX_CHOICES or len(set(message.sequence_ids)) != num_choices:
        raise InvalidRequest(
            f"n must be between 1 and {types.MAX_CHOICES} different sequences, got {num_choices}",
            param="n",
        )
    prompt = [token for segment in message.prompt for token in segment.token_ids]
    if not prompt:
        raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
    _check_tokens("prompt", prompt, model)
    _check_sampling(message.sampling, model)
    if len(message.cache_salt) > types.MAX_CACHE_SALT:
        raise InvalidRequest(
            f"cache_salt has {len(message.cache_salt)} characters, at most {types.MAX_CACHE_SALT}",
            param="cache_salt",
        )
    if not -(2**31) <= message.priority < 2**31:
        raise InvalidRequest(f"priority {message.priority} is not a 32-bit integer")
    _check_range("weight", message.weight, types.MIN_WEIGHT, types.MAX_WEIGHT)
    request_number(message.request_key)
    _check_resumed(message, len(prompt), model)
    return prompt


def check_embed(message: Embed, model: EmbeddingInfo) -> None:
    """Sees to it that texts fit the arrays, as `check_submit` does for prompts.

    Raises:
        InvalidRequest, ContextTooLong: a value is outside what the engine can hold; names it and
            the limit.
    """
    ids, texts = message.sequence_ids, message.texts
    if not ids or len(set(ids)) != len(ids) or len(ids) != len(texts):
        raise InvalidRequest(f"there must be one sequence for each text, got {len(texts)} texts")
    if message.second_starts and len(message.second_starts) != len(texts):
        raise InvalidRequest(f"second_starts must be of all {len(texts)} texts, or of none")
    for text in texts:
        if not text:
            raise InvalidRequest("a text is empty; it needs at least one token", param="input")
        if len(text) > model.max_length:
            raise ContextTooLong(
                f"a text has {len(text)} tokens, the limit is {model.max_length}; shorten it, or "
                "have it truncated",
                param="input",
            )
        if min(text) < 0 or max(text) >= model.vocab_size:
            raise InvalidRequest(
                f"token ids of a text must be between 0 and {model.vocab_size - 1}", param="input"
            )
    for start in message.second_starts:
        _check_range("second_starts", start, 0, 2**31 - 1)
    params = message.params
    if params.pooling not in types.POOLINGS:
        raise InvalidRequest(f"pooling must be one of {', '.join(types.POOLINGS)}", param="pooling")
    _check_range("dimensions", params.dimensions, 0, model.dimensions)
    _check_range("priority", message.priority, -(2**31), 2**31 - 1)
    _check_range("weight", message.weight, types.MIN_WEIGHT, types.MAX_WEIGHT)
    _check_range("attempt", message.attempt, 0, 2**31 - 1)
    request_number(message.request_key)


def request_number(request_key: str) -> int:
    """The key as the flight recorder has it; 0 where there is none.

    Raises:
        InvalidRequest: it is not a key.
    """
    if not request_key:
        return 0
    if not _KEY.fullmatch(request_key):
        raise InvalidRequest(f"request_key {request_key[:32]!r} is not 16 hexadecimal digits")
    return int(request_key, 16)


def _check_resumed(message: Submit, prompt_len: int, model: ModelInfo) -> None:
    """What a request brings along from a life of the engine that ended."""
    if message.attempt == 0:
        if message.choices or message.emitted or message.prompt_logprobs_done:
            raise InvalidRequest("a request that goes on must have attempt above 0")
        return
    _check_range("attempt", message.attempt, 0, 2**31 - 1)
    _check_range("prompt_logprobs_done", message.prompt_logprobs_done, 0, prompt_len - 1)
    num_choices, choices = len(message.sequence_ids), message.choices
    if choices and (
        len(choices) != num_choices
        or sorted(set(choices)) != choices
        or not 0 <= choices[0] <= choices[-1] < types.MAX_CHOICES
    ):
        raise InvalidRequest(
            f"choices must be {num_choices} ascending indexes below {types.MAX_CHOICES}"
        )
    if message.emitted and len(message.emitted) != num_choices:
        raise InvalidRequest(f"emitted must have a list for each of {num_choices} sequences")
    if message.queued_ns and len(message.queued_ns) != num_choices:
        raise InvalidRequest(f"queued_ns must have a number for each of {num_choices} sequences")
    for queued_ns in message.queued_ns:
        _check_range("queued_ns", queued_ns, 0, 2**63 - 1)
    for emitted in message.emitted:
        if len(emitted) >= message.sampling.max_tokens:
            raise InvalidRequest(
                f"emitted has {len(emitted)} tokens, max_tokens is {message.sampling.max_tokens}"
            )
        _check_tokens("emitted", emitted, model)


def _check_sampling(sampling: SamplingParams, model: ModelInfo) -> None:
    if sampling.max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens must be at least 1, got {sampling.max_tokens}", param="max_tokens"
        )
    _check_range("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    _check_range("seed", sampling.seed, -(2**63), 2**64 - 1)
    _check_range("temperature", sampling.temperature, 0.0, 1e6)
    _check_range("top_k", sampling.top_k, 0, 2**31 - 1)
    _check_range("top_p", sampling.top_p, 0.0, 1.0)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("presence_penalty", sampling.presence_penalty, -1e6, 1e6)
    _check_range("frequency_penalty", sampling.frequency_penalty, -1e6, 1e6)
    _check_range("repetition_penalty", sampling.repetition_penalty, 1e-6, 1e6)
    _check_range("logprobs", sampling.logprobs or 0, 0, types.MAX_LOGPROBS)
    _check_range("prompt_logprobs", sampling.prompt_logprobs or 0, 0, types.MAX_LOGPROBS)
    _check_length("stop_token_ids", sampling.stop_token_ids, types.MAX_STOP_TOKEN_IDS)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, model)
    _check_length("logit_bias", sampling.logit_bias, types.MAX_LOGIT_BIAS)
    _check_tokens("logit_bias", [token for token, _ in sampling.logit_bias], model)
    for _, bias in sampling.logit_bias:
        _check_range("logit_bias", bias, -1e6, 1e6)
    if sampling.allowed_token_ids is not None:
        _check_tokens("allowed_token_ids", sampling.allowed_token_ids, model)
        if not sampling.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids is empty", param="allowed_token_ids")
    _check_length("bad_words", sampling.bad_words, types.MAX_BAD_WORDS)
    for word in sampling.bad_words:
        _check_range("length of a bad word", len(word), 1, types.MAX_BAD_WORD_TOKENS)
        _check_tokens("bad_words", word, model)
    _check_something_is_left(sampling, model)
    _check_grammar(sampling)


def _check_something_is_left(sampling: SamplingParams, model: ModelInfo) -> None:
    """Bad words, and end tokens that min_tokens rules out, leave one of the allowed tokens."""
    if sampling.allowed_token_ids is None:
        return
    left = set(sampling.allowed_token_ids) - {w[0] for w in sampling.bad_words if len(w) == 1}
    if not left:
        raise InvalidRequest(
            "allowed_token_ids and bad_words leave no token to sample", param="bad_words"
        )
    if sampling.min_tokens:
        left -= {*sampling.stop_token_ids, *model.eos_token_ids}
        if not left:
            raise InvalidRequest(
                f"allowed_token_ids and min_tokens={sampling.min_tokens} leave no token to sample "
                "first: only tokens that end the sequence are allowed",
                param="min_tokens",
            )


def _check_grammar(sampling: SamplingParams) -> None:
    grammar = sampling.grammar
    if grammar is None:
        return
    if grammar.kind not in types.GRAMMAR_KINDS:
        raise InvalidRequest(f"there is no kind of grammar {grammar.kind[:40]!r}")
    if sampling.ignore_eos:
        raise InvalidRequest(
            "ignore_eos cannot be used with a grammar, whose end is an end token",
            param="ignore_eos",
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {value}", param=name)


def _check_length(name: str, values: tuple[object, ...], limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(f"{name} has {len(values)} entries, at most {limit}", param=name)


def _check_tokens(name: str, tokens: list[int] | tuple[int, ...], model: ModelInfo) -> None:
    if tokens and (min(tokens) < 0 or max(tokens) >= model.vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < model.vocab_size)
        raise InvalidRequest(
            f"{name} holds token id {wrong}, the vocabulary has ids 0 to {model.vocab_size - 1}",
            param=name,
        )
