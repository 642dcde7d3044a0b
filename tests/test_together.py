"""How tests are dealt to several processes: what is expensive to make is made in one of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.together import SHARED, group_of

ROOT = Path(__file__).parents[1]


def test_files_that_share_a_fixture_of_the_session_are_one_group():
    """The list is that of the files in which some test takes the fixture."""
    takes = re.compile(r"def \w+\([^)]*\bllama: Warm")
    files = (ROOT / "tests" / "device").glob("test_*.py")
    users = {str(file.relative_to(ROOT)) for file in files if takes.search(file.read_text())}
    assert users == {place for place, name in SHARED.items() if name == "llama"}
    assert {group_of(f"{user}::test_a[1]") for user in users} == {"llama"}
    assert group_of("tests/server/test_a.py::test_b") == group_of("tests/server/test_c.py::test_d")
    assert group_of("tests/test_config.py::test_a[x::y]") == "tests/test_config.py"


def test_two_processes_share_no_file(tmp_path: Path):
    """As `scripts/test --jobs 2` runs them."""
    told = r"\[(gw\d)\].* PASSED (\S+?)::"
    for name in ("a", "b", "c"):
        body = "import pytest\n\n@pytest.mark.parametrize('x', range(6))\ndef test(x): pass\n"
        (tmp_path / f"test_{name}.py").write_text(body)
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_xdist_make_scheduler\n"
    )
    words = [
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "-v",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), *words, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    ran = re.findall(told, done.stdout)
    assert len(ran) == 18, done.stdout
    assert len({file for _, file in ran}) == len({*ran}) == 3
