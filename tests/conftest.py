"""Settings of all tests.

The environment is fixed here, before JAX is imported: no test may reach a network, and the
persistent compilation cache of a developer's machine must not decide what a test sees.

Of the cases of a test that is marked `in_turn`, one runs a day, another one each day, since all of
them together take minutes; `in_turn("name")` joins several tests of a file in the same way.
`--every` runs them all.
"""

from __future__ import annotations

import datetime
import gc
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Directories of files that take minutes: first, so that of several processes none is left with one
#: of them at the end.
LONG = ("server", "device", "console", "benchmarks", "compile")

# Two busy cores: a slow example is not a failure, and the examples are the same on every run.
settings.register_profile("jaxserve", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("jaxserve")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Lets go of what a module has compiled.

    Each compiled program is several mappings of memory, of which Linux gives a process 65,530; with
    all tests in one process LLVM crashed when there were no more.
    """
    yield
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()
    gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--every`."""
    parser.addoption(
        "--every", action="store_true", help="all cases of tests marked in_turn, not one a day"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deals the tests to several processes."""
    from tests.together import Together  # needs xdist, of which this hook is

    return Together(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts long files first, and leaves out the cases that it is not this day's turn to run."""
    items.sort(key=lambda item: not any(name in item.path.parts for name in LONG))
    if config.getoption("--every"):
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("in_turn")
        if marker is not None:
            name = f"{item.path} {marker.args[0]}" if marker.args else item.nodeid.partition("[")[0]
            cases[name].append(item)
    day = datetime.date.today().toordinal()
    left_out = {
        item
        for of_test in cases.values()
        for place, item in enumerate(of_test)
        if place != day % len(of_test)
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
