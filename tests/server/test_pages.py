"""Examples of docs/structured-output.md and docs/embeddings.md that ask a server, as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent.parent / "docs"


def run(page: str, server: Server) -> None:
    """Runs the page's one example with a client, and closes that."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    (example,) = (block for block in blocks if "OpenAI(" in block)
    names: dict[str, Any] = {}
    asked = example.replace("http://127.0.0.1:8000", server.base_url)
    exec(compile(asked, page, "exec", dont_inherit=True), names)  # nor this file's __future__
    names["client"].close()


def test_structured_output(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run("structured-output.md", server)
    assert re.fullmatch(
        r"name='.*' country='(France|Italy)' inhabitants=-?\d+\n", capsys.readouterr().out
    )


def test_embeddings(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run("embeddings.md", server)
    assert capsys.readouterr().out == "2 128\n"
