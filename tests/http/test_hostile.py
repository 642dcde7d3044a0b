"""Whatever a client sends is answered with a 4xx that names the field, and harms nobody."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.frontend import CONFIG, expected

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
HI = [{"role": "user", "content": "hi"}]


def chat(**values: Any) -> tuple[str, dict]:
    """A chat request with one thing wrong."""
    return CHAT, {"messages": HI} | values


def completion(**values: Any) -> tuple[str, dict]:
    """A completion request with one thing wrong."""
    return COMPLETIONS, {"prompt": "hi"} | values


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# request, the field that the error names, words of its message
WRONG: list[tuple[tuple[str, dict], str | None, str]] = [
    (completion(prompt=None), "prompt", "null"),
    (completion(prompt=5), "prompt", "5"),
    (completion(prompt={}), "prompt", "{}"),
    (completion(prompt=[]), "prompt", "list of 0"),
    (completion(prompt=""), "prompt", "empty"),
    (completion(prompt=["a", ""]), "prompt", "empty"),
    (completion(prompt=["a", 1]), "prompt", "1"),
    (completion(prompt=[1, "a"]), "prompt", "511"),
    (completion(prompt=[[1], "a"]), "prompt", "a"),
    (completion(prompt=[[1], [None]]), "prompt", "null"),
    (completion(prompt=[512]), "prompt", "512"),
    (completion(prompt=[-1]), "prompt", "-1"),
    (completion(prompt=[True]), "prompt", "true"),
    (completion(prompt=[1.5]), "prompt", "1.5"),
    (completion(prompt=[10**30]), "prompt", "1000000"),
    (completion(prompt=["a"] * 17), "prompt", "16"),
    (completion(prompt=["a"] * 9, n=2), "prompt", "18"),
    (completion(prompt="a" * 256), "prompt", "256"),
    (completion(prompt="a" * 60000), "prompt", "60000"),
    (completion(max_tokens=255), "max_tokens", "254"),
    (completion(max_tokens=0), "max_tokens", "echo"),
    (completion(max_tokens=-1), "max_tokens", "-1"),
    (completion(max_tokens="5"), "max_tokens", '"5"'),
    (completion(max_tokens=5.0), "max_tokens", "5.0"),
    (completion(max_tokens=True), "max_tokens", "true"),
    (completion(max_tokens=10**400), "max_tokens", "bit integer"),
    (completion(min_tokens=17), "min_tokens", "16"),
    (completion(min_tokens=-1), "min_tokens", "-1"),
    (completion(temperature=-0.1), "temperature", "-0.1"),
    (completion(temperature=2.1), "temperature", "2"),
    (completion(temperature="hot"), "temperature", "hot"),
    (completion(temperature=[]), "temperature", "list"),
    (completion(temperature=10**400), "temperature", "between"),
    (completion(top_p=0), "top_p", "0"),
    (completion(top_p=1.01), "top_p", "1.01"),
    (completion(top_k=-2), "top_k", "-2"),
    (completion(top_k=0.5), "top_k", "0.5"),
    (completion(min_p=2), "min_p", "2"),
    (completion(presence_penalty=3), "presence_penalty", "3"),
    (completion(frequency_penalty=-3), "frequency_penalty", "-3"),
    (completion(repetition_penalty=0), "repetition_penalty", "0"),
    (completion(seed=2**63), "seed", "9223372036854775808"),
    (completion(seed="x"), "seed", "x"),
    (completion(n=0), "n", "0"),
    (completion(n=17), "n", "16"),
    (completion(n=2, best_of=1), "best_of", "2"),
    (completion(best_of=3, stream=True), "best_of", "stream"),
    (completion(stop=[""]), "stop", "1 to"),
    (completion(stop=["a"] * 17), "stop", "16"),
    (completion(stop=5), "stop", "5"),
    (completion(stop=[None]), "stop", "null"),
    (completion(stop="x" * 300), "stop", "256"),
    (completion(stop_token_ids=[512]), "stop_token_ids", "512"),
    (completion(stop_token_ids=list(range(33))), "stop_token_ids", "32"),
    (completion(allowed_token_ids=[]), "allowed_token_ids", "empty"),
    (completion(allowed_token_ids=["a"]), "allowed_token_ids", "a"),
    (completion(bad_words=["a very long word that is not short"]), "bad_words", "8"),
    (completion(bad_words=[5]), "bad_words", "5"),
    (completion(bad_words=[chr(a) for a in range(65, 120)]), "bad_words", "64"),
    (completion(logit_bias=[]), "logit_bias", "list"),
    (completion(logit_bias={"512": 1}), "logit_bias", "512"),
    (completion(logit_bias={"-1": 1}), "logit_bias", "-1"),
    (completion(logit_bias={"x": 1}), "logit_bias", "x"),
    (completion(logit_bias={"5": 101}), "logit_bias.5", "101"),
    (completion(logit_bias={"5": "a"}), "logit_bias.5", "a"),
    (completion(logprobs=21), "logprobs", "20"),
    (completion(logprobs=True), "logprobs", "true"),
    (completion(prompt_logprobs=-1), "prompt_logprobs", "-1"),
    (completion(prompt_logprobs=1, stream=True), "prompt_logprobs", "streamed"),
    (completion(logprobs=1, echo=True, stream=True), "logprobs", "streamed"),
    (completion(echo="yes"), "echo", "yes"),
    (completion(suffix="end"), "suffix", "end"),
    (completion(stream="true"), "stream", "true"),
    (completion(stream_options={"include_usage": True}), "stream_options", "stream"),
    (completion(stream=True, stream_options=[]), "stream_options", "object"),
    (completion(stream=True, stream_options={"x": 1}), "stream_options.x", "include"),
    (completion(model=5), "model", "5"),
    (completion(user=5), "user", "5"),
    (completion(store=True), "store", "not supported"),
    (completion(priority=2**31), "priority", "1000000"),
    (completion(cache_salt=5), "cache_salt", "5"),
    (completion(cache_salt="a" * 257), "cache_salt", "at most 256 characters"),
    (completion(response_format={"type": "xml"}), "response_format.type", "xml"),
    (completion(guided_choice=[1]), "guided_choice", "strings"),
    (completion(guided_regex=7), "guided_regex", "7"),
    (completion(temprature=1), "temprature", "'temperature'"),
    (completion(messages=HI), "messages", "unknown"),
    (completion(max_completion_tokens=4), "max_completion_tokens", "_tokens'"),
    (completion(**{"": 1}), "", "unknown"),
    (completion(**{"x" * 5000: 1}), "x" * 100, "unknown"),
    (chat(messages=None), "messages", "null"),
    (chat(messages=[]), "messages", "list of 0"),
    (chat(messages="hi"), "messages", "hi"),
    (chat(messages=["hi"]), "messages[0]", "hi"),
    (chat(messages=[{}]), "messages[0].role", "null"),
    (chat(messages=[{"role": "wizard", "content": "x"}]), "messages[0].role", "wizard"),
    (chat(messages=[{"role": ["user"], "content": "x"}]), "messages[0].role", "list"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].tool_call_id", "null"),
    (chat(messages=[*HI, {"role": "user"}]), "messages[1].content", "null"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "5"),
    (chat(messages=[{"role": "user", "content": []}]), "messages[0].content", "list of 0"),
    (chat(messages=[{"role": "user", "content": ["x"]}]), "messages[0].content[0]", "x"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages[0].content[0].type",
        "image_url",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        "messages[0].content[0].text",
        "null",
    ),
    (chat(messages=[{"role": "user", "content": "x", "nmae": "y"}]), "messages[0].nmae", "name"),
    (chat(messages=[{"role": "user", "content": "x" * 300}]), "messages", "256"),
    (chat(max_tokens=0), "max_tokens", "0"),
    (chat(max_tokens=4, max_completion_tokens=5), "max_completion_tokens", "differ"),
    (chat(max_completion_tokens=300), "max_completion_tokens", "256"),
    (chat(logprobs=2), "logprobs", "2"),
    (chat(top_logprobs=2), "top_logprobs", "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
    (chat(tools=[{"type": "function"}]), "tools[0].function", "null"),
    (chat(tool_choice="required"), "tool_choice", "required"),
    (chat(functions=[{}]), "functions", "not supported"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "null"),
    (chat(modalities=["audio"]), "modalities", "list"),
    (chat(chat_template="{{ 7*7 }}"), "chat_template", "client"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "messages"),
    (chat(chat_template_kwargs={"self": 1}), "chat_template_kwargs", "self"),
    (chat(chat_template_kwargs={"toolbox": 1}), "chat_template_kwargs", "toolbox"),
    (chat(chat_template_kwargs={"template": 1}), "chat_template_kwargs", "template"),
    (chat(chat_template_kwargs=5), "chat_template_kwargs", "5"),
    (chat(reasoning_effort="high"), "reasoning_effort", "high"),
    (chat(prompt="x"), "prompt", "unknown"),
    (("/tokenize", {}), "prompt", "null"),
    (("/tokenize", {"prompt": 5}), "prompt", "5"),
    (("/tokenize", {"prompt": "x", "nope": 1}), "nope", "unknown"),
    (("/tokenize", {"messages": []}), "messages", "list of 0"),
    (("/detokenize", {}), "tokens", "null"),
    (("/detokenize", {"tokens": [512]}), "tokens", "512"),
    (("/detokenize", {"tokens": "x"}), "tokens", "x"),
]


@pytest.mark.parametrize(
    ("request_", "param", "words"), WRONG, ids=[f"{i}-{p}" for i, (_, p, _) in enumerate(WRONG)]
)
def test_the_error_names_field_and_value(front, request_, param, words):
    path, body = request_
    response = front.post(
        path,
        content=msgspec.json.encode(body),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 600
    assert error["type"] == "invalid_request_error" and error["code"]


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"null", "null"),
    (b"[]", "list"),
    (b'"hi"', "hi"),
    (b"5", "5"),
    (b'{"prompt":"hi"}x', "JSON"),
    (b"{'prompt':'hi'}", "JSON"),
    (b'{"prompt":NaN}', "JSON"),
    (b'{"prompt":"hi","temperature":1e999}', "JSON"),
    (b'{"prompt":"\\ud800"}', "JSON"),
    (b'{"prompt":"\\udc00 x"}', "JSON"),
    (b'{"prompt":"\xed\xa0\x80"}', "UTF-8"),
    (b'{"prompt":"\xff"}', "UTF-8"),
    ('{"prompt":"hi"}'.encode("utf-16"), "JSON"),
    (b'{"prompt":' + b"[" * 30_000, "nests"),
    (b'{"prompt":' + b"[" * 200 + b"]" * 200 + b"}", "64"),
    (b'{"metadata":' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}", "64"),
    (b'{"prompt":"hi","seed":' + b"9" * 6000 + b"}", "JSON"),
]


@pytest.mark.parametrize(("content", "words"), MALFORMED)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_malformed_bodies_are_refused(front, path, content, words):
    response = front.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "é"])
def test_bodies_must_be_declared_as_json(front, kind):
    headers = {} if kind is None else {"content-type": kind.encode("latin-1")}
    response = front.post(COMPLETIONS, content=b'{"prompt":"hi"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


def test_an_unknown_model_is_not_found(front):
    for path, body in (chat(model="gpt-9"), completion(model="gpt-9")):
        response = front.post(path, body)
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-9" in error["message"] and "fake" in error["message"]
    assert front.get("/v1/models/gpt-9").status_code == 404


def test_unknown_paths_and_methods_have_openais_body(front):
    assert front.get("/v1/nothing").json()["error"]["code"] == "not_found"
    response = front.get(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


def test_large_bodies_are_refused_unread(front):
    limit = CONFIG.http.max_body_bytes
    taken = 0

    async def pieces():
        nonlocal taken
        yield b'{"prompt":"'
        for _ in range(10_000):
            taken += 1024
            yield b"a" * 1024

    response = front.post(
        COMPLETIONS, content=pieces(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"
    assert str(limit) in response.json()["error"]["message"]
    assert taken <= limit + 1024
    announced = front.post(COMPLETIONS, {"prompt": "a" * 10_000_000})
    assert announced.status_code == 413


def test_a_developers_message_and_text_parts_are_fine(front):
    body = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "d", "name": "me"},
        ],
        "seed": 1, "max_tokens": 8, "ignore_eos": True, "tools": [], "parallel_tool_calls": True,
    }  # fmt: skip
    prompt = b"system: be brief\nuser: a\nb\nassistant: c\nuser: d\nassistant: "
    answer = front.ok(CHAT, body)
    assert (
        answer["choices"][0]["message"]["content"]
        == (expected(list(prompt), seed=1, max_tokens=8, ignore_eos=True)[1])
    )


FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens", "stream",
    "stream_options", "n", "best_of", "stop", "stop_token_ids", "bad_words", "allowed_token_ids",
    "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "temperature", "top_p", "top_k",
    "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "echo",
    "ignore_eos", "return_token_ids", "priority", "user", "metadata", "tools", "response_format",
    "chat_template_kwargs", "add_generation_prompt", "skip_special_tokens", "suffix", "tokens",
    "tool_choice", "parallel_tool_calls", "input", "instructions", "max_output_tokens", "include",
    "text", "reasoning",
)  # fmt: skip

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["fake", "user", "system", "text", "a", "function", "required"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "5", "function", "name", "format"])
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS, RESPONSES, "/tokenize", "/detokenize"]),
    base=st.booleans(),
    values=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), json_values, max_size=5),
)
def test_no_body_ever_gives_a_500(front, path, base, values):
    bodies = {COMPLETIONS: {"prompt": "hi"}, RESPONSES: {"input": "hi"}}
    body = bodies.get(path, {"messages": HI})
    response = front.post(path, (body if base else {}) | values)
    assert response.status_code in (200, 400, 403, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200))
def test_no_bytes_ever_give_a_500(front, content):
    response = front.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400


def test_after_all_that_nothing_is_held_and_answers_are_right(front):
    status = front.run(front.client.get_status())
    assert (status.running, status.waiting, status.pages_used) == (0, 0, 0)
    answer = front.ok(COMPLETIONS, {"prompt": "hi", "seed": 2})
    assert answer["choices"][0]["text"] == expected(list(b"hi"), seed=2)[1]
