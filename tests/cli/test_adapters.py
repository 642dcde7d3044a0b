"""`lora list`, `load` and `unload` of a server that runs, and one sentence where they cannot."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from tests.cli.conftest import Run
from tests.http.test_adapters import written
from tests.http.test_serve import address_of, started


def test_adapters_of_a_server_are_loaded_listed_and_unloaded(run: Run, tmp_path: Path) -> None:
    key = written(tmp_path / "a", 1)
    rows = [{"hash": hashlib.sha256(b"boss").hexdigest(), "tenant": "t", "role": "admin"}]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": rows}))
    (tmp_path / "key").write_text("boss\n")
    settings = ("lora.enabled=true", "lora.classes=4x3", f"http.key_file={tmp_path / 'keys.yaml'}")
    with started(*settings) as process:
        server = ("--url", address_of(process), "--key-file", tmp_path / "key")
        assert run("lora", "list", *server).out == ""
        line = f"mine\t{key[:12]}\t{tmp_path / 'a'}\n"
        loaded = run("lora", "load", "mine", tmp_path / "a", *server)
        assert (loaded.status, loaded.out) == (0, line)
        assert run("lora", "list", *server).out == line
        again = run("lora", "load", "mine", tmp_path / "none", *server)
        assert again.status == 1 and again.err.startswith("jaxserve: there is an adapter 'mine'")
        assert run("lora", "load", "mine", tmp_path / "a", "--replace", *server).out == line
        assert "absolute path" in run("lora", "load", "other", "hub/adapter", *server).err
        assert run("lora", "list", "--url", server[1]).err == (
            "jaxserve: no API key given; send the header Authorization: Bearer KEY\n"
        )
        assert run("lora", "unload", "mine", *server).status == 0
        assert run("lora", "list", *server).out == ""
        assert "mine" in run("lora", "unload", "mine", *server).err


def test_no_server_no_address_no_key(run: Run, tmp_path: Path) -> None:
    ended = run("lora", "list", "--url", "http://127.0.0.1:9")
    assert ended.status == 2 and "name the server with --url" in ended.err
    assert "http://" in run("lora", "list", "--url", "127.0.0.1:8000").err
    assert "cannot read the key" in run("lora", "list", "--key-file", tmp_path / "none").err
