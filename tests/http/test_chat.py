"""/v1/chat/completions, /v1/models, tokens and probes, through the real `openai` client."""

from __future__ import annotations

import openai
import pytest

from jaxserve.http.metrics import CONTENT_TYPE
from tests.fakes.engine import GROUPS
from tests.fakes.executor import oracle_logprob
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import chat_prompt, expected, split_bytes_seed

HI = [{"role": "user", "content": "hi"}]
PROMPT = chat_prompt("hi")


@pytest.fixture(scope="module")
def client(front):
    """OpenAI's client on the application."""
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://front/v1", http_client=front.http, max_retries=0
    )


async def gather(stream) -> list:
    """All chunks of a stream."""
    return [chunk async for chunk in stream]


def test_a_completion(front, client):
    tokens, text = expected(PROMPT, seed=4, max_tokens=20, ignore_eos=True)
    answer = front.run(
        client.chat.completions.create(
            model="fake", messages=HI, seed=4, max_tokens=20, extra_body={"ignore_eos": True}
        )
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == len(tokens) == 20
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_max_tokens_defaults_to_what_is_left(front, client):
    answer = front.run(
        client.chat.completions.create(
            model="fake", messages=HI, seed=4, extra_body={"ignore_eos": True}
        )
    )
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_streams_of_two_choices_with_usage(front, client):
    seed = split_bytes_seed(PROMPT, 30)
    stream = front.run(
        client.chat.completions.create(
            model="fake",
            messages=HI,
            seed=seed,
            max_completion_tokens=30,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    chunks = front.run(gather(stream))
    texts, roles, reasons = ["", ""], {}, {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after a finish reason"
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles[choice.index] = choice.delta.role
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    wanted = [expected(PROMPT, c, seed=seed, max_tokens=30, ignore_eos=True)[1] for c in range(2)]
    assert texts == wanted
    assert roles == {0: "assistant", 1: "assistant"} and reasons == {0: "length", 1: "length"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 60
    assert chunks[-1].usage.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_with_bytes(front, client, stream):
    tokens, _ = expected(PROMPT, seed=1, max_tokens=6, ignore_eos=True)
    made = front.run(
        client.chat.completions.create(
            model="fake",
            messages=HI,
            seed=1,
            max_tokens=6,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
            extra_body={"ignore_eos": True},
        )
    )
    if stream:
        choices = [choice for chunk in front.run(gather(made)) for choice in chunk.choices]
        content = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    else:
        content = made.choices[0].logprobs.content
    values = [oracle_logprob(PROMPT + tokens[:i], t, GROUPS) for i, t in enumerate(tokens)]
    assert [entry.logprob for entry in content] == pytest.approx(values)
    tokenizer = ByteTokenizer()
    assert [bytes(entry.bytes) for entry in content] == list(map(tokenizer.token_bytes, tokens))
    assert {len(entry.top_logprobs) for entry in content} == {3}


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_returned(front, client, stream):
    tokens, _ = expected(PROMPT, seed=8, max_tokens=9, ignore_eos=True)
    body = {"return_token_ids": True, "ignore_eos": True}
    made = front.run(
        client.chat.completions.create(
            model="fake", messages=HI, seed=8, max_tokens=9, stream=stream, extra_body=body
        )
    )
    if stream:
        chunks = front.run(gather(made))
        assert chunks[0].model_extra["prompt_token_ids"] == PROMPT
        pieces = [c.model_extra.get("token_ids", []) for ch in chunks for c in ch.choices]
        assert [token for piece in pieces for token in piece] == tokens
    else:
        assert made.model_extra["prompt_token_ids"] == PROMPT
        assert made.choices[0].model_extra["prompt_token_ids"] == PROMPT
        assert made.choices[0].model_extra["token_ids"] == tokens


def test_prompt_logprobs(front):
    body = {"messages": HI, "max_tokens": 1, "prompt_logprobs": 1}
    entries = front.ok("/v1/chat/completions", body)["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(PROMPT)
    value = entries[3][str(PROMPT[3])]["logprob"]
    assert value == pytest.approx(oracle_logprob(PROMPT[:3], PROMPT[3], GROUPS))


def test_errors_become_the_clients_exceptions(front, client):
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        front.run(create(model="fake", messages=HI, temperature=7))
    assert caught.value.param == "temperature" and "7" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        front.run(create(model="fake", messages=HI, max_tokens=5000, stream=True))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        front.run(create(model="other", messages=HI))


def test_models(front, client):
    listed = front.run(gather(client.models.list()))
    assert [model.id for model in listed] == ["fake"]
    model = front.run(client.models.retrieve("fake"))
    assert model.owned_by == "jaxserve" and model.model_extra["max_model_len"] == 256


def test_tokenize_and_back(front):
    answer = front.ok("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert answer["tokens"] == list("hé".encode()) and answer["count"] == 3
    assert answer["max_model_len"] == 256 and len(answer["token_strs"]) == 3
    assert front.ok("/detokenize", {"tokens": answer["tokens"]}) == {"prompt": "hé"}
    assert front.ok("/tokenize", {"messages": HI})["tokens"] == PROMPT


def test_long_texts_are_tokenized_too(front):
    assert front.ok("/tokenize", {"prompt": "a" * 50_000})["count"] == 50_000


def test_probes(front):
    health = front.get("/health")
    assert health.status_code == 200
    (engine,) = health.json()["engines"]
    assert engine["state"] == "ready" and engine["id"] == 0 and engine["step_age_s"] < 60
    assert front.get("/ready").json() == {"status": "ready"}


def test_metrics_count_what_was_served(front):
    def value(name: str) -> float:
        text = front.get("/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    before = value("jaxserve_output_tokens_total"), value("jaxserve_time_to_first_token_seconds_c")
    front.ok("/v1/chat/completions", {"messages": HI, "max_tokens": 10, "ignore_eos": True})
    assert value("jaxserve_output_tokens_total") == before[0] + 10
    assert value("jaxserve_time_to_first_token_seconds_c") == before[1] + 1
    assert value('jaxserve_requests_total{route="/v1/models",status="200"}') >= 1
    assert value("jaxserve_pages_capacity") == 999
    assert value("jaxserve_pages_saved_total") == value("jaxserve_pages_loaded_total") == 0
    assert value("jaxserve_host_pages_capacity") == value("jaxserve_swapped") == 0
    assert value("jaxserve_pages_used") == value("jaxserve_running") == 0
    assert value("jaxserve_compiles_after_warmup") == 0
    assert value("jaxserve_engine_ready") == 1
    assert front.get("/metrics").headers["content-type"] == CONTENT_TYPE.decode()
