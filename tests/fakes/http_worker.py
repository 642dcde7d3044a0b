"""An HTTP worker process with a tokenizer and template that need no model files."""

from __future__ import annotations

import sys

from jaxserve.http import worker
from tests.fakes.tokenizer import ByteTokenizer
from tests.http.frontend import PlainTemplate

if __name__ == "__main__":
    sys.exit(
        worker.main(lambda config: (ByteTokenizer(), PlainTemplate()))  # pyright: ignore[reportArgumentType]
    )
