"""`python -m jaxserve …`: see `jaxserve.cli`."""

from __future__ import annotations

import sys

from jaxserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
