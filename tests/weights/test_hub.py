"""Models from the hub: `huggingface_hub` in processes of their own, and a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.hub import FakeHub, Files, commit_of
from tests.weights.model_files import SERVED, check_tiny, files_in, tiny

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20

SCRIPT = """
import json, logging, sys
from jaxserve.config import ModelConfig, WeightsConfig
from jaxserve.errors import WeightsError
from jaxserve.weights.sources import resolve

logging.basicConfig(level=logging.INFO)
events = []
try:
    path = resolve(
        ModelConfig(**json.loads(sys.argv[1])),
        WeightsConfig(**json.loads(sys.argv[2])),
        lambda *event: events.append(event),
    )
    answer = {"path": str(path)}
except WeightsError as error:
    answer = {"error": str(error)}
print(json.dumps({**answer, "events": events}))
"""


def large(num_mib: int = 25) -> Files:
    """A model that comes in several of the library's chunks of 10 MiB."""
    weights = random.Random(num_mib).randbytes(num_mib * MIB)
    return {"config.json": b"{}", "model.safetensors": weights}


@dataclass
class Process:
    """A process that resolves a model."""

    popen: subprocess.Popen[str]

    def result(self) -> dict[str, Any]:
        """The path or the error, and what `progress` was told."""
        out, err = self.popen.communicate(timeout=60)
        assert self.popen.returncode == 0, err
        return json.loads(out)


@dataclass
class Client:
    """A user's machine: an empty home, and the hub where HF_ENDPOINT says."""

    home: Path
    hub: FakeHub
    processes: list[Process] = field(default_factory=list)

    def start(
        self,
        path: str = "org/tiny",
        env: dict[str, str] | None = None,
        cache_dir: str | None = None,
        **model: str,
    ) -> Process:
        """Begins to resolve a model."""
        weights = {"cache_dir": str(self.cache) if cache_dir is None else cache_dir}
        process = Process(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SCRIPT,
                    json.dumps({"path": path, **model}),
                    json.dumps(weights),
                ],
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(self.home),
                    "HF_ENDPOINT": self.hub.address,
                    **(env or {}),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            process.popen.kill()
            process.popen.communicate()

    def resolve(self, path: str = "org/tiny", **options: Any) -> Path:
        """Where the model is then."""
        result = self.start(path, **options).result()
        assert "path" in result, result
        return Path(result["path"])

    def refusal(self, path: str = "org/tiny", **options: Any) -> str:
        """What is said instead."""
        return self.start(path, **options).result()["error"]

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def blobs(self, path: str = "org/tiny") -> dict[str, int]:
        """Sizes of the files in the cache by name."""
        folder = self.cache / f"models--{path.replace('/', '--')}" / "blobs"
        return {file.name: file.lstat().st_size for file in folder.iterdir()}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def client(tmp_path: Path, hub: FakeHub) -> Iterator[Client]:
    client = Client(tmp_path, hub)
    yield client
    client.close()


def until(process: Process, reached: Callable[[], bool]) -> None:
    """Waits for something that the process does."""
    while not reached():
        assert process.popen.poll() is None
        time.sleep(0.01)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_fetched_model_has_its_weights_tokenizer_and_templates(
    client: Client, hub: FakeHub
) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    check_tiny(client.resolve())


def test_only_what_is_served_is_fetched(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    path = client.resolve()
    assert files_in(path) == SERVED
    weights = sha256(tiny()["model.safetensors"])
    assert hub.fetched() == sorted(
        [
            weights,
            "model.safetensors",  # redirected to the one above
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "tool_use.jinja",
        ]
    )
    hub.requests.clear()
    assert client.resolve() == path
    assert hub.fetched() == []


def test_the_hubs_own_cache_is_the_default(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    path = client.resolve(cache_dir="")
    assert path.is_relative_to(client.home / ".cache" / "huggingface" / "hub" / "models--org--tiny")
    assert client.resolve(cache_dir="~/.cache/huggingface/hub") == path


def test_the_revision_is_a_branch_a_tag_or_a_commit(client: Client, hub: FakeHub) -> None:
    old, new = large(1), large(2)
    hub.models["org/tiny"] = {"v1": old, "main": new}
    for revision, files in (("v1", old), ("", new), (commit_of(old), old), ("main", new)):
        path = client.resolve(revision=revision)
        assert path.name == commit_of(files)
        assert (path / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_new_revision_fetches_only_what_changed(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": large()}
    client.resolve()
    hub.requests.clear()
    hub.models["org/tiny"] = {"main": {**large(), "config.json": b'{"new": 1}'}}
    result = client.start().result()
    assert hub.fetched() == ["config.json"] and result["events"] == []
    path = Path(result["path"])
    assert (path / "model.safetensors").read_bytes() == large()["model.safetensors"]


def test_the_token_goes_to_the_hub_and_to_nobody_else(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    hub.gated.add("org/tiny")
    client.resolve(token=hub.token)
    to_hub = [r.token for r in hub.requests if r.path.startswith(("/api/models", "/org"))]
    assert set(to_hub) == {hub.token}
    to_others = [r.token for r in hub.requests if r.path.startswith("/cdn")]
    assert to_others == [""]


def test_the_environments_token_is_used_where_none_is_configured(
    client: Client, hub: FakeHub
) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    hub.gated.add("org/tiny")
    client.resolve(env={"HF_TOKEN": hub.token})


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_gated_model_asks_for_a_token(client: Client, hub: FakeHub, token: str) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    hub.gated.add("org/tiny")
    assert client.refusal(token=token) == (
        "'org/tiny' is gated: accept its terms on the hub, and give the token of an account that "
        "did as model.token"
    )


def test_an_unknown_model_is_named(client: Client, hub: FakeHub) -> None:
    expected = (
        "the hub knows no 'org/none' that may be read with this token: check model.path, and "
        "model.token for a private model"
    )
    assert client.refusal("org/none") == expected
    assert client.refusal("org/none", token="hf_right") == expected


def test_an_unknown_revision_is_named(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    assert client.refusal(revision="v9") == (
        "the hub's 'org/tiny' has no revision 'v9': check model.revision"
    )


def test_a_refused_token_is_no_network_trouble(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    hub.refused.add("org/tiny")
    assert client.refusal(token="hf_narrow", revision="main") == (
        "the hub refuses 'org/tiny' at revision 'main' (HTTP status 403): check model.token"
    )


def test_a_name_that_no_model_has_is_one_sentence(client: Client) -> None:
    said = client.refusal("org/a--b")
    assert said.startswith("downloading 'org/a--b' failed: HFValidationError: ")
    assert "\n" not in said


def test_a_repository_without_a_model_is_said_to_be_none(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": {"model-Q4_K_M.gguf": b"quantized", "README.md": b"#"}}
    assert client.refusal() == (
        "'org/tiny' has no config.json: the hub's models are read from safetensors or Orbax; a "
        ".gguf file is given by its path"
    )


def test_without_a_network_the_cached_copy_is_taken(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    hub.models["org/other"] = {"main": tiny()}
    path = client.resolve()
    hub.close()
    assert client.resolve() == path
    said = client.refusal("org/other")
    assert said.startswith("cannot get 'org/other' from the hub (ConnectError: ")
    assert said.endswith(
        "and its cache has no whole copy: is 'org/other' meant as a path, or the network down?"
    )


def test_without_a_network_half_a_copy_is_not_taken(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    path = client.resolve()
    (path / "tokenizer.json").unlink()
    hub.close()
    assert "and its cache has no whole copy" in client.refusal()


def test_a_killed_download_is_gone_on_with(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": large()}
    weights = large()["model.safetensors"]
    hub.pause_after = 21 * MIB
    process = client.start()
    assert hub.paused.wait(60)
    partial = f"{sha256(weights)}.incomplete"
    until(process, lambda: client.blobs().get(partial) == 20 * MIB)  # whole chunks of the library
    client.close()
    assert client.blobs() == {partial: 20 * MIB}
    hub.requests.clear()

    result = client.start().result()
    path = Path(result["path"])
    assert hub.ranges() == [f"bytes={20 * MIB}-"]
    assert (path / "model.safetensors").read_bytes() == weights
    assert sha256(weights) in client.blobs() and partial not in client.blobs()
    assert result["events"] == [
        ["downloading", done * MIB, 25 * MIB] for done in (20, 25)
    ]  # goes on where it was


def test_a_broken_connection_is_gone_on_with_at_once(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": large()}
    hub.cut_after = 11 * MIB
    path = client.resolve()
    assert hub.ranges() == ["", f"bytes={10 * MIB}-"]
    assert (path / "model.safetensors").read_bytes() == large()["model.safetensors"]


def test_progress_counts_the_bytes_of_all_large_files(client: Client, hub: FakeHub) -> None:
    parts = {f"model-{n}.safetensors": random.Random(n).randbytes(11 * MIB) for n in (1, 2)}
    hub.models["org/tiny"] = {"main": {"config.json": b"{}", **parts}}
    events = client.start().result()["events"]
    assert [total for _, _, total in events] == [22 * MIB] * len(events)
    done = [done for _, done, _ in events]
    assert done == sorted(done) and (done[0], done[-1]) == (0, 22 * MIB)
    steps = sorted(np.diff(done)[np.diff(done) > 0])
    assert steps == [MIB, MIB, 10 * MIB, 10 * MIB]


def test_one_lost_file_stops_the_others(client: Client, hub: FakeHub) -> None:
    lost, weights = b"not there", large()["model.safetensors"]
    files = {"config.json": b"{}", "a.safetensors": lost, "b.safetensors": weights}
    hub.models["org/tiny"] = {"main": files}
    hub.lost.add(lost)
    hub.pause_after = 11 * MIB
    process = client.start()
    assert hub.paused.wait(60)
    partial = f"{sha256(weights)}.incomplete"
    until(process, lambda: client.blobs().get(partial) == 10 * MIB)
    until(process, lambda: any(r.path == f"/cdn/{sha256(lost)}" for r in hub.requests))
    hub.resumed.set()
    said = process.result()["error"]
    assert said == "the hub refuses 'org/tiny' (HTTP status 404): try again later"
    assert client.blobs()[partial] == 10 * MIB


def test_two_downloads_at_once_are_one(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": large()}
    hub.pause_after = 11 * MIB
    first = client.start()
    assert hub.paused.wait(60)
    partial = f"{sha256(large()['model.safetensors'])}.incomplete"
    until(first, lambda: client.blobs().get(partial) == 10 * MIB)
    second = client.start()
    assert second.popen.stderr is not None
    for line in second.popen.stderr:
        if "another process downloads the same model" in line:
            break
    else:
        pytest.fail("the second did not wait")
    hub.resumed.set()
    paths = {first.result()["path"], second.result()["path"]}
    assert len(paths) == 1
    assert hub.ranges() == ["", f"bytes={10 * MIB}-"]
    assert (Path(paths.pop()) / "model.safetensors").read_bytes() == large()["model.safetensors"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": large()}
    name = sha256(large()["model.safetensors"])
    blobs = client.cache / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{name}.incomplete").symlink_to("/dev/full")
    assert client.refusal() == (
        "downloading 'org/tiny' failed: OSError: [Errno 28] No space left on device; start again "
        "to resume"
    )
    assert set(client.blobs()) == {f"{name}.incomplete"}


@pytest.mark.parametrize("name", ["../../../evil.json", "/evil.json"])
def test_a_file_name_cannot_lead_out_of_the_cache(client: Client, hub: FakeHub, name: str) -> None:
    hub.models["org/tiny"] = {"main": {**tiny(), name: b"{}"}}
    assert client.refusal().startswith("downloading 'org/tiny' failed: ")
    assert not list(client.home.rglob("evil.json")) and not Path("/evil.json").exists()


def test_a_hash_cannot_lead_out_of_the_cache(client: Client, hub: FakeHub) -> None:
    hub.models["org/tiny"] = {"main": tiny()}
    hub.false_hash = "../../../evil"
    client.resolve()
    assert not list(client.home.glob("evil*"))
