"""Lines as token ids, and which of them are learned; lines that cannot be are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.text.template import ChatTemplate
from jaxserve.training.examples import Example, Reader
from tests.fakes.tokenizer import CHAT_TEMPLATE, IM_END, ByteTokenizer

TOKENIZER = ByteTokenizer()


def reader(template: str | None = CHAT_TEMPLATE, **others: Any) -> Reader:
    options: dict[str, Any] = {"eos_token_ids": (IM_END,), "max_tokens": 128, "vocab_size": 512}
    options["tokenizer"] = TOKENIZER
    compiled = None if template is None else ChatTemplate(template)
    return Reader(template=compiled, **(options | others))


def example(line: Any, **others: Any) -> Example:
    (found,) = reader(**others).examples(json.dumps(line).encode())
    return found


def split(found: Example) -> tuple[str, str]:
    """What is only read, and what is learned; a bar where one goes over into the other."""
    texts = {True: "", False: ""}
    before = None
    for token, learned in zip(found.token_ids.tolist(), found.is_learned.tolist(), strict=True):
        if before is not None and learned != before:
            texts[before] += "|"
        texts[learned] += TOKENIZER.token_bytes(token).decode()
        before = learned
    return texts[False], texts[True]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_of_a_conversation_the_assistants_messages_are_learned() -> None:
    found = example(
        {
            "messages": [
                message("system", "S"),
                message("user", "a"),
                message("assistant", "b"),
                message("user", "c"),
                message("assistant", "d"),
            ]
        }
    )
    assert split(found) == (
        "<|im_start|>system\nS<|im_end|><|im_start|>user\na<|im_end|><|im_start|>assistant\n|"
        "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n|",
        "b<|im_end|>|d<|im_end|>",
    )


def test_what_is_read_is_the_prompt_that_the_server_would_make() -> None:
    messages = [message("user", "a"), message("assistant", "b")]
    found = example({"messages": messages})
    prompt = TOKENIZER.encode(ChatTemplate(CHAT_TEMPLATE).render(messages[:1]))
    assert found.token_ids[: len(prompt)].tolist() == prompt
    assert found.is_learned[: len(prompt)].sum() == 0


def test_behind_the_end_token_nothing_is_learned() -> None:
    template = CHAT_TEMPLATE.replace("<|im_end|>", "<|im_end|>\n")
    found = example(
        {"messages": [message("user", "a"), message("assistant", "b")]}, template=template
    )
    assert split(found)[1] == "b<|im_end|>|" and found.token_ids[-1] == ord("\n")


def test_tools_reach_the_template() -> None:
    template = "{{ tools[0].name if tools }}" + CHAT_TEMPLATE
    messages = [message("user", "a"), message("assistant", "b")]
    found = example({"messages": messages, "tools": [{"name": "T"}]}, template=template)
    assert split(found)[0].startswith("T<|im_start|>user")


def test_of_a_prompt_and_completion_the_completion_is_learned() -> None:
    assert split(example({"prompt": "2 +", "completion": " 4"})) == ("2 +|", " 4<|im_end|>")
    found = example({"prompt": "2 +", "completion": " 4"}, tokenizer=ByteTokenizer(add_bos=True))
    assert split(found)[0] == "<|bos|>2 +|"
    assert split(example({"prompt": "a", "completion": "b"}, eos_token_ids=())) == ("a|", "b")


def test_a_text_is_learned_whole_and_cut_where_it_is_too_long() -> None:
    assert split(example({"text": "once"})) == ("", "once<|im_end|>")
    found = reader(max_tokens=5).examples(b'{"text": "abcdefghi"}')
    assert [split(part)[1] for part in found] == ["abcde", "fghi<|im_end|>"]
    found = reader(max_tokens=5).examples(b'{"text": "abcde"}')  # what is left is one token
    assert [split(part)[1] for part in found] == ["abcde"]


class Merging(ByteTokenizer):
    """Makes one token of "ab"."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text, add_special_tokens=add_special_tokens)
        at = [i for i in range(len(ids) - 1) if ids[i : i + 2] == [97, 98]]
        for i in reversed(at):
            ids[i : i + 2] = [300]
        return ids


def test_no_token_reaches_over_the_seam() -> None:
    line = {"prompt": "xa", "completion": "bab"}
    found = example(line, tokenizer=Merging(), eos_token_ids=())
    assert found.token_ids.tolist() == [ord("x"), 97, 98, 300]
    assert found.is_learned.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("nonsense", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[1]", "it must be a JSON object, got list"),
        ('{"prompt": "a"}', 'it needs "messages", or "prompt" and "completion", or "text"'),
        ('{"text": ""}', "text must be text that is not empty, got ''"),
        ('{"text": 3}', "text must be text that is not empty, got 3"),
        ('{"text": "a", "id": 7}', "text goes with no 'id'; leave it out"),
        ('{"prompt": "a", "completion": ["b"]}', "completion must be text"),
        ('{"messages": []}', "messages must be a list of at least one"),
        ('{"messages": [{"role": "user"}]}', "a message's content must be text"),
        ('{"messages": ["hi"]}', "each message needs a role and content, got 'hi'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last message must be the assist"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "and the first must not be"),
        ('{"prompt": "' + "a" * 120 + '", "completion": "bcdefghi"}',
         "it has 129 tokens, a row has 128: shorten it, or give more --row-tokens"),
        ('{"text": "\\ud800"}', "the text is not Unicode"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_learned_from(line: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        reader().examples(line.encode())
    assert sentence in raised.value.message


def test_what_the_template_or_tokenizer_does_not_do() -> None:
    pair = [message("user", "a"), message("assistant", "b")]
    for line, others, sentence in (
        ({"messages": pair}, {"template": None}, "this model has no chat template"),
        ({"messages": pair * 2}, {"template": CHAT_TEMPLATE + "{{ messages|length }}"},
         "writes earlier messages otherwise"),
        ({"messages": pair}, {"template": "{{ raise_exception('no users') }}"}, "no users"),
        ({"text": "abc"}, {"vocab_size": 99}, "it has token 259, the model's ids are below 99"),
        ({"text": "a"}, {"eos_token_ids": ()}, "no token to learn"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as raised:
            reader(**others).examples(json.dumps(line).encode())
        assert sentence in raised.value.message


def test_a_file_names_its_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"text": "a b"}'
    path.write_bytes(b"\n".join([good, b"", b"?", good, b"{}", b"[]", b"3", b"4"]))
    with pytest.raises(InvalidRequest) as raised:
        reader().read(path)
    said = raised.value.message
    assert said.startswith(f"{path}: line 3: it is no JSON")
    assert "line 5: it needs" in said and "line 6: it must" in said
    assert said.endswith("; and 2 more lines")
    path.write_bytes(b"\r\n".join([good, b"", good]) + b"\n")
    assert [split(found)[1] for found in reader().read(path)] == ["a b<|im_end|>"] * 2


def test_no_file_and_no_examples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*No such file"):
        reader().read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InvalidRequest, match="holds no examples"):
        reader().read(tmp_path / "empty.jsonl")
