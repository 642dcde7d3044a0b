"""The whole server as processes: supervisor, fake engine, HTTP workers."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from jaxserve.config import ModelConfig
from jaxserve.weights.sources import served_name

TIMEOUT_S = 60
HI = [{"role": "user", "content": "hi"}]
ENDLESS = {"messages": HI, "ignore_eos": True, "stream": True, "seed": 1}


@contextmanager
def started(*settings: str, under: Sequence[str] = ()) -> Iterator[subprocess.Popen]:
    """A server process, started by the command `under`; killed at the end if it still runs."""
    process = subprocess.Popen(
        [*under, sys.executable, "-m", "tests.fakes.serve", "http.port=0", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def address_of(process: subprocess.Popen) -> str:
    """Waits for the line that says it is ready."""
    line = process.stdout.readline()
    assert line.startswith("ready on http"), process.communicate()
    return line.split()[-1]


def children(pid: int) -> list[int]:
    """Child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return ""


def wait_gone(pidfd: int) -> None:
    """Waits for a process's end."""
    assert select.select([pidfd], [], [], TIMEOUT_S)[0], "it still runs"
    os.close(pidfd)


def chunks(lines: Iterator[str]) -> Iterator[dict]:
    """The documents of a stream."""
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_drains_and_ends_with_0(workers):
    with started(f"http.workers={workers}", "model.max_context=3000") as process:
        base = address_of(process)
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
            assert client.get("/ready").status_code == 200
            assert client.get("/health").json()["status"] == "ok"
            with client.stream("POST", "/v1/chat/completions", json=ENDLESS) as stream:
                lines = stream.iter_lines()
                next(chunks(lines))
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason":"length"' in rest[-4]
        assert process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in process.stderr.read()


def test_workers_share_metrics():
    with started("http.workers=2") as process:
        base = address_of(process)
        body = {"messages": HI, "max_tokens": 3, "ignore_eos": True}
        for _ in range(8):  # each over a connection of its own, so that both workers get some
            assert httpx.post(f"{base}/v1/chat/completions", json=body).status_code == 200
        for _ in range(4):
            text = httpx.get(f"{base}/metrics").text
            values = dict(
                line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
            )
            assert float(values["jaxserve_output_tokens_total"]) == 24
            assert float(values["jaxserve_time_to_first_token_seconds_count"]) == 8
            assert float(values["jaxserve_request_duration_seconds_count"]) == 8
            assert float(values["jaxserve_step_decode_tokens_total"]) >= 8
            assert float(values["jaxserve_requests_in_flight"]) == 1  # this one
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 0


def test_an_engine_that_is_not_started_again_ends_streams_and_server():
    with started("model.max_context=3000", "engine.max_restarts=0") as process:
        base = address_of(process)
        engine = next(p for p in children(process.pid) if "fakes.engine" in command(p))
        with (
            httpx.Client(base_url=base, timeout=TIMEOUT_S) as client,
            client.stream("POST", "/v1/chat/completions", json=ENDLESS | {"n": 8}) as stream,
        ):
            documents = chunks(stream.iter_lines())
            next(documents)
            os.kill(engine, signal.SIGKILL)
            last = list(documents)[-1]
        assert last["error"]["code"] == "engine_failure"
        assert process.wait(TIMEOUT_S) == 1
        assert "engine process ended by signal 9" in process.stderr.read()


def test_an_engine_that_cannot_start_is_one_sentence():
    with started("engine=tests.fakes.failing_engine", "model.path=/no/such/model") as process:
        assert process.wait(TIMEOUT_S) == 1
        lines = [line for line in process.stderr.read().splitlines() if line.startswith("jaxserve")]
        assert lines == ["jaxserve: /no/such/model does not exist"]


def test_a_worker_that_is_killed_ends_the_server():
    with started("http.workers=2") as process:
        address_of(process)
        worker = [p for p in children(process.pid) if "http_worker" in command(p)][1]
        os.kill(worker, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == 1
        assert "HTTP worker" in process.stderr.read()


def sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process holds."""
    links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def inode_of_peer(ours: tuple[str, int], server: tuple[str, int]) -> str:
    """Of the server's socket that this one of ours is connected to."""
    ends = [f":{port:04X}" for _, port in (server, ours)]
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = [row[9] for row in rows if row[1].endswith(ends[0]) and row[2].endswith(ends[1])]
    return inode


def test_streams_of_the_other_workers_are_told_why_the_server_ends():
    with started("http.workers=2", "model.max_context=3000") as process:
        base = address_of(process)
        workers = [p for p in children(process.pid) if "http_worker" in command(p)]
        with (
            httpx.Client(base_url=base, timeout=TIMEOUT_S) as client,
            client.stream("POST", "/v1/chat/completions", json=ENDLESS | {"n": 8}) as stream,
        ):
            documents = chunks(stream.iter_lines())
            next(documents)
            network = stream.extensions["network_stream"]
            peer = inode_of_peer(*map(network.get_extra_info, ("client_addr", "server_addr")))
            (other,) = [pid for pid in workers if peer not in sockets(pid)]
            os.kill(other, signal.SIGKILL)
            last = list(documents)[-1]
        assert last["error"]["code"] == "engine_failure"
        assert "ended by signal 9; the server ends" in last["error"]["message"]
        assert process.wait(TIMEOUT_S) == 1


def test_a_killed_supervisor_leaves_no_orphans():
    with started("http.workers=2") as process:
        address_of(process)
        pids = children(process.pid)
        assert len(pids) == 4  # the engine, two workers, the observer
        watches = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        for watch in watches:
            wait_gone(watch)


def test_an_observer_that_is_killed_is_started_again_and_serving_goes_on():
    with started("telemetry.report_interval_s=0.01") as process:
        base = address_of(process)
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
            ask = {"messages": HI, "max_tokens": 2, "seed": 1}
            first = client.post("/v1/chat/completions", json=ask)
            assert len(first.headers["x-request-id"]) == 32
            observer = next(p for p in children(process.pid) if "observer" in command(p))
            watch = os.pidfd_open(observer)
            os.kill(observer, signal.SIGKILL)
            wait_gone(watch)
            again = client.post("/v1/chat/completions", json=ask)
            assert again.json()["choices"] == first.json()["choices"]
            deadline = time.monotonic() + TIMEOUT_S
            while "jaxserve_observer_up 1.0" not in client.get("/metrics").text:
                assert time.monotonic() < deadline, "no observer was started again"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        assert "serving goes on" in process.stderr.read()


def test_a_directory_for_records_that_cannot_be_used_ends_it_with_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with started(f"telemetry.state_dir={tmp_path / 'file' / 'state'}") as process:
        assert process.wait(TIMEOUT_S) == 1
        assert "telemetry.state_dir" in process.stderr.read()


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"'
SMALL = 'mount -t tmpfs -o size=2M tmpfs "$0"'


def mounted(folder: Path, mount: str) -> list[str]:
    """Begins a command that alone finds another file system in a directory."""
    script = f'{mount} && exec "$@"'
    options = ["--mount"] if os.getuid() == 0 else ["--mount", "--user", "--map-root-user"]
    under = ["unshare", *options, "sh", "-c", script, str(folder)]
    if subprocess.run([*under, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    return under


def test_a_read_only_directory_for_records_is_said_once_and_served_without(tmp_path: Path):
    with started(
        f"telemetry.state_dir={tmp_path}",
        "telemetry.flush_interval_s=0.05",
        under=mounted(tmp_path, READ_ONLY),
    ) as process:
        with httpx.Client(base_url=address_of(process), timeout=TIMEOUT_S) as client:
            body = {"messages": HI, "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            deadline = time.monotonic() + TIMEOUT_S
            while "jaxserve_ledger_rows_total 1.0" not in (text := client.get("/metrics").text):
                assert time.monotonic() < deadline, "the request was not written down"
                time.sleep(0.05)
            assert "jaxserve_observer_state_kept 0.0" in text
            assert "jaxserve_ledger_up 1.0" in text  # for as long as the server lives
            usage = client.get("/v1/usage").json()
            assert usage["data"], usage
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        said = process.stderr.read()
    assert said.count("Read-only file system") == said.count("nothing outlives this server") == 1
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def fill(path: Path) -> None:
    """Takes all room that there is."""
    with path.open("wb", 0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_told_and_what_waited_is_written_once_there_is_room(tmp_path: Path):
    with started(
        f"telemetry.state_dir={tmp_path}",
        "telemetry.flush_interval_s=0.1",
        under=mounted(tmp_path, SMALL),
    ) as process:
        base = address_of(process)
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:

            def ask(count: int) -> None:
                for _ in range(count):
                    body = {"messages": HI, "max_tokens": 2}
                    assert client.post("/v1/chat/completions", json=body).status_code == 200

            def until(*lines: str) -> None:
                deadline = time.monotonic() + TIMEOUT_S
                while missing := set(lines) - set(client.get("/metrics").text.splitlines()):
                    assert time.monotonic() < deadline, missing
                    time.sleep(0.05)

            ask(2)
            until("jaxserve_cost_entries_total 2.0", "jaxserve_ledger_up 1.0")
            filler = Path(f"/proc/{process.pid}/root{tmp_path}/filler")
            with pytest.raises(OSError, match="No space left"):
                fill(filler)
            ask(3)
            until("jaxserve_ledger_up 0.0", "jaxserve_cost_entries_waiting 3.0")
            until("jaxserve_slo_state_kept 0.0", 'jaxserve_observer_faults_total{part="slo"} 0.0')
            filler.unlink()
            until("jaxserve_ledger_up 1.0", "jaxserve_cost_entries_total 5.0")
            until("jaxserve_cost_entries_lost_total 0.0", "jaxserve_slo_state_kept 1.0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        said = process.stderr.read()
    assert said.count("metering cannot do its work") == 1
    assert said.count("metering does its work again") == 1
    assert "Traceback" not in said


def test_a_second_signal_ends_it_at_once():
    with started("model.max_context=60000", "cache.num_pages=30000") as process:
        base = address_of(process)
        with (
            httpx.Client(base_url=base, timeout=TIMEOUT_S) as client,
            client.stream("POST", "/v1/chat/completions", json=ENDLESS | {"n": 7}) as stream,
        ):
            documents = chunks(stream.iter_lines())  # dropping it would hang up
            next(documents)
            process.send_signal(signal.SIGTERM)
            while client_sees(base) != "refused":
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 1
        error = process.stderr.read()
        assert "before all streams were done" in error and "Traceback" not in error


def client_sees(base: str) -> str:
    """What a new client is told."""
    answer = httpx.post(f"{base}/v1/chat/completions", json={"messages": HI, "max_tokens": 1})
    return {200: "served", 503: "refused"}[answer.status_code]


def test_an_endless_head_is_a_431_and_large_bodies_are_not():
    with started() as process:
        base = address_of(process)
        port = int(base.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431 ")
        assert json.loads(body)["error"]["code"] == "header_too_large"
        with httpx.Client(base_url=base, timeout=TIMEOUT_S) as client:
            large = {"messages": HI, "max_tokens": 2, "metadata": {"pad": "x" * 1_000_000}}
            for _ in range(2):  # on one connection: each head is counted by itself
                assert client.post("/v1/chat/completions", json=large).status_code == 200
                assert client.get("/health", headers={"X": "a" * 40_000}).status_code == 200


def wait_ready(base: str) -> None:
    """Waits until a worker has heard of the engine, which may be a moment after the line."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while httpx.get(f"{base}/ready").status_code != 200:
        assert time.monotonic() < deadline_s, "it does not get ready"


def raw(base: str, request: bytes) -> tuple[bytes, bytes]:
    """Head and body of what comes back until the connection ends."""
    port = int(base.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def post(body: dict, *headers: str, version: str = "1.1") -> bytes:
    """A chat request as bytes."""
    data = json.dumps(body).encode()
    lines = [
        f"POST /v1/chat/completions HTTP/{version}",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(data)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def test_the_http_that_others_speak():
    with started() as process:
        base = address_of(process)
        wait_ready(base)
        for request in (
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
            b"GET /health\0 HTTP/1.1\r\nhost: x\r\n\r\n",
            b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n",
            b"\x16\x03\x01 hello",
        ):
            head, body = raw(base, request)
            assert head.startswith(b"HTTP/1.1 400 "), request
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
        plain = {"messages": HI, "max_tokens": 3, "ignore_eos": True, "seed": 1}
        whole = httpx.post(f"{base}/v1/chat/completions", json=plain).json()["choices"]
        for offer in ("websocket", "h2c"):
            upgrade = ("connection: Upgrade, close", f"upgrade: {offer}")
            head, body = raw(base, post(plain, *upgrade))
            assert head.startswith(b"HTTP/1.1 200 "), offer
            assert json.loads(body)["choices"] == whole
        head, body = raw(base, post(plain | {"stream": True}, version="1.0"))
        assert head.startswith(b"HTTP/1.1 200 ") and b"chunked" not in head.lower()
        assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
        head, body = raw(base, post(plain, version="1.0"))
        assert json.loads(body)["choices"] == whole
        answer = httpx.put(f"{base}/v1/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert len(httpx.get(f"{base}/{'x' * 5000}").json()["error"]["message"]) < 200


def test_who_leaves_is_noticed_though_another_request_came_behind():
    with started("model.max_context=60000", "http.heartbeat_s=0.1") as process:
        base = address_of(process)
        wait_ready(base)
        port = int(base.rpartition(":")[2])
        behind = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        for stream in (True, False):
            with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
                connection.sendall(post(ENDLESS | {"stream": stream}) + behind)
                wait_metric(base, "jaxserve_running", 1)
        wait_metric(base, 'jaxserve_tenant_requests_total{outcome="left"}', 2)
        wait_metric(base, "jaxserve_running", 0)


def wait_metric(base: str, name: str, value: float) -> None:
    """Waits until a sample of /metrics has come to a value."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while f"{name} {value:.1f}" not in httpx.get(f"{base}/metrics").text.splitlines():
        assert time.monotonic() < deadline_s, f"{name} does not come to {value}"


def test_a_body_that_is_on_its_way_does_not_hold_the_end():
    with started("http.drain_timeout_s=50", "http.body_timeout_s=60") as process:
        base = address_of(process)
        wait_ready(base)
        port = int(base.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
            connection.sendall(post({"messages": HI}, "expect: 100-continue")[:-3])
            assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")  # it reads the body
            process.send_signal(signal.SIGTERM)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
        assert process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_while_it_starts_is_a_clean_end(workers):
    with started(f"http.workers={workers}") as process:
        while not children(process.pid):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(f"http.port={port}") as process:
            assert process.wait(TIMEOUT_S) == 1
            error = process.stderr.read()
    assert f"port {port}" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["http.host=0.0.0.0"], "http.key_file"),
        (["http.key_file=/nowhere.yaml"], "/nowhere.yaml"),
        (["http.tls_certificate=/no.pem", "http.tls_key=/no.key"], "/no.pem"),
        (["http.host=nowhere.invalid", "http.key_file=/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, words):
    with started(*settings) as process:
        assert process.wait(TIMEOUT_S) == 1
        error = process.stderr.read()
    assert words in error and len(error.splitlines()) == 1


def test_served_names():
    names = {
        "smollm2-135m-instruct": "smollm2-135m-instruct",
        "org/name": "org/name",
        "/models/tiny/": "tiny",
        "/models/tiny.gguf": "tiny",
        "gs://bucket/models/tiny": "tiny",
    }
    assert {path: served_name(ModelConfig(path=path)) for path in names} == names
    assert served_name(ModelConfig(path="/x", served_name="mine")) == "mine"


def test_a_full_temporary_directory_is_one_sentence():
    with started(under=("prlimit", "--fsize=20000")) as process:
        assert process.wait(TIMEOUT_S) == 1
        said = process.stderr.read()
        (line,) = [line for line in said.splitlines() if line.startswith("jaxserve:")]
        assert "the server's processes cannot be started" in line and "TMPDIR" in line
        assert "Traceback" not in said
