"""One engine and application for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http.frontend import Front
from tests.http.frontend import front as make_front


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """An application over the fake engine."""
    with make_front() as made:
        yield made
