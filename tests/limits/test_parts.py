"""Limits as they are written, estimated and told: quotas, ratios, headers, deadlines."""

from __future__ import annotations

import contextlib
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.limits.deadline import MAX_TIMEOUT_S, earliest_s, read_deadline
from jaxserve.limits.estimate import TokenRatio
from jaxserve.limits.headers import duration, rate_headers
from jaxserve.limits.quota import Limits, Quota, read_limits

NOW_S = 1_800_000_000.0


@pytest.mark.parametrize(
    ("value", "left_s"),
    [
        ("1800000002.5", 2.5),
        ("1800000002500", 2.5),
        ("1799999999", -1),
        ("2027-01-15T08:00:02.5Z", 2.5),
        ("2027-01-15T09:00:02+01:00", 2),
        ("30", 30),
        ("0.25", 0.25),
        ("4.999999284744263", 5),  # as a computed float is written
        ("500m", 0.5),
        ("500 ms", 0.5),
        ("5S", 5),
        ("5s", 5),
        ("2M", 120),
        ("1H", 3600),
        ("250000u", 0.25),
        ("250000000n", 0.25),
        ("99999999H", MAX_TIMEOUT_S),
        (" 12 ", 12),
    ],
)
def test_deadlines_in_all_their_forms(value, left_s):
    assert read_deadline(value.encode(), NOW_S) == pytest.approx(left_s, abs=1e-4)


@pytest.mark.parametrize(
    "value", ["", "soon", "-5", "5x", "1e9", "nan", "2027-01-15T08:00:02", "9" * 400, "\xff", "5 5"]
)
def test_other_deadlines_are_refused(value):
    with pytest.raises(InvalidRequest, match="x-request-deadline"):
        read_deadline(value.encode("latin-1"), NOW_S)


@given(value=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_deadline_raises_anything_else(value):
    with contextlib.suppress(InvalidRequest):
        assert read_deadline(value, NOW_S) <= MAX_TIMEOUT_S


def test_the_earliest_deadline_counts_and_the_default_only_where_none_is():
    assert earliest_s(None, 5.0, default_s=1.0) == 5.0
    assert earliest_s(3.0, 5.0, default_s=1.0) == 3.0
    assert earliest_s(None, None, default_s=1.0) == 1.0
    assert math.isinf(earliest_s(None, None, default_s=0.0))


def test_the_ratio_starts_careful_and_learns():
    ratio = TokenRatio()
    assert ratio.ratio == 1.0 and ratio.estimate(1000) == 1000
    rng = random.Random(1)
    prompts = [(1000, round(1000 * min(0.9, rng.lognormvariate(-1.4, 0.15)))) for _ in range(5000)]
    for num_bytes, num_tokens in prompts[:4000]:
        ratio.learn(num_bytes, num_tokens)
    over = sum(tokens > ratio.estimate(size) for size, tokens in prompts[4000:])
    assert over <= 20  # of 1000
    assert ratio.ratio < 0.45  # their mean is 0.25
    for _ in range(20_000):
        ratio.learn(100, 95)
    assert ratio.estimate(100) >= 95
    ratio.learn(0, 5)
    ratio.learn(10, 10_000_000)
    assert math.isfinite(ratio.ratio)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.006, "6ms"), (0.9999, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360.02, "6m0.02s")],
)
def test_durations_are_openais(seconds, text):
    assert duration(seconds) == text
    assert duration(3600 + 65) == "1h1m5s"


def test_headers_tell_the_tightest_bucket():
    quota = Quota(
        fixed=Limits(requests_per_minute=60, tokens_per_minute=6000).buckets("key", "k")
        + Limits(requests_per_minute=600, burst_requests=10).buckets("tenant", "t")
    )
    headers = rate_headers(quota.buckets(""), [40.0, -3.5, 9.0])
    assert headers == {
        b"x-ratelimit-limit-requests": b"600",
        b"x-ratelimit-remaining-requests": b"9",
        b"x-ratelimit-reset-requests": b"100ms",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"1m0.035s",
    }
    assert rate_headers(quota.buckets(""), []) == {}


def test_no_user_gets_out_of_its_bucket():
    per_user = Limits(requests_per_minute=6)
    quota = Quota(fixed=(), per_user=per_user, tenant="acme")
    users = ["", "a", "b", "a:requests", "a\0b", "key:x", "{x}", "*", "x" * 1_000_000, "\ud800"]
    names = [quota.buckets(user)[0].name for user in users]
    assert len(set(names)) == len(users)
    assert max(map(len, names)) < 60
    assert all(name.isprintable() and "{" not in name for name in names)
    other = Quota(fixed=(), per_user=per_user, tenant="acm")
    assert other.buckets("ea")[0].name not in names
    assert Quota(tenant="acm", per_user=per_user).buckets("e\0")[0].name != names[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (5, "mapping"),
        ({}, "empty"),
        ({"requests": 5}, "'requests'"),
        ({"requests_per_minute": 0}, "above 0"),
        ({"requests_per_minute": -1}, "-1"),
        ({"requests_per_minute": True}, "True"),
        ({"tokens_per_minute": "many"}, "many"),
        ({"tokens_per_minute": float("inf")}, "inf"),
        ({"burst_tokens": 5}, "tokens_per_minute"),
        ({"requests_per_minute": 5, "burst_requests": 0.5}, "nothing in"),
    ],
)
def test_wrong_limits_fail(row, words):
    with pytest.raises(ConfigError, match=words):
        read_limits("row 1", row)


def test_a_burst_is_a_minutes_worth_unless_it_is_given():
    made = Limits(requests_per_minute=60, tokens_per_minute=6000, burst_tokens=50).buckets("k", "x")
    assert [(b.rate, b.burst) for b in made] == [(1, 60), (100, 50)]
    assert not Quota().is_limited and Quota(fixed=made).is_limited


def test_a_limit_of_less_than_one_a_minute_lets_one_in():
    """One request each two minutes, and not none for ever."""
    (bucket,) = Limits(requests_per_minute=0.5).buckets("key", "x")
    assert (bucket.burst, bucket.rate) == (1, 0.5 / 60)
