"""The console and keys: what it asks for, what it keeps, and what it then shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.console.browser import chromium, needs_browser, server, until, visiting
from tests.console.documents import HOSTILE

pytestmark = needs_browser


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a key file."""
    directory = tmp_path_factory.mktemp("server")
    rows = [
        {"hash": hashlib.sha256(b"sk-user").hexdigest(), "tenant": HOSTILE, "role": "user"},
        {"hash": hashlib.sha256(b"sk-admin").hexdigest(), "tenant": "operators", "role": "admin"},
    ]
    path = directory / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": rows}))
    with server(directory, f"http.key_file={path}") as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(base: str) -> Iterator[Any]:
    """Chromium."""
    with chromium() as made:
        yield made


def enter(page: Any, key: str) -> None:
    """Types a key in."""
    if page.locator("#key-panel").is_hidden():
        page.click("#key-button")
    page.fill("#key", key)
    page.press("#key", "Enter")


def test_keys_are_asked_for_tried_and_kept_in_the_tab_alone(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open(live=False)
        page.wait_for_selector("#connection[data-state=key]")
        assert page.locator("#key-panel").is_visible()
        assert page.get_attribute("#key", "type") == "password"
        page.wait_for_selector("text=A key is needed")
        enter(page, "sk-wrong")
        until(page, "document.getElementById('announce').textContent.includes('Key needed')")
        enter(page, "sk-admin")
        page.wait_for_selector("#connection[data-state=live]")
        assert page.locator("#key-panel").is_hidden()
        assert page.locator(".tiles").is_visible()
        kept = page.evaluate("[Object.keys(localStorage), {...sessionStorage}, document.cookie]")
        assert kept == [["jaxserve.theme"], {"jaxserve.key": "sk-admin"}, ""]
        assert "sk-admin" not in page.content()
        assert not any("sk-" in url for url in visit.urls)
        page.reload()
        page.wait_for_selector("#connection[data-state=live]")
        page.click("#key-button")
        page.click("#key-forget")
        page.wait_for_selector("#connection[data-state=key]")
        assert page.locator(".tiles").is_hidden()  # nor is what was seen by it
        assert page.evaluate("sessionStorage.length") == 0


def test_a_users_key_may_chat_and_sees_nothing_that_belongs_to_all(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open(live=False)
        page.wait_for_selector("#connection[data-state=key]")
        enter(page, "sk-user")
        page.wait_for_selector("#connection[data-state=forbidden]")
        page.wait_for_selector("text=This key is not an admin's")
        page.goto(f"{base}/console#chat")
        page.wait_for_selector("#p-model option[value=fake]", state="attached")
        page.fill("#p-seed", "3")
        page.fill("#p-max-tokens", "4")
        page.fill("#prompt", "Hi")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".turn.assistant[aria-busy=false] .meta >> text=tokens")
        assert page.locator(".turn.assistant .error-text").is_hidden()


def test_a_tenant_whose_name_is_markup_is_text(base: str, browser: Any):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "ignore_eos": True}
    headers = {"Authorization": "Bearer sk-user"}
    response = httpx.post(f"{base}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == 200
    with visiting(browser, base) as visit:
        page = visit.open("requests", live=False)
        page.wait_for_selector("#connection[data-state=key]")
        enter(page, "sk-admin")
        page.wait_for_selector("tbody >> text=<script>alert(2)</script>")
        page.goto(f"{base}/console#costs")
        page.wait_for_selector("#panel-costs table >> text=<script>alert(2)</script>")
        assert page.locator("main script, main img").count() == 0
