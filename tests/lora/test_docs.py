"""The first example of docs/lora.md makes an adapter that fits the embedded model.

The other is run by tests/test_offline_adapters.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxserve.formats.peft import read_adapter

PAGE = Path(__file__).parent.parent.parent / "docs" / "lora.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands."""
    block, _ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})
    adapter = read_adapter(tmp_path / "my-adapter", max_rank=16)
    assert adapter.rank == 8 and len(adapter.modules) == 60
