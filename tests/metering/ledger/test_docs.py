"""The examples of docs/ledger.md say what they are said to say."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest

from jaxserve import cli
from jaxserve.metering.entry import ZERO
from jaxserve.metering.ledger.book import Ledger
from jaxserve.metering.ledger.sqlite import Sqlite
from jaxserve.metering.reports import costs_report
from tests.metering.ledger.entries import NOVEMBER_S, entry

PAGE = Path(__file__).parent.parent.parent.parent / "docs" / "ledger.md"


def blocks(kind: str) -> list[str]:
    """Code of a kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def test_the_example_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(PAGE), "exec"), {})
    assert out.getvalue() == blocks("text")[0]


def test_the_answer_of_costs(tmp_path: Path) -> None:
    ledger = Ledger(Sqlite(tmp_path / "ledger"))
    free = {"prefill_cost": ZERO, "decode_cost": ZERO, "wasted_cost": ZERO}
    paid = free | {"prefill_cost": Decimal("0.125"), "decode_cost": Decimal("0.25")}
    ledger.add([entry(0, **paid), entry(1, **free), entry(2, **free)])
    asked = {"from": "2026-11-01", "to": "2026-12-01", "interval": "month", "group_by": "tenant"}
    _, body = costs_report(ledger, "usd", asked, "ops", True, NOVEMBER_S + 10)
    ledger.close()
    assert json.loads(body) == json.loads(blocks("json")[0])


def test_the_cost_of_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("result.json").write_text(blocks("json")[1])
    (command,) = re.findall(r"^\S*python -m jaxserve (cost .*)$", PAGE.read_text(), re.M)
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == blocks("text")[1]
