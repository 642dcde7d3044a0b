"""/metrics of an application over the fake engine: what requests leave there."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest

from jaxserve.config import Config
from jaxserve.engine.parts import Parts, Progressing
from jaxserve.engine.thread import EngineThread
from jaxserve.http import observed
from jaxserve.http.observer.messages import Answer, Question
from jaxserve.http.observer.reporter import NoReporter
from jaxserve.types import DeviceInfo
from tests.fakes.engine import fake_parts
from tests.http.frontend import CONFIG, Front
from tests.http.metrics.exposed import Exposed

HI = [{"role": "user", "content": "hi"}]
DEVICE = DeviceInfo(kind="a device", count=2, flops_per_s=1e12, bytes_per_s=1e11)


def parts_on_a_device(config: Config, progress: Progressing) -> Parts:
    """The fake's, on something known."""
    return dataclasses.replace(fake_parts(config, progress), device=DEVICE)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with EngineThread(CONFIG, parts_on_a_device) as engine:
        made = Front(engine)
        try:
            yield made
        finally:
            made.close()


def seen(front: Front) -> Exposed:
    return Exposed(front.get("/metrics").text)


def labels(operation: str, model: str = "fake") -> dict[str, str]:
    """OpenTelemetry's, of one operation."""
    return {
        "gen_ai_operation_name": operation,
        "gen_ai_provider_name": "jaxserve",
        "gen_ai_request_model": model,
    }


def test_what_the_engine_computes_on_is_told(front: Front):
    page = seen(front)
    assert page.value("jaxserve_model_info", device="a device", model="fake") == 1
    assert page.value("jaxserve_devices") == 2
    assert page.value("jaxserve_peak_flops_per_second") == 2e12
    assert page.value("jaxserve_mbu_ratio") >= 0


def test_a_chat_is_counted_under_all_names(front: Front):
    body = {"messages": HI, "max_tokens": 70, "n": 2, "ignore_eos": True}
    used = front.ok("/v1/chat/completions", body)["usage"]
    page = seen(front)
    chat = labels("chat")
    assert page.value("gen_ai_server_request_duration_seconds_count", **chat) == 1
    assert page.value("gen_ai_server_time_to_first_token_seconds_count", **chat) == 1
    assert page.value("gen_ai_server_time_per_output_token_seconds_count", **chat) == 1
    outputs = chat | {"gen_ai_token_type": "output"}
    assert page.value("gen_ai_client_token_usage_sum", **outputs) == 140
    assert page.value("jaxserve_tenant_completion_tokens_total") == 140
    assert page.value("jaxserve_tenant_prompt_tokens_total") == used["prompt_tokens"]
    assert page.value("jaxserve_queue_seconds_count") == 2
    assert page.value("jaxserve_finished_total", reason="length") == 2
    vllm = {"engine": "0", "model_name": "fake"}
    assert page.value("vllm:request_success_total", **vllm, finished_reason="length") == 2
    assert page.value("vllm:request_params_n_sum", **vllm) == 2
    assert page.value("vllm:request_max_num_generation_tokens_sum", **vllm) == 70
    assert page.value("vllm:generation_tokens_total", **vllm) == 140


def test_a_refused_request_has_an_error_type(front: Front):
    assert front.post("/v1/completions", {"prompt": "x", "max_tokens": -1}).status_code == 400
    page = seen(front)
    (error,) = [
        found["error_type"]
        for found in page.labels("gen_ai_server_request_duration_seconds_count")
        if found["gen_ai_operation_name"] == "text_completion" and "error_type" in found
    ]
    assert error == "invalid_value"
    assert page.value("jaxserve_tenant_requests_total", outcome="refused") == 1
    assert page.value("jaxserve_finished_total", reason="error") == 0  # it had no choices yet
    route = {"route": "/v1/completions", "status": "400"}
    assert page.value("jaxserve_requests_total", **route) == 1


def test_pages_that_ask_for_no_work_are_counted_by_status_only(front: Front):
    before = seen(front).samples
    front.get("/v1/models")
    front.get("/nowhere")
    after = seen(front).samples
    grown = {name for (name, found), value in after.items() if before.get((name, found)) != value}
    assert grown <= {"jaxserve_requests_total", "jaxserve_step_age_seconds"}


def test_without_an_observer_nothing_is_said_of_one(front: Front):
    assert "observer" not in front.get("/metrics").text


class HungObserver(NoReporter):
    """Takes questions and does not answer, until it does."""

    num_asked = 0
    answers = False

    async def ask(self, question: Question) -> Answer:
        self.num_asked += 1
        if not self.answers:
            await asyncio.Event().wait()
        return Answer(content_type="text/plain", body=b"jaxserve_observer_up 1.0\n")


def test_an_observer_that_hangs_delays_one_scrape_in_ten_seconds(
    front: Front, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(observed, "_SCRAPE_S", 0.01)
    observer = HungObserver()
    frontend = front.app.frontend
    now_s = 100.0

    async def scrape() -> str:
        sent: list[dict] = []

        async def send(message: dict) -> None:
            sent.append(message)

        await page({"headers": []}, None, send)
        return sent[-1]["body"].decode()

    monkeypatch.setattr(frontend, "reporter", observer)
    page = observed.PrometheusMetrics(frontend, clock_s=lambda: now_s)
    for _ in range(3):
        text = front.run(scrape())
        assert "jaxserve_observer_up 0.0" in text and "jaxserve_running 0.0" in text
    assert observer.num_asked == 1
    now_s += 11
    observer.answers = True
    assert "jaxserve_observer_up 1.0" in front.run(scrape())
    assert "jaxserve_observer_up 1.0" in front.run(scrape())
    assert observer.num_asked == 3
