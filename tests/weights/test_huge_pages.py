"""Huge pages change where weights are, never what they are."""

from __future__ import annotations

import ctypes
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.weights import huge_pages
from jaxserve.weights.huge_pages import HUGE_PAGE_BYTES, use_huge_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@linux
def test_content_stays_and_small_arrays_are_left_alone() -> None:
    large = jnp.arange(5 * HUGE_PAGE_BYTES // 4, dtype=jnp.int32)
    small = jnp.arange(1000)
    moved = use_huge_pages([large, small])
    assert moved % HUGE_PAGE_BYTES == 0 and moved <= large.nbytes  # none, on an old kernel
    np.testing.assert_array_equal(large, np.arange(large.size))
    np.testing.assert_array_equal(small, np.arange(1000))


@linux
def test_a_kernel_that_refuses_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Libc:
        """madvise as before Linux 6.1."""

        def __init__(self, name: object, use_errno: bool) -> None:
            def madvise(start: int, size: int, advice: int) -> int:
                ctypes.set_errno(22)
                return -1

            self.madvise = madvise

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", Libc)
    with caplog.at_level("INFO"):
        assert use_huge_pages([jnp.zeros(3 * HUGE_PAGE_BYTES // 4, jnp.float32)]) == 0
    assert "errno 22" in caplog.text


def test_elsewhere_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", None)
    assert use_huge_pages([jnp.zeros(3 * HUGE_PAGE_BYTES // 4, jnp.float32)]) == 0
