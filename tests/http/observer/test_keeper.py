"""The observer's process is kept running: after a death, and where it only hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from jaxserve.config import Config, HttpConfig, ModelConfig
from jaxserve.http.observer import keeper as keeper_module
from jaxserve.http.observer.keeper import ObserverKeeper


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_another_is_started(
    how: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "CHECK_S", 0.05)
    monkeypatch.setattr(keeper_module, "HUNG_S", 1.0)
    config = Config(model=ModelConfig(served_name="m"), http=HttpConfig(port=0))

    async def answers(keeper: ObserverKeeper) -> None:
        while True:
            try:
                await keeper._ask()
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.05)
            else:
                return

    async def work() -> None:
        keeper = ObserverKeeper(config, tmp_path)
        keeper.start()
        try:
            async with asyncio.timeout(60):
                while not keeper._answered:
                    await asyncio.sleep(0.05)
                first = keeper.pid
                assert first is not None
                os.kill(first, how)
                while keeper.pid == first:
                    await asyncio.sleep(0.05)
                await answers(keeper)
        finally:
            await keeper.close()

    asyncio.run(work())
