"""The console in a real browser, against a whole server without a key file."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.types import SamplingParams
from tests.console.browser import AXE, PHONE, chromium, needs_browser, server, until, visiting
from tests.console.documents import ALERTS, COSTS, LINES, SLO, USAGE, answer_with_documents
from tests.fakes.engine import oracle
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import chat_prompt
from tests.http.test_adapters import written

pytestmark = needs_browser
TABS = ("overview", "chat", "requests", "slo", "costs", "alerts", "models")
STAGES = ["receive", "admit", "tokenize", "queue", "prefill", "decode", "detokenize"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server."""
    with server(tmp_path_factory.mktemp("server"), "scheduler.max_rows=8") as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(base: str) -> Iterator[Any]:
    """Chromium."""
    with chromium() as made:
        yield made


def seed_for(content: str, *, least: int, most: int) -> tuple[int, str]:
    """A seed by which the fake answers with so many tokens and ends by itself, and what it says."""
    for seed in range(2000):
        sampling = SamplingParams(max_tokens=most, seed=seed)
        tokens = oracle(chat_prompt(content), sampling)
        if least <= len(tokens) < most:
            return seed, ByteTokenizer().decode(tokens)
    raise AssertionError("no such seed")


def ask(page: Any, content: str, seed: int, max_tokens: int) -> None:
    """Sends a message by keys alone."""
    page.fill("#p-seed", str(seed))
    page.fill("#p-max-tokens", str(max_tokens))
    page.fill("#prompt", content)
    page.press("#prompt", "Enter")


def tile(page: Any, label: str) -> str:
    """The value of a tile of the overview."""
    found = page.locator(".tile", has=page.locator("dt", has_text=re.compile(f"^{label}$")))
    return found.locator(".value").inner_text()


def work(base: str, count: int = 6) -> None:
    """Requests, some at once."""

    def one(number: int) -> None:
        body = {
            "messages": [{"role": "user", "content": f"number {number}"}],
            "max_tokens": 12,
            "ignore_eos": True,
        }
        assert httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60).status_code == 200

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_page_loads_without_a_fault_and_its_numbers_move(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open()
        assert page.inner_text("#model") == "fake"
        assert page.locator("#key-button").is_hidden()  # nothing is asked
        work(base)
        until(
            page,
            "[...document.querySelectorAll('.tile .sub')].some(e => /of \\d+ requests/.test("
            "e.textContent) && parseInt(e.textContent.slice(3)) >= 6)",
        )
        page.wait_for_selector(".chart path.line.s0[d^=M]")
        assert tile(page, "Failed").startswith("0")
        until(
            page,
            "[...document.querySelectorAll('.tile')].some(e => e.querySelector('dt').textContent "
            "=== 'TTFT p95' && e.querySelector('.value').textContent.endsWith('ms'))",
        )
        assert page.locator(".chart").count() == 12
        assert "NaN" not in page.content() and "undefined" not in page.inner_text("body")
        assert visit.refused == []


def test_a_chart_is_read_by_mouse_by_keys_and_as_a_table(base: str, browser: Any):
    work(base, 2)
    with visiting(browser, base) as visit:
        page = visit.open()
        chart = page.locator(".chart", has_text="Queue, sequences")
        plot = chart.locator("svg.plot")
        until(
            page,
            "document.querySelectorAll('.chart')[5].querySelector('path.s0')?.getAttribute('d')",
        )
        assert "running: now" in plot.get_attribute("aria-label")
        plot.focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowLeft")
        said = chart.locator("[role=status]").inner_text()
        assert re.match(r"\d\d:\d\d:\d\d: running \S+, waiting \S+", said)
        assert "running" in chart.locator(".readout").inner_text()
        page.keyboard.press("Escape")
        assert chart.locator(".readout").is_hidden()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
        assert "waiting" in chart.locator(".readout").inner_text()
        chart.get_by_role("button", name="Queue, sequences as a table").click()
        heads = chart.locator("thead th").all_inner_texts()
        assert heads == ["Time", "running", "waiting"]
        values = chart.get_by_role("region", name="Queue, sequences: values")
        until(page, "document.querySelector('.values .scroll').scrollHeight > 280")
        values.focus()
        values.evaluate("e => { e.scrollTop = 40; e.firstChild.dataset.old = 1; }")
        until(page, "!document.querySelector('.values [data-old]')")  # it was filled anew
        assert values.evaluate("e => [e.scrollTop, e === document.activeElement]") == [40, True]
        for choice in ("15 min", "24 h", "5 min"):
            page.get_by_role("radio", name=choice, exact=True).check()
            page.wait_for_selector(".chart svg .tick")


def test_the_chat_streams_and_says_what_it_took(base: str, browser: Any):
    seed, text = seed_for("Say something", least=40, most=80)
    with visiting(browser, base) as visit:
        page = visit.open("chat")
        ask(page, "Say something", seed, 80)
        page.wait_for_selector(".turn.assistant .token")
        early = page.locator(".turn.assistant .said .text").text_content()
        assert len(early) < len(text)  # it came in pieces
        page.wait_for_selector(".turn.assistant[aria-busy=false]")
        assert page.locator(".turn.assistant .said .text").text_content() == text
        assert page.evaluate("document.activeElement.id") == "prompt"
        meta = page.locator(".turn.assistant .meta").inner_text()
        assert "ended by itself" in meta and "tokens/s" in meta and "first token" in meta
        page.locator(".time summary").click()
        assert page.locator(".waterfall tbody th").all_inner_texts() == STAGES
        covered = page.locator(".waterfall .facts div", has_text="Covered").inner_text()
        assert float(covered.split()[1].rstrip("%\u202f ")) >= 99


def test_tokens_show_their_alternatives_by_mouse_and_by_keys(base: str, browser: Any):
    seed, _ = seed_for("Tokens?", least=20, most=40)
    with visiting(browser, base) as visit:
        page = visit.open("chat")
        ask(page, "Tokens?", seed, 40)
        page.wait_for_selector(".turn.assistant[aria-busy=false]")
        page.locator(".token").nth(3).hover()
        tip = page.locator(".tip")
        assert tip.locator("tbody tr").count() >= 5
        assert "log-probability -" in tip.inner_text()
        assert tip.locator("tr.chosen").count() >= 1
        page.mouse.move(5, 5)
        assert tip.is_hidden()
        page.locator(".turn.assistant .said .text").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.locator(".token.picked").get_attribute("data-at") == "1"
        assert tip.is_visible()
        page.keyboard.press("Escape")
        assert tip.is_hidden()


def test_escape_stops_the_stream_here_and_on_the_server(base: str, browser: Any):
    seed, text = seed_for("Go on", least=250, most=600)
    with visiting(browser, base) as visit:
        page = visit.open("chat")
        ask(page, "Go on", seed, 600)
        page.wait_for_selector(".token:nth-child(8)")
        assert page.get_by_role("button", name="Stop").is_visible()
        page.keyboard.press("Escape")
        page.wait_for_selector(".turn.assistant[aria-busy=false]")
        said = page.locator(".turn.assistant .said .text").text_content()
        assert text.startswith(said) and len(said) < len(text)
        assert "stopped" in page.locator(".turn.assistant .meta").inner_text()
        page.goto(f"{base}/console#requests")
        page.wait_for_selector("tbody tr:first-child .o-left")


def test_an_error_is_shown_plainly_and_what_failed_is_not_sent_again(base: str, browser: Any):
    seed, text = seed_for("And now?", least=4, most=20)
    with visiting(browser, base) as visit:
        page = visit.open("chat")
        ask(page, "Too much", 1, 100_000)
        page.wait_for_selector(".turn.assistant .error-text:not([hidden])")
        said = page.locator(".turn.assistant .error-text").inner_text()
        assert "max_tokens" in said and "400" in said
        ask(page, "And now?", seed, 20)
        page.wait_for_selector(".turn.assistant:nth-of-type(4)[aria-busy=false]")
        assert page.locator(".turn.assistant .said .text").last.text_content() == text
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0


def test_an_answer_is_held_to_a_schema(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open("chat")
        page.fill("#p-schema", '{"enum": ["tea", "coffee"]}')
        ask(page, "Tea or coffee?", 1, 40)
        page.wait_for_selector(".turn.assistant[aria-busy=false]")
        said = page.locator(".turn.assistant .said .text").text_content()
        assert json.loads(said) in ("tea", "coffee")
        page.fill("#p-schema", "{tea}")
        ask(page, "Tea?", 1, 40)
        page.wait_for_selector(".turn.assistant .error-text:not([hidden])")
        assert "no JSON" in page.locator(".turn.assistant .error-text").last.inner_text()


def test_requests_are_listed_and_opened_by_keys(base: str, browser: Any):
    work(base, 3)
    httpx.post(f"{base}/v1/chat/completions", json={"messages": [], "temperature": -1})
    with visiting(browser, base) as visit:
        page = visit.open("requests")
        page.wait_for_selector("tbody tr:nth-child(4)")
        page.get_by_label("Find").fill("refused")
        until(page, "document.querySelectorAll('.requests tbody tr').length >= 1")
        assert set(page.locator(".badge").all_inner_texts()) == {"refused"}
        page.get_by_label("Find").fill("done")
        button = page.locator(".requests button").first
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector(".requests .waterfall")
        assert page.locator(".waterfall tbody th").all_inner_texts() == STAGES
        assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
        # What is pressed is not taken away by requests that come meanwhile.
        page.get_by_label("Find").fill("")
        page.evaluate("document.querySelector('.requests tbody tr').dataset.old = 1")
        work(base, 1)
        page.wait_for_selector("tbody tr:nth-child(2)[data-old]")
        page.evaluate("location.hash = 'overview'")
        page.evaluate("location.hash = 'requests'")
        page.wait_for_selector(".requests tr.open + tr.detail .waterfall")


def test_all_is_reached_by_keys(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to content"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "theme"
        for theme in ("light", "dark", "auto"):
            page.keyboard.press("Enter")
            assert page.inner_text("#theme-name") == theme
            assert page.evaluate("document.documentElement.dataset.theme ?? 'auto'") == theme
        page.keyboard.press("Tab")
        seen = []
        for _ in TABS:
            assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
            seen.append(page.evaluate("document.activeElement.id").removeprefix("tab-"))
            assert page.locator(f"#panel-{seen[-1]}").is_visible()
            page.keyboard.press("ArrowRight")
        assert seen == list(TABS)
        assert page.evaluate("document.activeElement.id") == "tab-overview"
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"
        page.keyboard.press("Tab")  # the tabs are one stop; then what is in the panel
        assert page.evaluate("document.activeElement.closest('#panel-overview') !== null")


def test_a_server_that_goes_is_told_and_comes_again(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open()
        page.route("**/console/data*", lambda route: route.abort())
        page.wait_for_selector("#connection[data-state=down]")
        until(page, "document.getElementById('announce').textContent.startsWith('Disconnected')")
        assert "Disconnected for" in page.inner_text("#connection")
        assert page.locator(".tiles").is_visible()  # what was known stays, and looks old
        assert page.evaluate("document.body.classList.contains('stale')")
        page.unroute("**/console/data*")
        page.wait_for_selector("#connection[data-state=live]")


def test_an_observer_that_dies_leaves_a_gap_and_no_hole(browser: Any, tmp_path: Path):
    with server(tmp_path) as (own, pid), visiting(browser, own) as visit:
        page = visit.open("requests")
        work(own, 3)
        page.wait_for_selector(".requests tbody tr:nth-child(3)")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (observer,) = (
            int(child)
            for child in children
            if "observer.process" in Path(f"/proc/{child}/cmdline").read_text()
        )
        os.kill(observer, signal.SIGKILL)
        work(own, 2)  # the page may see it gone or not, as fast as it is started again
        page.wait_for_selector(".requests tbody tr:nth-child(5)")  # the old ones are still there
        page.goto(f"{own}/console#overview")
        page.wait_for_selector(".chart path.line.s0[d^=M]")


def test_what_nobody_has_configured_is_said_quietly(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open()
        for tab, path in {"slo": "/slo", "costs": "/v1/costs*", "alerts": "/v1/alerts"}.items():
            page.route(f"**{path}", lambda route: route.fulfill(status=404, json={}))
            page.goto(f"{base}/console#{tab}")
            page.wait_for_selector(f"#panel-{tab} .blank >> text=Not configured")
        page.goto(f"{base}/console#models")
        page.wait_for_selector("#panel-models >> text=Adapters are off")


def test_adapters_are_loaded_tried_and_unloaded(browser: Any, tmp_path: Path):
    written(tmp_path / "pirate", 1)
    settings = ("lora.enabled=true", "lora.classes=4x3")
    with server(tmp_path, *settings) as (own, _), visiting(browser, own) as visit:
        page = visit.open("models")
        page.wait_for_selector("#panel-models >> text=No adapters")
        page.fill("#lora-name", "pirate")
        page.fill("#lora-path", str(tmp_path / "nothing"))
        page.get_by_role("button", name="Load").click()
        page.wait_for_selector("#panel-models .outcome.error-text >> text=nothing")
        page.fill("#lora-path", str(tmp_path / "pirate"))
        page.get_by_role("button", name="Load").click()
        page.wait_for_selector("#panel-models .outcome >> text=pirate is loaded.")
        page.goto(f"{own}/console#chat")
        page.select_option("#p-model", "pirate")
        ask(page, "Ahoy", 3, 8)
        page.wait_for_selector(".turn.assistant .waterfall", state="attached")
        assert "pirate" in page.locator(".waterfall .facts").text_content()
        page.goto(f"{own}/console#models")
        page.get_by_role("button", name="Unload pirate").click()
        page.wait_for_selector("#panel-models >> text=No adapters")


def test_documents_of_the_other_parts_are_understood(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.open()
        shapes = page.evaluate(
            """async ([slo, costs, lines, usage, alerts]) => {
                const shapes = await import('/console/shapes.js');
                return {
                    slo: shapes.objectives(slo), goodput: shapes.goodput(slo),
                    costs: shapes.costs(costs, lines, usage), alerts: shapes.incidents(alerts),
                    nothing: [shapes.objectives({}), shapes.incidents(null), shapes.goodput({}),
                        shapes.costs({}, null, 5), shapes.costOf({cost: NaN}), shapes.costOf()],
                    cost: [shapes.costOf({cost: {total: '0.002', currency: 'usd'}}),
                        shapes.costOf({cost: 0.5})],
                };
            }""",
            [SLO, COSTS, LINES, USAGE, ALERTS],
        )
        first, second, third = shapes["slo"]
        assert (first["compliance"], first["target"]) == pytest.approx((0.9964, 0.99))
        assert (first["budgetLeft"], first["alerts"]) == (0.641, [])
        assert first["burns"][0] == {"window": "5m", "rate": 0.2}
        assert second["alerts"] == ["page", "ticket"]
        assert third["compliance"] is None and third["burns"] == []
        assert shapes["goodput"]["share"] == 0.983
        acme = shapes["costs"]["rows"][0]
        assert (acme["tenant"], acme["cost"], acme["inputTokens"]) == ("acme", 12.5, 32000)
        assert shapes["costs"]["currency"] == "USD"
        assert shapes["costs"]["total"] == pytest.approx(12.5042)
        assert [one["open"] for one in shapes["alerts"]] == [True, False]
        assert shapes["alerts"][1]["endedS"] == 1795603600
        nothing = {"currency": "", "total": 0, "rows": [], "lines": []}
        assert shapes["nothing"] == [[], [], None, nothing, None, None]
        assert shapes["cost"] == [
            {"cost": 0.002, "currency": "USD"},
            {"cost": 0.5, "currency": ""},
        ]


def test_markup_in_names_is_text_everywhere(base: str, browser: Any):
    with visiting(browser, base) as visit:
        page = visit.page
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        answer_with_documents(page)
        page = visit.open()
        for tab in ("slo", "costs", "alerts"):
            page.goto(f"{base}/console#{tab}")
            page.wait_for_selector(f"#panel-{tab} >> text=<script>alert(2)</script>")
            assert page.locator(f"#panel-{tab} script, #panel-{tab} img").count() == 0
        assert dialogs == []
        # Nor could a mistake make it so: the browser itself refuses markup from text.
        refused = page.evaluate(
            "(() => { try { document.body.innerHTML = '<b>x</b>'; return ''; }"
            " catch (error) { return error.name; } })()"
        )
        assert refused == "TypeError"
        visit.faults = [fault for fault in visit.faults if "TrustedHTML" not in fault]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_assistive_software(base: str, browser: Any, scheme: str):
    if not AXE.is_file():
        pytest.skip("needs axe-core: npm ci --prefix tests/node")
    work(base, 2)
    with visiting(browser, base, color_scheme=scheme, bypass_csp=True) as visit:
        answer_with_documents(visit.page)
        page = visit.open()
        page.evaluate(AXE.read_text())
        for tab in TABS:
            page.evaluate(f"location.hash = '{tab}'")
            page.wait_for_selector(f"#panel-{tab}:not([hidden]) > div")
            if tab == "chat":
                ask(page, "Say", 3, 8)
                page.wait_for_selector(".turn.assistant .waterfall", state="attached")
                page.locator(".time summary").click()
            elif tab == "requests":
                page.locator(".requests button").first.click()
                page.wait_for_selector(".requests .waterfall")
            elif tab != "overview":
                page.wait_for_selector(f"#panel-{tab} .card")
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            serious = [
                (violation["id"], violation["nodes"][0]["html"], violation["nodes"][0]["any"])
                for violation in found["violations"]
                if violation["impact"] in ("serious", "critical")
            ]
            assert serious == [], tab


def test_a_phone_scrolls_down_and_never_sideways(base: str, browser: Any):
    work(base, 2)
    with visiting(browser, base, viewport=PHONE, has_touch=True, is_mobile=True) as visit:
        answer_with_documents(visit.page)
        page = visit.open()
        for tab in TABS:
            page.evaluate(f"location.hash = '{tab}'")
            page.wait_for_selector(f"#panel-{tab}:not([hidden]) > div")
            if tab == "requests":
                page.locator(".requests button").first.click()
                page.wait_for_selector(".requests .waterfall")
            elif tab not in ("chat", "overview"):
                page.wait_for_selector(f"#panel-{tab} .card")
            widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert widths[0] <= widths[1] == PHONE["width"], tab


def test_who_wants_no_motion_gets_none(base: str, browser: Any):
    with visiting(browser, base, reduced_motion="reduce") as visit:
        page = visit.open("chat")
        ask(page, "Still", 1, 400)
        page.wait_for_selector(".caret", state="attached")
        assert page.evaluate(
            "getComputedStyle(document.querySelector('.caret')).animationName"
        ) == ("none")
        page.keyboard.press("Escape")
        page.wait_for_selector(".turn.assistant[aria-busy=false]")
