"""The pages say what is so: links, configuration keys, API parameters, examples."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from jaxserve import errors
from jaxserve.bench import cli as bench_cli
from jaxserve.http.observer.parts import check_parts
from jaxserve.settings import load_config

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "http-api.md").read_text()


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


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
