"""The backends of a kernel that run on any host."""

from __future__ import annotations

from typing import Any

import pytest

from pallas_kernels import native


def _backends() -> list[Any]:
    reason = native.load().reason
    marks = [pytest.mark.skip(reason=f"native kernels: {reason}")] if reason else []
    return [pytest.param(b, marks=marks if b == "cpu" else []) for b in ("xla", "cpu")]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Name of one."""
    return request.param
