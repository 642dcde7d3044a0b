"""A server that runs, as commands ask it: JSON over HTTP, with its errors as ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    import urllib.error

#: An adapter is downloaded and checked before the server answers.
_TIMEOUT_S = 900.0


def add_server(command: argparse.ArgumentParser) -> None:
    """The arguments that say which server is meant."""
    command.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    command.add_argument(
        "--key-file", type=Path, metavar="FILE", help="file that holds an admin's API key"
    )


def ask(
    arguments: argparse.Namespace, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the server answers: to a POST with a body, to a GET without.

    Raises:
        ConfigError: the address or key cannot be used, or nothing that we know answers there.
        JaxserveError: it refused, in its own words.
    """
    import http.client
    import urllib.error
    import urllib.request

    url = arguments.url.rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, got {arguments.url!r}")
    headers = {"content-type": "application/json"}
    if arguments.key_file is not None:
        headers["authorization"] = f"Bearer {_key(arguments.key_file)}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            return _document(response.read(), url)
    except urllib.error.HTTPError as error:
        with error:
            raise JaxserveError(_message(error)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"no answer from {url}: {reason}; name the server with --url") from None


def _key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key in {path}: {error}") from None


def _document(data: bytes, url: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ConfigError(f"what answers at {url} is no jaxserve server; name it with --url")
    return document


def _message(error: urllib.error.HTTPError) -> str:
    """The sentence of an error's body, or its status."""
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"
