"""A model's dialect: found by its template, and how tools get into its prompt."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from jaxserve.config import ToolsConfig
from jaxserve.errors import InvalidRequest
from jaxserve.structured.grammars import context_free, json_schema, regex
from jaxserve.text.dialect import Dialect, make_dialect
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tools.tool import Tool, Toolbox
from tests.fakes.tokenizer import CHAT_TEMPLATE, IM_END, ByteTokenizer

WEATHER = Tool(
    name="get_weather",
    description="Says how the weather is.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)
TOOLBOX = Toolbox(tools=[WEATHER], callable=frozenset({"get_weather"}))
#: A template that writes all that it is given.
NATIVE = "{{ tools | tojson }}\n{% for m in messages %}{{ m | tojson }}\n{% endfor %}<tool_call>"
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "get_weather"},
    {"role": "tool", "content": "sun", "tool_call_id": "1", "name": "get_weather"},
    {"role": "user", "content": "And now?"},
]


def dialect_of(source: str, **config: str) -> Dialect:
    """The dialect of a template."""
    return make_dialect(ChatTemplate(source), ByteTokenizer(), ToolsConfig(**config))


@pytest.mark.parametrize(
    ("source", "name", "written"),
    [
        ("{{ tools }}<tool_call>", "hermes", '<tool_call>\n{"name"'),
        ("{{ tools }}[TOOL_CALLS]", "mistral", '[TOOL_CALLS][{"name"'),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", "mistral", "[TOOL_CALLS]f[ARGS]"),
        ("{{ tools }}Environment: ipython", "llama3", '{"name": "f", "parameters"'),
        ("{{ tools }}Environment: ipython [func_name1(a=b)]", "pythonic", "[f("),
        ("{{ tools }}<|python_tag|>", "llama3", '{"name": "f", "parameters"'),
        ("{{ tools }}<|python_start|> <|python_tag|>", "pythonic", "[f("),
        ("<start_of_turn>user", "pythonic", "[f("),
        ("{{ tools }}", "json", '{"name": "f", "arguments"'),
        (CHAT_TEMPLATE, "hermes", "<tool_call>"),
    ],
)
def test_the_template_shows_the_notation(source, name, written) -> None:
    notation = dialect_of(source).notation
    assert notation.name == name
    assert notation.written([("f", "{}")]).startswith(written)


def test_the_settings_have_the_last_word() -> None:
    assert dialect_of("<tool_call>", parser="json").notation.name == "json"
    assert not dialect_of("<tool_call>").reasons
    assert dialect_of("<think></think>").reasons
    assert dialect_of("", reasoning="think").reasons
    assert not dialect_of("<think></think>", reasoning="none").reasons


def test_the_log_says_what_was_chosen(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="jaxserve.text.dialect"):
        dialect_of(CHAT_TEMPLATE)
        dialect_of("{{ tools }}<|python_tag|><think></think>")
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("tool calls: hermes notation (the chat template knows no tools")
    assert second == "tool calls: llama3 notation; reasoning between <think> and </think>"


def test_markers_that_are_special_tokens_are_known() -> None:
    class Tokenizer(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            if text == "<tool_call>":
                return [IM_END]
            return super().encode(text, add_special_tokens=add_special_tokens)

    found = make_dialect(ChatTemplate("<tool_call>"), Tokenizer(), ToolsConfig())
    assert found.special_tokens == {"<tool_call>": IM_END}
    assert dialect_of("<tool_call>").special_tokens == {}


def test_a_template_that_knows_tools_gets_them() -> None:
    dialect = dialect_of(NATIVE)
    text = dialect.render(ChatTemplate(NATIVE), CONVERSATION, toolbox=TOOLBOX)
    tools, *messages = map(json.loads, text.removesuffix("<tool_call>").splitlines())
    assert tools == [WEATHER.document]
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert messages[3] == CONVERSATION[3]
    without = dialect.render(ChatTemplate(NATIVE), CONVERSATION, toolbox=Toolbox(tools=[WEATHER]))
    assert without.startswith("null\n"), "what may not be called is not told"
    cut = {**CALL, "function": {"name": "get_weather", "arguments": '{"ci'}}
    turn = {"role": "assistant", "content": "", "tool_calls": [cut]}
    text = dialect.render(ChatTemplate(NATIVE), [turn])
    assert '"arguments": "{\\"ci"' in text, "a call that was cut is shown as it is"


def test_tools_are_known_wherever_the_template_has_them() -> None:
    conditional = "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    assert dialect_of(conditional).native
    assert make_dialect(
        ChatTemplate("plain", tools_source="{{ tools }}"), ByteTokenizer(), ToolsConfig()
    ).native
    assert not dialect_of("Use your tools well. {{ messages }}").native


def test_a_template_that_takes_one_call_a_message() -> None:
    source = NATIVE.replace(
        "{{ m | tojson }}",
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call!') }}{% endif %}"
        "{{ m | tojson }}",
    )
    calls = [CALL | {"id": name} for name in "ab"]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Hm", "tool_calls": calls},
        *({"role": "tool", "content": name * 3, "tool_call_id": name} for name in "ba"),
        {"role": "tool", "content": "of nothing", "tool_call_id": "c"},
    ]
    text = dialect_of(source).render(ChatTemplate(source), messages, toolbox=TOOLBOX)
    _, *rendered = map(json.loads, text.removesuffix("<tool_call>").splitlines())
    assert [message["content"] for message in rendered] == [
        "?",
        "Hm",
        "aaa",
        "",
        "bbb",
        "of nothing",
    ]
    assert [call["id"] for message in rendered for call in message.get("tool_calls", ())] == [
        "a",
        "b",
    ]


def test_ids_as_mistral_takes_them() -> None:
    source = NATIVE.replace("<tool_call>", "[TOOL_CALLS]")
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "call_0123456789ab"}]},
        {"role": "tool", "content": "x", "tool_call_id": "call_0123456789ab"},
        {"role": "tool", "content": "x", "tool_call_id": "a-1"},
    ]
    text = dialect_of(source).render(ChatTemplate(source), messages)
    assert text.count('"3456789ab"') == 2 and '"0000000a1"' in text


def test_a_template_that_knows_none_gets_words() -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    text = dialect_of(CHAT_TEMPLATE).render(template, CONVERSATION, toolbox=TOOLBOX)
    turns = text.split("<|im_start|>")[1:]
    assert [turn.partition("\n")[0] for turn in turns] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert turns[0].startswith("system\nBe brief.\n\nYou can call functions.")
    assert json.dumps(WEATHER.document) in turns[0]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert turns[2] == f"assistant\n{call}\n{call}<|im_end|>"
    answers = "".join(
        f"<tool_response>\n{answer}\n</tool_response>\n" for answer in ("rain", "sun")
    )
    assert turns[3] == f"user\n{answers}And now?<|im_end|>"


def test_plain_messages_are_left_alone() -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert dialect_of(CHAT_TEMPLATE).render(template, messages) == template.render(messages)
    text = dialect_of(CHAT_TEMPLATE).render(template, messages, toolbox=TOOLBOX)
    assert text.endswith("<|im_start|>user\na<|im_end|><|im_start|>user\nb<|im_end|>"
                         "<|im_start|>assistant\n")  # fmt: skip


def test_instructions_where_there_are_no_system_messages() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    dialect = dialect_of(source)
    assert not dialect.system_role
    text = dialect.render(
        ChatTemplate(source), [{"role": "user", "content": "Hi"}], toolbox=TOOLBOX
    )
    assert text.startswith("<start_of_turn>user: You can call functions.")
    assert "[name(parameter='value')]" in text and text.endswith("\n\nHi\n")


def test_plain_text_needs_no_reader() -> None:
    plain, thoughtful = dialect_of(CHAT_TEMPLATE), dialect_of("<think></think>")
    assert plain.reader(Toolbox(tools=[WEATHER]), "") is None
    assert plain.grammar(Toolbox(), "", None) is None
    reader = thoughtful.reader(Toolbox(), "assistant\n<think>\n")
    assert reader is not None
    assert reader().thinking
    assert plain.reader(TOOLBOX, "") is not None


def test_grammars_of_both_kinds() -> None:
    plain, thoughtful = dialect_of(CHAT_TEMPLATE), dialect_of("<think></think>")
    schema, pattern = json_schema({"type": "object"}), regex("a+")
    assert plain.grammar(Toolbox(), "", schema) is schema
    ebnf = context_free('root ::= "a"')
    assert thoughtful.grammar(Toolbox(), "", ebnf) is ebnf
    for prompt in ("", "assistant\n<think>\n"):
        after = thoughtful.grammar(Toolbox(), prompt, pattern)
        assert after is not None and after.kind == "lark" and "/a+/" in after.text
    behind = thoughtful.grammar(Toolbox(), "", schema)
    assert behind is not None and behind.kind == "lark" and schema.text in behind.text
    both = plain.grammar(TOOLBOX, "", schema)
    assert both is not None and schema.text in both.text and "get_weather" in both.text
    with pytest.raises(InvalidRequest, match="response_format only") as refused:
        plain.grammar(TOOLBOX, "", pattern)
    assert refused.value.param == "tools"
