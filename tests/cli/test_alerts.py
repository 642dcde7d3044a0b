"""`jaxserve alerts test` against receivers of our own."""

from __future__ import annotations

import pytest

from jaxserve.cli import main
from tests.fakes.alert_receiver import AlertReceiver

SECRET = "sEcReT12345"


def test_all_receivers_are_told_and_each_is_a_line(capsys: pytest.CaptureFixture[str]):
    with AlertReceiver() as good, AlertReceiver() as bad:
        bad.statuses = [403] * 2
        settings = [
            f"alerts.webhooks={good.url}/{SECRET},{bad.url}/{SECRET}",
            f"alerts.slack=critical:{good.url}/{SECRET}",
        ]
        words = [word for setting in settings for word in ("--set", setting)]
        assert main(["alerts", "test", *words]) == 1
        shown = capsys.readouterr()
        assert shown.out.splitlines() == [
            "slack 1: has it",
            "webhook 1: has it",
            "webhook 2: it answered with status 403",
        ]
        assert SECRET not in shown.out + shown.err
        assert [body.get("status") for body in good.bodies] == [None, None, "firing", "resolved"]


def test_nobody_to_tell_is_an_error(capsys: pytest.CaptureFixture[str]):
    assert main(["alerts", "test"]) == 2
    assert "nobody to tell" in capsys.readouterr().err
