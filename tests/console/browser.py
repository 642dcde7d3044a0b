"""The machine's Chromium, and servers to look at with it.

Playwright's synchronous half runs an event loop in this thread as long as a browser is open: tests
that run loops of their own belong elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).parent.parent.parent
AXE = ROOT / "tests" / "node" / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
#: Of one device call of the paced fake engine.
STEP_MS = 30
TIMEOUT_S = 60
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}

needs_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]


@contextmanager
def server(directory: Path, *settings: str) -> Iterator[tuple[str, int]]:
    """A whole server over the paced fake engine; its address and process."""
    command = [
        *(sys.executable, "-m", "tests.fakes.serve", "http.port=0", "model.max_context=2000"),
        *("engine=tests.fakes.paced_engine", "cache.num_pages=1000", "model.served_name=fake"),
        *(f"telemetry.state_dir={directory / 'state'}", *settings),
    ]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=os.environ | {"FAKE_STEP_MS": str(STEP_MS)},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready on http"), (directory / "log").read_text()
        yield line.split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT_S)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Visit:
    """A page, and all that went wrong on it.

    Args:
        options: of the browser's context.

    Attributes:
        faults: errors of scripts, and what the console says of the policy.
        refused: URLs that were answered with 4xx or 5xx.
        urls: all that was asked for.
    """

    def __init__(self, browser: Any, base: str, **options: Any) -> None:
        self.base = base
        self.context = browser.new_context(**{"viewport": DESK} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.faults: list[str] = []
        self.refused: list[str] = []
        self.urls: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("response", self._on_response)

    def open(self, tab: str = "", *, live: bool = True) -> Any:
        """Goes to a tab; the page, once it is connected."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}/console#{tab}")
        if live:
            self.page.wait_for_selector("#connection[data-state=live]")
        return self.page

    def close(self) -> None:
        """Ends, with nothing wrong and nothing asked of anybody else."""
        self.context.close()
        assert self.faults == []
        foreign = [url for url in self.urls if not url.startswith((self.base, "about:"))]
        assert foreign == []

    def _on_console(self, message: Any) -> None:
        # That an answer was refused the browser says too; `refused` has it by its URL.
        if message.type == "error" and not re.match("Failed to load resource", message.text):
            self.faults.append(message.text)

    def _on_response(self, response: Any) -> None:
        if response.status >= 400:
            self.refused.append(response.url.removeprefix(self.base))


def until(page: Any, condition: str) -> None:
    """Waits until an expression is true: Playwright's own wait wants `eval`, which is forbidden."""
    deadline_s = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline_s, condition
        page.wait_for_timeout(30)


@contextmanager
def visiting(browser: Any, base: str, **options: Any) -> Iterator[Visit]:
    """A visit."""
    visit = Visit(browser, base, **options)
    try:
        yield visit
    except BaseException:
        visit.context.close()
        raise
    visit.close()
