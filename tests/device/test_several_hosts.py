"""Two hosts with two simulated devices each: the same as one with four; and what a loss does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.formats.peft import write_adapter
from tests.device.sharded import SETTINGS
from tests.device.test_sharded import assert_equal
from tests.lora.adapters import random_adapter
from tests.models.loading import ORACLE

TIMEOUT_S = 240
MODEL = str(ORACLE / "llama3")
SMALL = (
    *SETTINGS,
    "kernels.layers=scanned",
    "scheduler.max_rows=2",
    "scheduler.max_step_tokens=8",
    "scheduler.decode_steps=2",
    f"parallel.connect_timeout_s={TIMEOUT_S}",
    "parallel.lost_after_s=3",
)
#: Of ranks up to 7, which the adapters that are served have.
LORA = ("lora.enabled=true", "lora.classes=8x3")
#: Of these the fewest programs.
TINY = ("scheduler.max_rows=1", "scheduler.decode_steps=1")
#: A loss ends every engine within this time, of which 3 s are silence.
LOST_WITHIN_S = 15


class Program:
    """A process whose stderr is kept, and whose stdout is read line by line."""

    def __init__(self, *command: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environ,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.log += line

    def line(self, start: str) -> str:
        """The next line that starts so."""
        for line in self.process.stdout or ():
            if line.startswith(start):
                return line
        self.process.wait()
        self._reader.join()
        raise AssertionError(self.log[-3000:])

    def ends_with(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for its end; its exit status."""
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        status = self.process.wait(timeout_s)
        self._reader.join()
        return status

    def close(self) -> None:
        """Kills it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@contextmanager
def running(*programs: Program) -> Iterator[None]:
    """Kills them at the end."""
    try:
        yield
    finally:
        for program in programs:
            program.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Setting of a compilation cache that the tests of this module share."""
    return f"engine.compile_cache_dir={tmp_path_factory.mktemp('compiled')}"


def two_hosts(*settings: str) -> list[list[str]]:
    """Settings of two hosts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = ["parallel.hosts=2", f"parallel.coordinator=127.0.0.1:{port}", *SMALL, *settings]
    return [[*common, f"parallel.host={host}"] for host in (0, 1)]


def start(how_often: str, *settings: str, model: str = MODEL) -> list[Program]:
    """Both hosts' engines, without a front end."""
    return [
        Program("tests.device.several", how_often, model, "2", *own) for own in two_hosts(*settings)
    ]


@pytest.mark.slow
@pytest.mark.in_turn("two hosts")
@pytest.mark.parametrize("data", [1, 2])
def test_two_hosts_are_as_one(cache: str, data: int) -> None:
    mesh = [f"parallel.data={data}", f"parallel.model={4 // data}"]
    hosts = start("once", cache, *mesh)
    with running(*hosts):
        found: dict[str, Any] = json.loads(hosts[0].line("{"))
        assert [host.ends_with() for host in hosts] == [0, 4]
        assert "host 0 was lost: it was told to end" in hosts[1].log
    alone = Program("tests.device.several", "once", MODEL, "4", *SMALL, cache, *mesh)
    with running(alone):
        assert_equal({"mesh": found, "one": json.loads(alone.line("{"))}, 2e-5)


@pytest.mark.slow
@pytest.mark.in_turn("two hosts")
def test_adapters_are_loaded_on_both_hosts(cache: str) -> None:
    """While they serve: those of experts too, which each device has a part of."""
    model = str(ORACLE / "mixtral")
    mesh = ["parallel.expert=2", "parallel.model=2", "lora.experts=true", *LORA, *TINY]
    hosts = start("once", cache, *mesh, model=model)
    with running(*hosts):
        found: dict[str, Any] = json.loads(hosts[0].line("{"))
        assert [host.ends_with() for host in hosts] == [0, 4]
        assert "host 0 was lost: it was told to end" in hosts[1].log
    alone = Program("tests.device.several", "once", model, "4", *SMALL, cache, *mesh)
    with running(alone):
        expected = json.loads(alone.line("{"))
        assert alone.ends_with() == 0
    assert_equal({"mesh": found, "one": expected}, 2e-5)
    assert found["joins"] == expected["joins"] == 8  # of 10 requests


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("lost", "number", "reason"),
    [
        (1, signal.SIGKILL, "its connection "),
        (0, signal.SIGKILL, "its connection "),
        (1, signal.SIGSTOP, "nothing was heard of it for 3 s"),
    ],
)
def test_a_lost_host_ends_the_other(
    cache: str, lost: int, number: signal.Signals, reason: str
) -> None:
    hosts = start("forever", cache, *TINY)
    with running(*hosts):
        hosts[0].line("{")
        hosts[lost].process.send_signal(number)
        left = hosts[1 - lost]
        assert left.ends_with(LOST_WITHIN_S) == 4
        told = [line for line in left.log.splitlines() if line.startswith("jaxserve: ")]
        assert len(told) == 1 and told[0].startswith(f"jaxserve: host {lost} was lost: {reason}")


@pytest.mark.slow
def test_hosts_come_together_again(cache: str, tmp_path: Path) -> None:
    """An adapter that was loaded meanwhile answers as before, too."""
    modules = {f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in range(3)}
    write_adapter(tmp_path, random_adapter(modules, 4, seed=0, scale=0.5))
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 1}
    common = [f"model.path={MODEL}", "engine=jaxserve.engine.process", "http.port=0", cache]
    hosts = [
        Program("tests.fakes.serve", *common, *own, JAX_NUM_CPU_DEVICES="2")
        for own in two_hosts(*TINY, *LORA)
    ]
    with running(*hosts):
        follower = hosts[1].line("/live and /ready of host 1 on ").split()[-1]
        assert httpx.get(f"{follower}/live", timeout=TIMEOUT_S).status_code == 200
        base = hosts[0].line("ready on http").split()[-1]
        answer = completion(base, body)
        load = {"lora_name": "mine", "lora_path": str(tmp_path)}
        loaded = httpx.post(f"{base}/v1/load_lora_adapter", json=load, timeout=TIMEOUT_S)
        assert loaded.status_code == 200, loaded.text
        adapted = completion(base, body | {"model": "mine"})
        assert adapted != answer
        assert httpx.get(f"{follower}/ready", timeout=TIMEOUT_S).status_code == 200
        (engine,) = children(hosts[1].process.pid)
        os.kill(engine, signal.SIGKILL)
        seen = {}
        deadline_s = time.monotonic() + TIMEOUT_S
        while seen.get(503) is None:  # not ready meanwhile; its connections are not refused
            assert time.monotonic() < deadline_s
            found = httpx.get(f"{base}/ready", timeout=TIMEOUT_S)
            seen[found.status_code] = found.json()["status"]
        assert hosts[0].line("ready on http").split()[-1] == base
        assert completion(base, body) == answer
        assert completion(base, body | {"model": "mine"}) == adapted
        for host in hosts:
            host.process.send_signal(signal.SIGTERM)
        assert [host.ends_with() for host in hosts] == [0, 0]
        assert "jaxserve: host 1 was lost: its connection " in hosts[0].log
        assert "the engine process ended with status 4; it is started again" in hosts[0].log
        assert "the engine process ended by signal 9; it is started again" in hosts[1].log


def completion(base: str, body: dict[str, Any]) -> str:
    """The text that a request brings, once the server is ready."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while httpx.get(f"{base}/ready", timeout=TIMEOUT_S).status_code != 200:
        assert time.monotonic() < deadline_s
    answer = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def children(pid: int) -> list[int]:
    """Child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
