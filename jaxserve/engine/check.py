"""The engine's own check of a request, before it can touch device arrays.

The front end validates with OpenAI's field names; this is the last line, against a client that
does not: whatever passes here fits the arrays' types and bounds.
"""

from __future__ import annotations

from jaxserve import types
from jaxserve.errors import InvalidRequest
from jaxserve.protocol.messages import Submit
from jaxserve.types import ModelInfo, SamplingParams


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
    return prompt


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
