"""The Hugging Face hub on loopback: as much of its HTTP API as downloading a model takes.

As the real one does, it names large files by their SHA-256 and redirects to them, answers Range
requests, and says what is wrong in X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]

_LARGE = (".safetensors", ".bin", ".pth", ".gguf")


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    token: str
    range: str


@dataclass
class FakeHub:
    """A hub with some models; a context manager, serving while it is open.

    Attributes:
        models: files by name and revision.
        gated: names of models that only `token` may read.
        refused: names for which any token gets a plain 403.
        lost: contents that the other host does not have, as it says once `resumed` is set.
        false_hash: given out as the hash of every large file.
        pause_after: of a large file, sends so many bytes and nothing more until `resumed` is set.
        cut_after: of a large file, sends so many bytes and closes; once.
        requests: all of them, in order.
    """

    models: dict[str, dict[str, Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    lost: set[bytes] = field(default_factory=set)
    false_hash: str = ""
    token: str = "hf_right"
    pause_after: int | None = None
    cut_after: int | None = None
    requests: list[Request] = field(default_factory=list)
    paused: threading.Event = field(default_factory=threading.Event)
    resumed: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}/cdn"  # another host, that must not see tokens
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on connections are refused."""
        self.resumed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, sorted; large ones by their hash."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return sorted(path.rsplit("/", 1)[1] for path in paths if not path.startswith("/api/"))

    def ranges(self) -> list[str]:
        """The Range headers of requests for large files' bytes, in order."""
        return [r.range for r in self.requests if r.method == "GET" and r.path.startswith("/cdn/")]


def commit_of(files: Files) -> str:
    """The commit of a revision with these files."""
    digest = hashlib.sha1()
    for name, data in sorted(files.items()):
        digest.update(name.encode() + data)
    return digest.hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: FakeHub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append(Request(self.command, path, token, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            self._large(hub, parts[1])
        elif parts[:2] == ["api", "models"]:
            self._api(hub, "/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._file(hub, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "")

    def _revision(self, hub: FakeHub, name: str, revision: str) -> Files | None:
        """The files, or None and the answer is sent."""
        if name not in hub.models:
            self._error(401 if "Authorization" not in self.headers else 404, "RepoNotFound")
        elif name in hub.refused:
            self._error(403, "")
        else:
            for known, files in hub.models[name].items():
                if revision in (known, commit_of(files)):
                    return files
            self._error(404, "RevisionNotFound")
        return None

    def _api(self, hub: FakeHub, name: str, rest: list[str]) -> None:
        files = self._revision(hub, name, rest[1] if rest else "main")
        if files is None:
            return
        rows = [_row(path, data) for path, data in files.items()]
        if rest and rest[0] == "tree":
            self._json(rows)
            return
        for row in rows:
            if hub.false_hash and "lfs" in row:
                row["lfs"]["oid"] = hub.false_hash
        siblings = [
            {
                "rfilename": row["path"],
                "size": row["size"],
                "blobId": row["oid"],
                **({"lfs": {**row["lfs"], "sha256": row["lfs"]["oid"]}} if "lfs" in row else {}),
            }
            for row in rows
        ]
        self._json({"id": name, "sha": commit_of(files), "siblings": siblings})

    def _file(self, hub: FakeHub, name: str, revision: str, filename: str) -> None:
        files = self._revision(hub, name, revision)
        if files is None:
            return
        if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._error(401 if "Authorization" not in self.headers else 403, "GatedRepo")
            return
        if filename not in files:
            self._error(404, "EntryNotFound")
            return
        row, commit = _row(filename, files[filename]), commit_of(files)
        if "lfs" in row:
            sha256 = row["lfs"]["oid"]
            self.send_response(302)
            self.send_header("Location", f"{hub.cdn}/{sha256}")
            self.send_header("X-Linked-Etag", f'"{sha256}"')
            self.send_header("X-Linked-Size", str(row["size"]))
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{row["oid"]}"')
        self.send_header("X-Repo-Commit", commit)
        self._body(b"" if "lfs" in row else files[filename])

    def _large(self, hub: FakeHub, sha256: str) -> None:
        data = next(
            data
            for revisions in hub.models.values()
            for files in revisions.values()
            for data in files.values()
            if hashlib.sha256(data).hexdigest() == sha256
        )
        if data in hub.lost:
            hub.resumed.wait()
            self._error(404, "")
            return
        start, total = 0, len(data)
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{sha256}"')
        data = data[start:]
        if self.command == "GET" and hub.cut_after is not None:
            end, hub.cut_after = hub.cut_after, None
            self._headers(len(data))
            self.wfile.write(data[:end])
            self.close_connection = True
        elif self.command == "GET" and hub.pause_after is not None:
            end, hub.pause_after = hub.pause_after, None
            self._headers(len(data))
            self.wfile.write(data[:end])
            hub.paused.set()
            hub.resumed.wait()
            self.close_connection = True
        else:
            self._body(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self._body(b"")

    def _json(self, document: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._body(json.dumps(document).encode())

    def _body(self, data: bytes) -> None:
        self._headers(len(data))
        if self.command == "GET":
            self.wfile.write(data)

    def _headers(self, length: int) -> None:
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _row(path: str, data: bytes) -> dict[str, Any]:
    """A file in the tree of a repository."""
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    row = {"type": "file", "path": path, "size": len(data), "oid": git}
    if path.endswith(_LARGE):
        large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {**row, "lfs": large}
    return row
