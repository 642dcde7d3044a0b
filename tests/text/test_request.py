"""Offline requests: whatever the values' types are, a planned request or a typed error."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.check import check_submit
from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.protocol.streams import StreamState
from jaxserve.protocol.transport import submit_message
from jaxserve.text.request import PlannedRequest, Request, make_request, plan
from jaxserve.text.template import ChatTemplate
from jaxserve.types import ModelInfo, SamplingParams
from tests.fakes.tokenizer import CHAT_TEMPLATE, ByteTokenizer

TOKENIZER = ByteTokenizer()
MODEL = ModelInfo(name="m", max_context=512, vocab_size=512, eos_token_ids=(2,), cache_groups=())
USER = [{"role": "user", "content": "hi"}]
NAMES = [field.name for field in dataclasses.fields(Request)]


def planned(**options: Any) -> PlannedRequest:
    """With a prompt, unless the options say what is asked."""
    if not {"prompt", "messages"} & options.keys():
        options = {"prompt": "abc", **options}
    return plan(make_request(**options), TOKENIZER, ChatTemplate(CHAT_TEMPLATE), MODEL)


def test_what_is_not_given_has_the_defaults_of_the_sampling_parameters() -> None:
    request = planned()
    assert request.text == "abc" and request.token_ids == [97, 98, 99]
    assert request.sampling == SamplingParams(max_tokens=256, seed=request.sampling.seed)
    assert 0 <= request.sampling.seed < 2**63
    assert planned().sampling.seed != request.sampling.seed


def test_none_stands_for_a_default() -> None:
    nothing = dict.fromkeys(set(NAMES) - {"prompt", "seed"})
    assert planned(**nothing, prompt="abc", seed=1) == planned(seed=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"logit_bias": {"65": 1, 66: -2.5}}, {"logit_bias": ((65, 1.0), (66, -2.5))}),
        ({"logit_bias": [(65, 1), [66, 2]]}, {"logit_bias": ((65, 1.0), (66, 2.0))}),
        ({"logit_bias": {65: np.float32(0.5)}.items()}, {"logit_bias": ((65, 0.5),)}),
        ({"bad_words": ["a", " b", [1, 2], (3,)]},
         {"bad_words": ((97,), (32, 97), (32, 98), (1, 2), (3,))}),
        ({"stop_token_ids": np.array([1, 2])}, {"stop_token_ids": (1, 2)}),
        ({"allowed_token_ids": {7}}, {"allowed_token_ids": (7,)}),
        ({"temperature": 0, "top_p": np.float64(0.5)}, {"temperature": 0.0, "top_p": 0.5}),
        ({"ignore_eos": True, "top_k": np.int32(4)}, {"ignore_eos": True, "top_k": 4}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"logprobs": 0, "prompt_logprobs": 3}, {"logprobs": 0, "prompt_logprobs": 3}),
    ],
)  # fmt: skip
def test_values_become_the_types_of_the_engine(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    sampling = planned(**options).sampling
    for name, value in expected.items():
        got = getattr(sampling, name)
        assert got == value and type(got) is type(value)
        assert list(map(type, flat(got))) == list(map(type, flat(value)))


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return list(itertools.chain.from_iterable(map(flat, value)))
    return [value]


def test_stops_are_one_string_or_several() -> None:
    assert planned(stop="a").request.stops == ["a"]
    assert planned(stop=["a", "b"]).request.stops == planned(stop=("a", "b")).request.stops
    assert sorted(planned(stop={"a", "b"}).request.stops) == ["a", "b"]
    assert planned().request.stops == []


def test_a_conversation_and_its_variables() -> None:
    assert planned(messages=USER).text == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    continued = planned(messages=USER, template={"add_generation_prompt": False, "a b": 1})
    assert continued.text == "<|im_start|>user\nhi<|im_end|>"


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"prompt": 5}, "prompt takes text or token ids, got 5", "prompt"),
        ({"prompt": {}}, "prompt takes text or token ids, got {}", "prompt"),
        ({"prompt": b"abc"}, "prompt takes text or token ids, got b'abc'", "prompt"),
        ({"prompt": ["a"]}, "prompt takes text or token ids, got 'a'", "prompt"),
        ({"prompt": [True]}, "prompt takes text or token ids, got True", "prompt"),
        ({"prompt": [10**9000]}, "prompt holds an integer of 29898 bits", "prompt"),
        ({"prompt": "a", "messages": USER}, "either a prompt or messages", "prompt"),
        ({"cache_salt": 5}, "cache_salt takes a string of at most 256 characters", "cache_salt"),
        ({"cache_salt": "a" * 257}, "cache_salt takes a string of at most 256", "cache_salt"),
        ({"n": "2"}, "n takes an integer, got '2'", "n"),
        ({"n": True}, "n takes an integer, got True", "n"),
        ({"n": 129}, "n must be between 1 and 128, got 129", "n"),
        ({"seed": 2**64}, "seed holds an integer of 65 bits, 64 is the limit", "seed"),
        ({"seed": 1.0}, r"seed takes an integer, got 1\.0", "seed"),
        ({"temperature": "hot"}, "temperature takes a number, got 'hot'", "temperature"),
        ({"temperature": False}, "temperature takes a number, got False", "temperature"),
        ({"temperature": 10**400}, "temperature takes a number, got 1000", "temperature"),
        ({"temperature": np.zeros(2)}, "temperature takes a number", "temperature"),
        ({"top_k": np.zeros(2, int)}, "top_k takes an integer", "top_k"),
        ({"ignore_eos": "no"}, "ignore_eos takes true or false, got 'no'", "ignore_eos"),
        ({"include_stop": 1}, "include_stop takes true or false, got 1", "include_stop"),
        ({"skip_special_tokens": []}, "skip_special_tokens takes true", "skip_special_tokens"),
        ({"stop": 5}, "stop takes non-empty strings, got 5", "stop"),
        ({"stop": {"a": 1}}, "stop takes non-empty strings, got {'a': 1}", "stop"),
        ({"stop": ["a", None]}, r"stop takes non-empty strings, got \['a', None\]", "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids takes token ids, got 5", "stop_token_ids"),
        ({"allowed_token_ids": {"1": 2}}, "allowed_token_ids takes token ids", None),
        ({"logit_bias": 5}, "logit_bias takes a number by token id, got 5", "logit_bias"),
        ({"logit_bias": "abc"}, "logit_bias takes a number by token id", "logit_bias"),
        ({"logit_bias": [[1, 2, 3]]}, "logit_bias takes a number by token id", "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias takes an integer, got 'x'", "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias takes a number, got 'x'", "logit_bias"),
        ({"bad_words": "abc"}, "bad_words takes a list of strings or of token ids", "bad_words"),
        ({"bad_words": [""]}, "bad_words takes non-empty strings or token ids", "bad_words"),
        ({"bad_words": [5]}, "bad_words takes non-empty strings or token ids", "bad_words"),
        ({"messages": "hi"}, "messages must be a list of 1 to 10000 messages", "messages"),
        ({"messages": [5]}, r"messages\[0\] must be an object, got 5", "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "content must be a string", None),
        ({"messages": USER, "template": 5}, "template takes variables of the chat", "template"),
        ({"messages": USER, "template": {1: 2}}, "template takes variables of the", "template"),
        ({"messages": USER, "template": {"messages": 1}}, "a variable 'messages'", "template"),
        ({"messages": USER, "template": {"self": 1}}, "a variable 'self'", "template"),
        ({"messages": USER, "template": {"tools": [1]}}, "must be a list of objects", "template"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0", "max_tokens"),
        ({"x" * 10_000: 1}, "unknown option 'xxx", None),
        ({"temprature": 1}, "unknown option 'temprature'; the nearest is 'temperature'", None),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(options: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        planned(**options)
    assert len(error.value.message) < 300
    if param is not None:
        assert error.value.param == param


def test_the_context_is_named() -> None:
    with pytest.raises(ContextTooLong, match="512 tokens and 1 more .* context is 512") as error:
        planned(prompt="a" * 512)
    assert error.value.param == "prompt"
    assert planned(prompt="a" * 511).sampling.max_tokens == 1
    with pytest.raises(ContextTooLong) as error:
        planned(prompt="a" * 12, max_tokens=501)
    assert error.value.param == "max_tokens"
    assert planned(prompt="a" * 12, max_tokens=500).sampling.max_tokens == 500


def test_what_nests_deeply_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for options in (
        {"stop": deep},
        {"logit_bias": deep},
        {"prompt": deep},
        {"messages": [{"role": "user", "content": deep}]},
        {"messages": [{"role": deep, "content": "x"}]},
    ):
        with pytest.raises(InvalidRequest) as error:
            planned(**options)
        assert len(error.value.message) < 300
    while deep:  # freed level by level: its own end would recurse
        deep = deep.pop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_json_is_planned_or_refused(options: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        request = planned(**options)
        stream = StreamState(range(request.request.n))
        message = submit_message(stream, request.token_ids, request.sampling)
        assert check_submit(message, MODEL) == request.token_ids
