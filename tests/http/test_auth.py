"""Keys, roles, CORS: who may call, and what a refusal says."""

from __future__ import annotations

import hashlib
import hmac

import pytest
import yaml

from jaxserve.config import HttpConfig
from jaxserve.errors import ConfigError, Unauthenticated
from jaxserve.http.auth import ANONYMOUS, Identity, KeyRing, check_exposure
from jaxserve.http.keyfile import load_keys
from tests.http.frontend import Front
from tests.http.frontend import front as make_front

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def digest(key: str) -> str:
    """What stands in a key file."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_file(tmp_path, rows) -> HttpConfig:
    """A configuration with a key file."""
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump(rows))
    return HttpConfig(key_file=str(path))


ROWS = {
    "keys": [
        {"hash": digest("alice"), "tenant": "acme", "priority": 5, "priority_ceiling": 2},
        {"hash": digest("root"), "tenant": "ops", "role": "admin"},
    ]
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """An application with two keys."""
    config = key_file(tmp_path_factory.mktemp("keys"), ROWS)
    with make_front(HttpConfig(cors_origins=("https://app.example",)), load_keys(config)) as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("mallory"), bearer(""), {"authorization": "alice"}, {"authorization": "Basic a"}],
)
def test_without_a_known_key_is_401(guarded: Front, headers):
    for path in (CHAT, "/tokenize", "/v1/nothing"):
        response = guarded.post(path, BODY, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


def test_keys_open_what_their_role_allows(guarded: Front):
    assert guarded.post(CHAT, BODY, headers=bearer("alice")).status_code == 200
    assert guarded.post(CHAT, BODY, headers={"authorization": "bearer alice"}).status_code == 200
    denied = guarded.get("/metrics", headers=bearer("alice"))
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "forbidden")
    assert guarded.get("/metrics", headers=bearer("root")).status_code == 200
    assert guarded.get("/slo", headers=bearer("alice")).status_code == 403
    assert guarded.get("/slo", headers=bearer("root")).status_code == 503  # nothing observes here
    for path in ("/health", "/live", "/ready"):
        assert guarded.get(path).status_code == 200


def test_priorities_have_a_ceiling(guarded: Front, monkeypatch):
    sent = []
    send = guarded.client.send
    watch = lambda message: (sent.append(message), send(message))  # noqa: E731
    monkeypatch.setattr(guarded.client, "send", watch)
    for body in (BODY, BODY | {"priority": 2}, BODY | {"priority": "low"}, BODY | {"priority": 1}):
        response = guarded.post(CHAT, body, headers=bearer("alice"))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (403, "priority")
    assert "1" in error["message"] and "2" in error["message"]
    submits = [message for message in sent if hasattr(message, "prompt")]
    assert [(s.priority, s.tenant) for s in submits] == [(5, "acme"), (2, "acme"), (10, "acme")]


def test_priorities_have_words(guarded: Front):
    for word, code in (("high", 403), ("normal", 403), ("urgent", 400)):
        response = guarded.post(CHAT, BODY | {"priority": word}, headers=bearer("alice"))
        assert (response.status_code, response.json()["error"]["param"]) == (code, "priority")
    assert "high, normal, low" in response.json()["error"]["message"]


def test_every_row_is_compared_whichever_matches(monkeypatch):
    rows = [(hashlib.sha256(bytes([i])).digest(), Identity(tenant=str(i))) for i in range(5)]
    calls = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (calls.append(a), compare(a, b))[1])
    ring = KeyRing(rows)
    for key, found in ((b"\x00", "0"), (b"\x04", "4"), (b"nobody", None)):
        calls.clear()
        if found is None:
            with pytest.raises(Unauthenticated):
                ring.identify(b"Bearer " + key)
        else:
            assert ring.identify(b"Bearer " + key).tenant == found
        assert calls == [row for row, _ in rows]


def test_browsers_of_configured_origins_may_call(guarded: Front):
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = guarded.run(guarded.http.options(CHAT, headers=asked))
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    other = asked | {"origin": "https://evil.example"}
    refused = guarded.run(guarded.http.options(CHAT, headers=other))
    assert "access-control-allow-origin" not in refused.headers
    unknown = guarded.post(CHAT, BODY, headers={"origin": "https://app.example"})
    assert unknown.status_code == 401  # and the page may read why
    assert unknown.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "'keys'"),
        ({"keys": []}, "'keys'"),
        ({"keys": [5]}, "row 1"),
        ({"keys": [{"hash": "alice", "tenant": "a"}]}, "64 hexadecimal"),
        ({"keys": [{"hash": digest("a")}]}, "tenant"),
        ({"keys": [{"hash": digest("a"), "tenant": "a", "role": "king"}]}, "king"),
        ({"keys": [{"hash": digest("a"), "tenant": "a", "rolle": "user"}]}, "'role'"),
        ({"keys": [{"hash": digest("a"), "tenant": "a", "priority": "x"}]}, "priority"),
        ({"keys": [{"hash": digest("a"), "tenant": "a", "priority_ceiling": 3}]}, "ceiling 3"),
        ({"keys": [{"hash": digest("a"), "tenant": t} for t in "ab"]}, "twice"),
    ],
)
def test_wrong_key_files_fail_at_start(tmp_path, rows, words):
    with pytest.raises(ConfigError, match=words):
        load_keys(key_file(tmp_path, rows))


def test_a_missing_key_file_fails_at_start(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_keys(HttpConfig(key_file=str(tmp_path / "missing.yaml")))


def test_without_a_key_file_only_loopback_is_served(tmp_path):
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        check_exposure(HttpConfig(host=host))
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match=r"http\.key_file"):
            check_exposure(HttpConfig(host=host))
    check_exposure(HttpConfig(host="0.0.0.0", key_file="keys.yaml"))
    assert KeyRing().identify(None) is ANONYMOUS and ANONYMOUS.admin


def test_a_tenant_cannot_tell_what_another_has_sent(guarded: Front):
    """Nor by a salt that comes to the same letters as the other's name."""
    message = [{"role": "user", "content": "a secret that is long enough to fill some pages"}]

    def cached(key: str, **changes) -> int:
        response = guarded.post(CHAT, BODY | {"messages": message} | changes, headers=bearer(key))
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    salt = {"cache_salt": "salt"}
    first, second = cached("alice", **salt), cached("alice", **salt)
    assert first == 0 < second
    assert [cached("root", **salt), cached("root", **salt)] == [0, second]
    assert cached("root", cache_salt="acmesalt") == cached("root", cache_salt="acme") == 0
