"""/v1/completions against the fake model, whose answers are known."""

from __future__ import annotations

import msgspec
import pytest

from jaxserve.http.logprobs import TextOffsets, completion_logprobs
from jaxserve.types import TokenLogprobs
from tests.fakes.engine import GROUPS
from tests.fakes.executor import oracle_logprob
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import expected, split_bytes_seed

PATH = "/v1/completions"
PROMPT = list(b"hello there")


def events(text: str) -> list[dict]:
    """The data events of a stream, which ends with [DONE]."""
    lines = [line for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [msgspec.json.decode(line.removeprefix("data: ")) for line in lines[:-1]]


def test_text_and_usage_equal_the_oracle(front):
    tokens, text = expected(PROMPT, seed=5)
    body = {"model": "fake", "prompt": "hello there", "seed": 5, "cache_salt": "usage"}
    answer = front.ok(PATH, body)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    assert len(tokens) == 16  # OpenAI's default
    assert answer["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 16,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_usage_says_what_was_found_and_a_salt_keeps_it_apart(front):
    def cached(**changes) -> int:
        body = {"prompt": "the same beginning, " * 3, "seed": 5} | changes
        return front.ok(PATH, body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    salted = {"cache_salt": "pepper"}
    assert [cached(), cached(), cached(**salted), cached(**salted)] == [0, 56, 0, 56]
    text = {"prompt": "the same beginning, but another end"}
    assert [cached(**text), cached(**text, **salted)] == [20, 20]
    assert cached(prompt_logprobs=1) == 0  # it must be run


def test_an_end_token_stops_and_is_not_shown(front):
    seed = next(s for s in range(10_000) if 2 < len(expected(PROMPT, seed=s)[0]) < 16)
    tokens, text = expected(PROMPT, seed=seed)
    answer = front.ok(PATH, {"prompt": PROMPT, "seed": seed, "return_token_ids": True})
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert choice["token_ids"] == tokens and choice["prompt_token_ids"] == PROMPT
    assert answer["usage"]["completion_tokens"] == len(tokens)


@pytest.mark.parametrize(
    "prompt",
    [["ab", "cde"], [list(b"ab"), list(b"cde")]],
    ids=["texts", "token ids"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_batches_number_their_choices_by_prompt(front, prompt, stream):
    body = {"prompt": prompt, "n": 2, "seed": 3, "ignore_eos": True, "echo": True}
    wanted = []
    for ids in (list(b"ab"), list(b"cde")):
        for choice in range(2):
            text = expected(ids, choice, seed=3, ignore_eos=True)[1]
            wanted.append(bytes(ids).decode() + text)
    if stream:
        texts = [""] * 4
        for event in events(front.post(PATH, body | {"stream": True}).text):
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == wanted
    else:
        choices = front.ok(PATH, body)["choices"]
        assert [choice["text"] for choice in choices] == wanted
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens_end_text_and_count(front, stream):
    def candidate(seed: int) -> bool:
        tokens, text = expected(PROMPT, seed=seed, max_tokens=40, ignore_eos=True)
        return all(t < 256 for t in tokens[:20]) or (text[2:8].isascii() and len(text) > 12)

    seed = next(s for s in range(1000) if candidate(s))
    tokens, text = expected(PROMPT, seed=seed, max_tokens=40, ignore_eos=True)
    tokenizer = ByteTokenizer()
    stop = text[4:7]
    cut = text.index(stop)
    num_tokens = next(n for n in range(len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    body = {"prompt": PROMPT, "seed": seed, "max_tokens": 40, "ignore_eos": True, "stop": [stop]}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events(front.post(PATH, body).text)
        assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == text[:cut]
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "stop"
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        usage = chunks[-1]["usage"]
        assert chunks[-1]["choices"] == []
    else:
        answer = front.ok(PATH, body)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[:cut], "stop")
        kept = front.ok(PATH, body | {"include_stop_str_in_output": True})
        assert kept["choices"][0]["text"] == text[: cut + len(stop)]
        usage = answer["usage"]
    assert usage["completion_tokens"] == num_tokens
    assert num_tokens < 40


def test_characters_are_never_split_between_events(front):
    seed = split_bytes_seed(PROMPT, 24)
    text = expected(PROMPT, seed=seed, max_tokens=24, ignore_eos=True)[1]
    body = {"prompt": PROMPT, "seed": seed, "max_tokens": 24, "ignore_eos": True, "stream": True}
    response = front.post(PATH, body)
    assert "".join(event["choices"][0]["text"] for event in events(response.text)) == text
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_openais_shape_and_the_models_values(front, stream):
    body = {"prompt": PROMPT, "seed": 1, "max_tokens": 5, "ignore_eos": True, "logprobs": 2}
    tokens, _ = expected(PROMPT, seed=1, max_tokens=5, ignore_eos=True)
    values = [oracle_logprob(PROMPT + tokens[:i], token, GROUPS) for i, token in enumerate(tokens)]
    if stream:
        parts = [
            event["choices"][0]["logprobs"]
            for event in events(front.post(PATH, body | {"stream": True}).text)
        ]
        merged: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for part in parts:
            for key in merged:
                merged[key] += part[key] if part else []
        logprobs = merged
    else:
        logprobs = front.ok(PATH, body)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(values)
    tokenizer = ByteTokenizer()
    texts = [tokenizer.token_bytes(t).decode("utf-8", "replace") for t in tokens]
    assert logprobs["tokens"] == texts
    assert logprobs["text_offset"] == [len("".join(texts[:i])) for i in range(5)]
    assert all(1 <= len(top) <= 3 for top in logprobs["top_logprobs"])


def test_echo_scores_the_prompt(front):
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0, "seed": 1}
    answer = front.ok(PATH, body)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello there", "length")
    values = [oracle_logprob(PROMPT[:i], PROMPT[i], GROUPS) for i in range(1, len(PROMPT))]
    assert choice["logprobs"]["token_logprobs"] == [None, *map(pytest.approx, values)]
    assert choice["logprobs"]["tokens"] == list("hello there")
    assert choice["logprobs"]["text_offset"] == list(range(11))
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_scores_a_prompt_as_long_as_the_context(front):
    context = front.ok("/tokenize", {"prompt": "x"})["max_model_len"]
    body = {"prompt": [7] * context, "echo": True, "logprobs": 0, "max_tokens": 0}
    scored = front.ok(PATH, body)["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scored) == context
    longer = front.post(PATH, body | {"prompt": [7] * (context + 1)})
    assert longer.status_code == 400
    assert f"has {context + 1} tokens" in longer.json()["error"]["message"]


def test_prompt_logprobs_start_with_null_and_are_keyed_by_token(front):
    body = {"prompt": PROMPT, "prompt_logprobs": 2, "max_tokens": 1, "n": 2}
    for choice in front.ok(PATH, body)["choices"]:
        first, second, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(PROMPT) - 2
        wanted = oracle_logprob(PROMPT[:1], PROMPT[1], GROUPS)
        assert second[str(PROMPT[1])]["logprob"] == pytest.approx(wanted)
        assert second[str(PROMPT[1])]["decoded_token"] == "e"


def test_best_of_returns_the_likeliest(front):
    body = {"prompt": PROMPT, "best_of": 5, "n": 2, "seed": 9, "max_tokens": 6, "ignore_eos": True}
    ranked = []
    for choice in range(5):
        tokens, text = expected(PROMPT, choice, seed=9, max_tokens=6, ignore_eos=True)
        values = [oracle_logprob(PROMPT + tokens[:i], t, GROUPS) for i, t in enumerate(tokens)]
        ranked.append((sum(values) / 6, text))
    ranked.sort(reverse=True)
    answer = front.ok(PATH, body)
    assert [c["text"] for c in answer["choices"]] == [text for _, text in ranked[:2]]
    assert [c["logprobs"] for c in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == 30


def test_a_seed_repeats_and_none_varies(front):
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True}
    same = {front.ok(PATH, body | {"seed": -4})["choices"][0]["text"] for _ in range(2)}
    other = {front.ok(PATH, body)["choices"][0]["text"] for _ in range(3)}
    assert len(same) == 1 and len(other) == 3


def test_parameters_that_change_nothing_are_accepted(front):
    body = {
        "prompt": PROMPT, "model": "fake", "suffix": None, "user": "me", "store": False,
        "metadata": {"a": "b"}, "response_format": {"type": "text"}, "stop": None, "logprobs": None,
        "stream": None, "stream_options": None, "logit_bias": None, "best_of": 1, "n": None,
        "service_tier": "auto", "guided_regex": None, "use_beam_search": False, "seed": 5,
        "length_penalty": 1.0, "max_tokens": None, "priority": None, "detokenize": True,
    }  # fmt: skip
    assert front.ok(PATH, body)["choices"][0]["text"] == expected(PROMPT, seed=5)[1]


def test_infinite_logprobs_become_openais_floor():
    entry = TokenLogprobs(token_id=65, logprob=float("-inf"), rank=3, top=((66, -0.5),))
    logprobs = completion_logprobs(ByteTokenizer(), [entry], 1, lambda token_id: 7)
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"B": -0.5, "A": -9999.0}]
    assert logprobs["text_offset"] == [7]


def test_offsets_are_into_the_text_that_is_returned():
    """An emoji of four tokens has one character; a special token that is left out has none."""
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("a\N{GRINNING FACE}b", add_special_tokens=False)]
    eos = tokenizer.eos_token_ids[0]
    offsets = TextOffsets(tokenizer, (), skip_special_tokens=True)
    assert [offsets.next(token) for token in [*ids, eos, ids[0]]] == [0, 1, 1, 1, 1, 2, 3, 3]
    shown = TextOffsets(tokenizer, (), skip_special_tokens=False, start=5)
    width = len(tokenizer.token_bytes(eos).decode())
    assert [shown.next(token) for token in (ids[0], eos, ids[0])] == [5, 6, 6 + width]
    bounded = TextOffsets(tokenizer, (), skip_special_tokens=True, limit=1)
    assert [bounded.next(token) for token in (ids[0], ids[0], ids[0])] == [0, 1, 1]


def test_echoed_text_and_output_share_one_count(front):
    prompt = "\N{GRINNING FACE}!"
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 2, "seed": 1}
    (choice,) = front.ok(PATH, body | {"ignore_eos": True})["choices"]
    assert choice["logprobs"]["text_offset"][:6] == [0, 0, 0, 0, 1, 2]
    assert choice["text"].startswith(prompt)
