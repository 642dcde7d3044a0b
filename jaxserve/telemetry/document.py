"""A small JSON document in the state directory: versioned, replaced whole, set aside if broken."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Document:
    """One file.

    Args:
        path: of it, in a directory that is there.
        version: of its content; another's is set aside too.
    """

    def __init__(self, path: Path, version: int) -> None:
        self._path = path
        self._version = version

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None where nothing was, or it cannot be read."""
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.set_aside(str(error))
            return None
        if not isinstance(value, dict) or value.get("version") != self._version:
            self.set_aside(f"it is not of version {self._version}")
            return None
        return value

    def save(self, value: dict[str, Any]) -> None:
        """Replaces it, durably.

        Raises:
            OSError: the old one is there as it was.
        """
        text = json.dumps({"version": self._version} | value, allow_nan=False)
        fresh = self._path.with_suffix(".new")
        try:
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise

    def set_aside(self, reason: str) -> None:
        """Keeps it under another name, for whoever wants to look, and begins anew."""
        aside = self._path.with_suffix(".broken")
        logger.warning("%s cannot be used and is set aside: %s", self._path.name, reason)
        with contextlib.suppress(OSError):
            self._path.replace(aside)
