"""Chat templates: conventions, safety, bounds, and where they are found."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import InvalidRequest, WeightsError
from jaxserve.text import template as template_module
from jaxserve.text.template import ChatTemplate, load_chat_template

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] = USER, **kwargs: Any) -> str:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}).render(messages, **kwargs)


def test_special_tokens_messages_and_extra_variables() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}{{ mood }}"
    assert render(source, mood="!") == "<s>hiTrue!"
    assert render(source, add_generation_prompt=False) == "<s>hiFalse"


def test_blocks_leave_no_white_space() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_content_is_data_not_template() -> None:
    assert render("{{ messages[0].content }}", [{"content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0]['content'] }}", [{"role": "user", "content": parts}]) == "a\nb"
    with pytest.raises(InvalidRequest, match="text parts only") as error:
        render("x", [{"role": "user", "content": [{"type": "image_url", "image_url": "…"}]}])
    assert error.value.param == "messages"


def test_tojson_escapes_nothing_for_html_and_takes_its_options() -> None:
    value = [{"content": {"b": "<é&'>", "a": 1}}]
    assert render("{{ messages[0].content | tojson }}", value) == '{"b": "<é&\'>", "a": 1}'
    options = "indent=1, sort_keys=true, ensure_ascii=true, separators=(',', ':')"
    assert (
        render("{{ messages[0].content | tojson(" + options + ") }}", value)
        == '{\n "a":1,\n "b":"<\\u00e9&\'>"\n}'
    )


def test_loop_controls_and_generation_tag() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}"
        "{% endif %}{% generation %}{{ i }}{% endgeneration %}{% endfor %}"
    )
    assert render(source) == "013"


def test_the_date_is_todays() -> None:
    before = datetime.date.today().isoformat()
    assert render("{{ strftime_now('%Y-%m-%d') }}") in (
        before,
        datetime.date.today().isoformat(),
    )


def test_tools_choose_their_own_template() -> None:
    template = ChatTemplate("plain {{ tools }}", tools_source="tools {{ tools[0].name }}")
    assert template.render(USER) == "plain None"
    assert template.render(USER, tools=[{"name": "f"}]) == "tools f"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[5]['content']['x'] }}", "no element 5|undefined"),
        ("{{ messages | tojson(indent=messages) }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages[0].update({}) }}", "unsafe|not safely callable"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_whatever_goes_wrong_is_the_requests_fault(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as error:
        render(source)
    assert (error.value.status, error.value.param) == (400, "messages")


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_CHARS", 1000)
    source = "{% for i in range(100) %}{{ messages[0].content }}{% endfor %}"
    assert len(render(source, [{"content": "x" * 10}])) == 1000
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        render(source, [{"content": "x" * 11}])


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_SECONDS", 0.0)
    with pytest.raises(InvalidRequest, match="takes more than 0 s"):
        render("{% for i in range(100000) %}x{{ i }}{% endfor %}")


# ---------------------------------------------------------------------------- where it is found


def write(directory: Path, **files: Any) -> None:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    write(tmp_path, tokenizer_config={"bos_token": "<s>"})
    assert load_chat_template(tmp_path) is None


def test_the_jinja_file_wins_over_the_configuration(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": "config {{ bos_token }}"})
    write(tmp_path, special_tokens_map={"bos_token": {"content": "<b>"}})
    template = load_chat_template(tmp_path)
    assert template is not None and template.render(USER) == "config <b>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    template = load_chat_template(tmp_path)
    assert template is not None and template.render(USER) == "file <b>"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(tmp_path, tokenizer_config={"chat_template": named})
    template = load_chat_template(tmp_path)
    assert template is not None
    assert (template.render(USER), template.render(USER, tools=[{"name": "f"}])) == ("d", "t")


def test_a_file_given_by_the_administrator_keeps_the_models_tokens(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": "own"})
    (tmp_path / "other.jinja").write_text("other {{ eos_token }}")
    template = load_chat_template(tmp_path, str(tmp_path / "other.jinja"))
    assert template is not None and template.render(USER) == "other </s>"


def test_templates_in_a_gguf_file(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ bos_token }}{{ eos_token }}{{ unk_token }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for path in (tmp_path / "m.gguf", tmp_path):
        template = load_chat_template(path)
        assert template is not None and template.render(USER) == "<s></s>"


def test_broken_templates_end_start_up(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"not valid Jinja: .* \(line 2\)"):
        ChatTemplate("a\n{% if %}")
    with pytest.raises(WeightsError, match="cannot read the chat template"):
        load_chat_template(tmp_path, str(tmp_path / "nowhere.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(WeightsError, match="must hold a JSON object, not list"):
        load_chat_template(tmp_path)
