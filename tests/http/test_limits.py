"""Rate limits over HTTP: headers, refusals, what is charged, and the key file's limits."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import yaml

from jaxserve.config import HttpConfig, LimitsConfig
from jaxserve.errors import ConfigError
from jaxserve.http.keyfile import load_keys
from jaxserve.limits.store import LocalStore, MemoryStore
from tests.http.frontend import CONFIG, Front
from tests.http.frontend import front as make_front
from tests.http.test_serve import TIMEOUT_S, address_of, started, wait_ready

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = {"authorization": "Bearer alice"}
OTHER_KEY = {"authorization": "Bearer bob"}
FREE_KEY = {"authorization": "Bearer free"}


def digest(key: str) -> str:
    """What stands in a key file."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_config(tmp_path, tenant: dict | None = None, key: dict | None = None) -> HttpConfig:
    """A configuration with keys of one limited tenant, and one of a free tenant."""
    rows = {
        "tenants": [{"name": "acme", **(tenant or {})}],
        "keys": [
            {"hash": digest("alice"), "tenant": "acme", **(key or {})},
            {"hash": digest("bob"), "tenant": "acme"},
            {"hash": digest("free"), "tenant": "nobody"},
        ],
    }
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(rows))
    return HttpConfig(key_file=str(path), max_choices=16)


class Limited:
    """A front over a store whose clock a test sets."""

    def __init__(self, made: Front, memory: MemoryStore, clock: list[float]) -> None:
        self.front, self.memory, self._clock = made, memory, clock

    def complete(self, headers=KEY, path=COMPLETIONS, **body):
        """A completion; by default 4 + 4 tokens."""
        fields = {"prompt": [300] * 4, "max_tokens": 4, "ignore_eos": True} | body
        return self.front.post(path, fields, headers=headers)

    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self._clock[0] += seconds

    def level(self, kind: str, scope: str = "tenant") -> float:
        """What is left in the only bucket of this scope and kind."""
        self.front.run(_settled(self.front))
        (name,) = [n for n in self.memory._accounts if n.startswith(scope) and n.endswith(kind)]
        return self.memory._accounts[name][1].left


async def _settled(front: Front) -> None:
    """Waits until what has ended has been settled."""
    limiter = front.app.frontend.gate.limiter
    assert limiter is not None
    while limiter._tasks:
        for task in list(limiter._tasks):
            await task


@contextmanager
def limited(tmp_path, tenant=None, key=None, **limits) -> Iterator[Limited]:
    """See `Limited`."""
    http = key_config(tmp_path, tenant, key)
    clock = [1000.0]
    memory = MemoryStore(lambda: clock[0])
    config = LimitsConfig(**limits)
    with make_front(http, load_keys(http), limits=config, store=LocalStore(memory)) as made:
        yield Limited(made, memory, clock)


def test_headers_and_refusal_are_openais(tmp_path):
    limits = {"requests_per_minute": 60, "burst_requests": 2, "tokens_per_minute": 6000}
    with limited(tmp_path, {"limits": limits}) as server:
        first = server.complete()
        assert first.status_code == 200
        told = {k: v for k, v in first.headers.items() if k.startswith("x-ratelimit")}
        assert told == {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "1",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-limit-tokens": "6000",
            "x-ratelimit-remaining-tokens": "5992",
            "x-ratelimit-reset-tokens": "80ms",
        }
        assert server.complete(stream=True).headers["x-ratelimit-remaining-requests"] == "0"
        refused = server.complete(OTHER_KEY)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert "60 requests a minute" in error["message"]
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["retry-after-ms"] == "1000"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        again = server.complete(OTHER_KEY, seed=1)
        assert again.headers["retry-after-ms"] == "2000"  # a slot of its own
        server.wait(1)
        assert server.complete(OTHER_KEY).status_code == 200
        assert server.complete(OTHER_KEY, seed=1).status_code == 429
        server.wait(1)
        assert server.complete(OTHER_KEY, seed=1).status_code == 200
        free = server.complete(FREE_KEY)
        assert free.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in free.headers)
        text = server.front.get("/metrics", headers=FREE_KEY)
        assert text.status_code == 403
        metrics = server.front.app.frontend.metrics.render().decode()
        assert 'jaxserve_rate_limited_total{kind="requests",scope="tenant"} 3.0' in metrics
        assert 'jaxserve_requests_total{route="/v1/completions",status="429"} 3.0' in metrics


def test_a_response_is_charged_what_it_used_and_refused_by_what_it_asks(tmp_path):
    body = {"input": "hi", "max_output_tokens": 8, "ignore_eos": True}
    tool = {"type": "function", "name": "f", "description": "x" * 3000}
    with limited(tmp_path, {"limits": {"tokens_per_minute": 600}}) as server:
        done = server.front.post("/v1/responses", body, headers=KEY)
        used = done.json()["usage"]["total_tokens"]
        assert server.level("tokens") == 600 - used and used == len("user: hi\nassistant: ") + 8
        assert done.headers["x-ratelimit-remaining-tokens"] == str(600 - used)
        for more in ({"max_output_tokens": 590}, {"tools": [tool]}, {"instructions": "x" * 3000}):
            refused = server.front.post("/v1/responses", body | more, headers=KEY)
            assert refused.status_code in (400, 429), more
            code = refused.json()["error"]["code"]
            assert code in ("request_exceeds_rate_limit", "rate_limit_exceeded"), more
        assert server.level("tokens") == 600 - used


def test_what_is_charged_is_what_was_used(tmp_path):
    with limited(tmp_path, {"limits": {"tokens_per_minute": 600}}) as server:
        stopped = server.complete(max_tokens=100, ignore_eos=False, prompt="ab", seed=3)
        usage = stopped.json()["usage"]
        assert server.level("tokens") == 600 - usage["total_tokens"]
        server.wait(60)
        for body in ({"n": 3}, {"prompt": [[300] * 4, [301] * 4], "n": 2}, {"best_of": 3}):
            used = server.complete(**body).json()["usage"]["total_tokens"]
            assert server.level("tokens") == 600 - used
            server.wait(60)
        chat = server.complete(path=CHAT, prompt=None, messages=[{"role": "user", "content": "hi"}])
        assert server.level("tokens") == 600 - chat.json()["usage"]["total_tokens"]
        server.wait(60)
        assert server.complete(temperature=-1).status_code == 400
        assert server.complete(max_tokens=-5).status_code == 400
        assert server.complete(user=7).status_code == 400
        assert server.complete(messages=7, path=CHAT).status_code == 400
        assert server.level("tokens") == 600
        assert server.memory.num_reservations == 0


def test_a_reservation_is_trued_up_after_tokenizing_and_given_back_if_it_is_too_much(tmp_path):
    with limited(tmp_path, {"limits": {"tokens_per_minute": 200}}) as server:
        ratio = server.front.app.frontend.gate.ratio
        for _ in range(1000):
            ratio.learn(1000, 100)  # this tokenizer makes one of each byte
        held = server.complete(prompt="x" * 150, max_tokens=4)
        assert held.status_code == 200  # reserved 20, then 154
        server.wait(60)
        assert server.complete(prompt="x" * 60, max_tokens=4).status_code == 200
        refused = server.complete(prompt="y" * 150, max_tokens=4)
        assert refused.status_code == 429
        assert "154 tokens" in refused.json()["error"]["message"]
        assert server.level("tokens") == 136 and server.memory.num_reservations == 0
        server.wait(float(refused.headers["retry-after-ms"]) / 1000)
        assert server.complete(prompt="y" * 150, max_tokens=4).status_code == 200


def test_what_can_never_fit_is_a_400_without_a_time(tmp_path):
    limits = {"tokens_per_minute": 6000, "burst_tokens": 100}
    with limited(tmp_path, {"limits": limits}) as server:
        for body in ({"max_tokens": 97}, {"max_tokens": 40, "n": 3}, {"max_tokens": 2**31 - 1}):
            response = server.complete(**body)
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("request_exceeds_rate_limit", "max_tokens")
            assert "100 tokens" in error["message"]
            assert "retry-after" not in response.headers
        assert server.complete(max_tokens=96).status_code == 200


def test_output_without_max_tokens_reserves_the_default_and_owes_the_rest(tmp_path):
    with limited(
        tmp_path, {"limits": {"tokens_per_minute": 200}}, default_output_tokens=50
    ) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
        response = server.front.post(CHAT, body, headers=KEY)
        used = response.json()["usage"]["total_tokens"]
        assert used == CONFIG.model.max_context > 200
        assert int(response.headers["x-ratelimit-remaining-tokens"]) >= 100
        assert server.level("tokens") == 200 - used  # below zero
        refused = server.front.post(CHAT, body, headers=KEY)
        assert refused.status_code == 429


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x" * 5000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"tokens": [72] * 5000}),
    ],
    ids=["prompt", "messages", "detokenize"],
)
def test_the_tokenizer_counts_as_a_request_and_no_tokens(tmp_path, path, body):
    limits = {"requests_per_minute": 60, "burst_requests": 3}
    limits |= {"tokens_per_minute": 600, "burst_tokens": 50}
    with limited(tmp_path, {"limits": limits}) as server:
        assert server.complete(max_tokens=46).status_code == 200  # all tokens that there are
        first = server.front.post(path, body, headers=KEY)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "60"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-tokens"] == "0"
        wrong = server.front.post(path, {"model": None}, headers=KEY)
        assert wrong.status_code == 400  # and counted
        refused = server.front.post(path, body, headers=OTHER_KEY)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after-ms"] == "1000"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert server.front.post(path, body, headers=FREE_KEY).status_code == 200
        server.wait(1)
        assert server.front.post(path, body, headers=OTHER_KEY).status_code == 200
        assert (server.level("requests"), server.level("tokens")) == (0, 10)
        assert server.memory.num_reservations == 0
        metrics = server.front.app.frontend.metrics.render().decode()
        assert f'jaxserve_requests_total{{route="{path}",status="429"}} 1.0' in metrics


def test_the_tokenizer_counts_for_the_user_that_it_is_told(tmp_path):
    tenant = {"user_limits": {"requests_per_minute": 6, "burst_requests": 1}}
    with limited(tmp_path, tenant) as server:
        for path, body in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [72]})):
            for user, statuses in (("a" + path, [200, 429]), ("b" + path, [200, 429])):
                posted = [server.front.post(path, body | {"user": user}, headers=KEY) for _ in "12"]
                assert [response.status_code for response in posted] == statuses
        assert server.front.post("/tokenize", {"user": 7}, headers=KEY).status_code == 400


def test_users_have_buckets_of_their_own_and_share_their_tenants(tmp_path):
    tenant = {
        "limits": {"requests_per_minute": 60, "burst_requests": 5},
        "user_limits": {"requests_per_minute": 6, "burst_requests": 2},
    }
    with limited(tmp_path, tenant) as server:
        huge = "x" * 30_000
        statuses = [
            server.complete(user=user).status_code
            for user in (huge, huge, huge, "a\0b", None, "tenant:acme:requests", "more")
        ]
        # Two each; then the tenant's five are used up.
        assert statuses == [200, 200, 429, 200, 200, 200, 429]
        metrics = server.front.app.frontend.metrics.render().decode()
        assert 'jaxserve_rate_limited_total{kind="requests",scope="user"} 1.0' in metrics
        assert 'jaxserve_rate_limited_total{kind="requests",scope="tenant"} 1.0' in metrics


def test_a_key_has_limits_within_its_tenants(tmp_path):
    key = {"limits": {"requests_per_minute": 6, "burst_requests": 1}}
    with limited(tmp_path, {"limits": {"requests_per_minute": 60}}, key) as server:
        assert server.complete().status_code == 200
        refused = server.complete()
        assert refused.status_code == 429 and "API key" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "10"
        assert server.complete(OTHER_KEY).status_code == 200
        assert server.level("requests", "key") == 0


def test_a_client_that_says_it_repeats_keeps_its_slot(tmp_path):
    limits = {"requests_per_minute": 6, "burst_requests": 1}
    with limited(tmp_path, {"limits": limits}) as server:
        server.complete()
        assert server.complete(seed=1).headers["retry-after"] == "10"
        server.wait(2)
        early = server.complete(KEY | {"x-stainless-retry-count": "1"}, seed=1)
        assert early.headers["retry-after"] == "8"
        assert server.complete(seed=2).headers["retry-after"] == "18"


def test_without_limited_keys_there_is_no_limiter():
    with make_front() as made:
        assert made.app.frontend.gate.limiter is None
        response = made.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 1})
        assert response.status_code == 200
        assert not any(name.startswith("x-ratelimit") for name in response.headers)


@pytest.mark.parametrize(
    ("tenants", "key", "words"),
    [
        (5, {}, "list of rows"),
        ([{"nam": "a"}], {}, "'name'"),
        ([{"name": ""}], {}, "name"),
        ([{"name": "a"}, {"name": "a"}], {}, "before it"),
        ([{"name": "a", "weight": 0}], {}, "weight"),
        ([{"name": "a", "weight": True}], {}, "weight"),
        ([{"name": "a", "weight": math.nan}], {}, "weight"),
        ([{"name": "a", "limits": {"requests_per_minute": -5}}], {}, "limits: requests"),
        ([{"name": "a", "priority": 0, "priority_ceiling": 1}], {}, "own ceiling"),
        ([{"name": "a", "priority_ceiling": 0}], {"priority_ceiling": -1}, "its tenant's"),
        ([{"name": "a", "priority_ceiling": 0}], {"priority": -1}, "its tenant's"),
        ([], {"limits": 5}, "mapping"),
    ],
)
def test_wrong_tenants_fail_at_start(tmp_path, tenants, key, words):
    path = tmp_path / "keys.yaml"
    rows = {"tenants": tenants, "keys": [{"hash": digest("x"), "tenant": "a"} | key]}
    path.write_text(yaml.safe_dump(rows))
    with pytest.raises(ConfigError, match=words):
        load_keys(HttpConfig(key_file=str(path)))


def test_a_key_takes_over_what_its_tenant_has(tmp_path):
    tenant = {"weight": 3, "priority": 5, "priority_ceiling": -5}
    http = key_config(tmp_path, tenant, {"priority": 0})
    ring = load_keys(http)
    alice, bob = (ring.identify(f"Bearer {key}".encode()) for key in ("alice", "bob"))
    assert (alice.priority, alice.priority_ceiling, alice.weight) == (0, -5, 3)
    assert (bob.priority, bob.priority_ceiling, bob.weight) == (5, -5, 3)
    assert not ring.is_limited
    free = ring.identify(b"Bearer free")
    assert (free.priority, free.priority_ceiling, free.weight) == (0, 0, 1)


def test_workers_keep_one_limit_together(tmp_path):
    limits = {"requests_per_minute": 0.01, "burst_requests": 5}
    config = key_config(tmp_path, {"limits": limits})
    with started("http.workers=2", f"http.key_file={config.key_file}") as process:
        base = address_of(process)
        wait_ready(base)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        statuses = [  # each over a connection of its own, so that both workers get some
            httpx.post(f"{base}{CHAT}", json=body | {"seed": n}, headers=KEY).status_code
            for n in range(16)
        ]
        assert statuses == [200] * 5 + [429] * 11
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def test_a_wrong_redis_url_is_one_sentence():
    with started("limits.redis_url=http://x") as process:
        assert process.wait(TIMEOUT_S) == 1
        error = process.stderr.read()
    assert "limits.redis_url" in error and len(error.splitlines()) == 1


def test_what_is_only_guessed_makes_no_request_larger_than_is_ever_given(tmp_path):
    """Neither an output that nobody bounded, nor the tokens of text before they are counted."""
    limits = {"limits": {"tokens_per_minute": 6000, "burst_tokens": 130}}
    with limited(tmp_path, limits, default_output_tokens=512) as server:
        front = server.front
        free = {"prompt": [300] * 4, "ignore_eos": True}  # 16 tokens, unless it says otherwise
        assert front.post(COMPLETIONS, free, headers=KEY).status_code == 200
        assert server.level("tokens") == 130 - 4 - 16
        server.wait(60)
        chat = {"messages": [{"role": "user", "content": "x" * 60}], "ignore_eos": True}
        assert front.post(CHAT, chat | {"max_tokens": 4}, headers=KEY).status_code == 200
        used = 60 + len("user: \nassistant: ") + 4
        assert server.level("tokens") == 130 - used
        server.wait(60)
        assert front.post(CHAT, chat, headers=KEY).status_code == 200  # to the context's end
        assert server.level("tokens") < 0
        server.wait(60)
        for body in (chat | {"max_tokens": 131}, free | {"prompt": [300] * 131}):
            path = CHAT if "messages" in body else COMPLETIONS
            refused = front.post(path, body, headers=KEY)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "request_exceeds_rate_limit"
        wrong = front.post(COMPLETIONS, free | {"max_tokens": -5}, headers=KEY)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_value")


def test_a_refusal_does_not_say_that_a_part_of_a_request_is_one(tmp_path):
    limits = {"limits": {"requests_per_minute": 60, "burst_requests": 1}}
    with limited(tmp_path, limits) as server:
        assert server.complete().status_code == 200
        server.wait(0.6)
        refused = server.complete()
        assert refused.status_code == 429 and "0 are left" in refused.json()["error"]["message"]
