"""The pages say what is so: links, files, settings, endpoints, parameters, commands, examples."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from jaxserve import cli, errors
from jaxserve.bench import cli as bench_cli
from jaxserve.config import Config
from jaxserve.http.console import PATHS as CONSOLE_PATHS
from jaxserve.http.observer.parts import check_parts
from jaxserve.settings import load_config

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "http-api.md").read_text()
SECTIONS = {field.name for field in dataclasses.fields(Config)}
KEYS = {
    f"{section}.{key.name}"
    for section in SECTIONS
    for key in dataclasses.fields(getattr(Config(), section))
}
ROUTES = {
    *re.findall(r'Route\("([^"{]+)"', (ROOT / "jaxserve" / "http" / "app.py").read_text()),
    *CONSOLE_PATHS,
}
#: Endings of files, which a section's name before the dot does not make a setting.
ENDINGS = {"json", "md", "py", "sqlite", "sqlite3", "yaml"}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language, those in lists too."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_parse(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_examples_exist(page: Path) -> None:
    for block in blocks(page, "bash"):
        settings = re.findall(r"--set (\S+)", block)
        assert load_config(settings=settings, environ={})
        for name in re.findall(r"\bJAXSERVE_[A-Z_]+", block):
            load_config(environ={name: "1"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_in_examples_exist(page: Path) -> None:
    for block in blocks(page, "bash"):
        for script in re.findall(r"^(scripts/\w+)", block, re.M):
            assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benchmarks_in_examples_take_their_arguments(page: Path) -> None:
    for block in blocks(page, "bash"):
        for words in re.findall(r"jaxserve bench (.*)", block.replace("\\\n", " ")):
            assert bench_cli.parser().parse_args(words.partition(" > ")[0].split())


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_example_configurations_load(file: Path) -> None:
    check_parts(load_config(file, environ={}))


def test_the_configuration_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "scripts/config_docs.py")
    assert spec is not None
    assert spec.loader is not None
    config_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config_docs)
    assert (ROOT / "docs" / "configuration.md").read_text() == config_docs.render()


def test_every_parameter_that_is_read_is_documented() -> None:
    readers = "flag|integer|number|text|texts|texts_or_tokens|mapping|token_ids|nested|take"
    names = set()
    chat = ("sampling", "chat", "completions", "tokens", "responses")
    http = (f"http/{name}" for name in (*chat, "embeddings", "score", "texts"))
    for name in (*http, "text/conversation", "text/asked_grammar", "text/tools/asked"):
        source = (ROOT / "jaxserve" / f"{name}.py").read_text()
        names |= set(re.findall(rf'\bfields\.(?:{readers})\("(\w+)"', source))
    assert {"temperature", "messages", "prompt", "seed"} <= names  # the pattern still finds them
    inside_messages = {"role", "content", "name", "type", "text", "arguments"}
    inside_tags = {"structures", "triggers"}  # docs/structured-output.md has them
    inside_tools = {"description", "parameters", "strict", "function", "mode", "allowed_tools"}
    missing = sorted(
        n for n in names - inside_messages - inside_tools - inside_tags if f"`{n}" not in API
    )
    assert not missing


def test_every_error_code_is_documented() -> None:
    internal = {"internal_error", "cancelled", "config_error", "weights_error", "unsupported_model"}
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.JaxserveError)
    ]
    for kind in kinds:
        if kind.code not in internal:
            row = next((line for line in API.splitlines() if f"`{kind.code}`" in line), None)
            assert row is not None, kind.code
            assert row.startswith(f"| {kind.status} |"), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(), flags=re.M | re.S)
    named = re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z0-9_]+)\b(?!\()", text)
    assert {f"{section}.{key}" for section, key in named if key not in ENDINGS} <= KEYS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_of_settings_load(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        if yaml.safe_load(block).keys() <= SECTIONS:
            (tmp_path / "block.yaml").write_text(block.replace("…", "x"))
            check_parts(load_config(tmp_path / "block.yaml", environ={}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_endpoints_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(?:localhost|127\.0\.0\.1):\d+(/[\w/]+)", page.read_text())
    named += re.findall(r"`(?:GET |POST )?(/v1/[\w/]+|/[a-z]+)[`?]", page.read_text())
    others = {"/v1", "/v1/traces"}  # where clients and collectors begin
    assert set(named) - others <= ROUTES | {"/v1/models/NAME"}


def test_every_endpoint_is_documented() -> None:
    known = API + (ROOT / "docs" / "console.md").read_text()
    files = set(CONSOLE_PATHS) - {"/console"}
    assert not [path for path in ROUTES - files if f"`{path}" not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_their_arguments(page: Path) -> None:
    for block in blocks(page, "bash"):
        for start, rest in re.findall(
            r"(scripts/serve|python -m jaxserve)\b(.*)", block.replace("\\\n", " ")
        ):
            words = shlex.split(rest.partition(" > ")[0], comments=True)
            words = ["serve", *words] if start == "scripts/serve" else words
            if words[0] != "bench":  # which have a test of their own
                assert not cli._parser().parse_known_args(words)[1], rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page.read_text()):
        other = page.parent / target if target else page
        heads = re.findall(r"^#+ (.*)$", other.read_text().lower(), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in heads], anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    folders = "benchmarks|configs|deploy|docs|jaxserve|pallas_kernels|scripts|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./*-]+)", page.read_text()):
        assert any(ROOT.glob(name.rstrip("/"))), name
