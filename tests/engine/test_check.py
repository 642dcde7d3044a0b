"""The engine's last line against a client that does not validate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from jaxserve.engine.check import check_submit
from jaxserve.errors import InvalidRequest
from jaxserve.protocol.messages import Submit, TokenSegment
from jaxserve.types import ModelInfo, SamplingParams

MODEL = ModelInfo(name="m", max_context=64, vocab_size=50, eos_token_ids=(0,), cache_groups=())
REQUEST = Submit(
    sequence_ids=[1],
    prompt=[TokenSegment(token_ids=[1, 2]), TokenSegment(token_ids=[3])],
    sampling=SamplingParams(max_tokens=4, seed=0),
    arrived_ns=1,
)


def test_a_long_cache_salt_is_refused() -> None:
    check_submit(dataclasses.replace(REQUEST, cache_salt="a" * 256), MODEL)
    with pytest.raises(InvalidRequest, match="257 characters, at most 256") as refused:
        check_submit(dataclasses.replace(REQUEST, cache_salt="a" * 257), MODEL)
    assert refused.value.param == "cache_salt"


def test_segments_become_one_prompt() -> None:
    assert check_submit(REQUEST, MODEL) == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 5),
        ("seed", 10**400),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("top_k", 2**31),
        ("top_p", 1.1),
        ("min_p", math.inf),
        ("presence_penalty", -math.inf),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("stop_token_ids", (50,)),
        ("stop_token_ids", tuple(range(33))),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (3, 10**30)),
        ("bad_words", ((1,),) * 65),
        ("bad_words", ((99,),)),
    ],
)
def test_what_the_device_cannot_hold_is_refused_by_name(field: str, value: Any) -> None:
    sampling = dataclasses.replace(REQUEST.sampling, **{field: value})
    with pytest.raises(InvalidRequest) as refused:
        check_submit(dataclasses.replace(REQUEST, sampling=sampling), MODEL)
    assert refused.value.param == field
    assert field in refused.value.message


@pytest.mark.parametrize("word", [(), tuple(range(9))])
def test_bad_words_have_bounds(word: tuple[int, ...]) -> None:
    sampling = dataclasses.replace(REQUEST.sampling, bad_words=(word,))
    with pytest.raises(InvalidRequest, match="bad word must be between 1 and 8"):
        check_submit(dataclasses.replace(REQUEST, sampling=sampling), MODEL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [TokenSegment(token_ids=[50])]}, "token id 50"),
        ({"sequence_ids": []}, "0"),
        ({"sequence_ids": [1, 1]}, "2"),
        ({"sequence_ids": list(range(129))}, "129"),
        ({"priority": 2**31}, "32-bit"),
        ({"weight": 0.0}, "weight must be between 0.001 and 1000.0, got 0.0"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_the_request_around_it(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check_submit(dataclasses.replace(REQUEST, **change), MODEL)
