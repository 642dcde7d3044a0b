"""The benchmark of the ledger, on a small one."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import ledger


def test_a_months_report_by_tenant_is_within_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rows", "3000", "--tenants", "10", "--users", "100", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["ledger", *words])
    assert ledger.main() == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sqlite"]["within_limit"]
    assert record["sqlite"]["report_ms"]["month totals of all tenants"] < 1000
    assert 100 < record["bytes_per_request"] < 1500
