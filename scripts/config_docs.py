"""Writes docs/configuration.md from the docstrings of jaxserve/config*.py, or checks that it is so.

Run by scripts/check: with --check it changes nothing and fails where the page is out of date. A
key without an entry in its section's docstring is an error either way.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxserve import config  # noqa: E402
from jaxserve.config_values import BOUNDS  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by scripts/config_docs.py from the docstrings of jaxserve/config*.py: edit those. -->

Every key belongs to a section. Values are taken from, later ones winning:

1. a YAML file: `--config FILE.yaml`, with sections as top-level keys ([configs/](../configs) has
   examples);
2. the environment: `JAXSERVE_SECTION__KEY=value` (two underscores between section and key);
3. the command line: `--set section.key=value`, as often as needed.

An unknown key ends the start with the nearest one that exists; so does a value of the wrong type or
out of range. Lists are given as YAML lists, or with commas. The resolved configuration is printed
at the start, without secrets.

```bash
JAXSERVE_HTTP__PORT=8080 scripts/serve --set scheduler.max_rows=32
```
"""


def main() -> int:
    """Returns the exit status."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE.relative_to(ROOT)} is out of date: run scripts/check --fix", file=sys.stderr)
        return 1
    return 0


def render() -> str:
    """The page.

    Raises:
        SystemExit: a key has no entry in its section's docstring.
    """
    parts = [HEAD]
    for section in dataclasses.fields(config.Config):
        values = getattr(config.Config(), section.name)
        summary, entries = read_docstring(type(values).__doc__ or "")
        rows = []
        for key in dataclasses.fields(values):
            if key.name not in entries:
                raise SystemExit(f"{type(values).__name__}'s docstring lacks {key.name}")
            path = f"{section.name}.{key.name}"
            default, text = show(getattr(values, key.name)), bounded(path, entries[key.name])
            rows.append(f"| `{path}` | {default} | {text} |")
        head = f"## {section.name}\n\n{summary}\n\n| key | default | meaning |\n|---|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)


def read_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """A section's docstring as its summary, and the text of each attribute."""
    text = textwrap.dedent("    " + docstring)
    summary, _, attributes = text.partition("Attributes:")
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(attributes).strip("\n").splitlines():
        start = re.match(r"([a-z0-9_]+(?:, [a-z0-9_]+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            entries |= dict.fromkeys(names, start[2])
        else:
            for name in names:
                entries[name] += " " + line.strip()
    return " ".join(summary.split()), {name: text.strip() for name, text in entries.items()}


def bounded(path: str, text: str) -> str:
    """The text as a table's cell, with the bounds of numbers."""
    text = text[:1].upper() + text[1:]
    text = re.sub(r'"([^"|]*)"', r"`\1`", text).replace("|", "\\|")
    if path in BOUNDS:
        low, high = BOUNDS[path]
        text += f" Between {low:,} and {high:,}."
    return text


def show(value: Any) -> str:
    """A default as a table's cell."""
    if value in ("", ()):
        return "(empty)"
    return f"`{value:,}`" if isinstance(value, int) and value >= 10_000 else f"`{value}`"


if __name__ == "__main__":
    sys.exit(main())
