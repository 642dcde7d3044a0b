"""sentence-transformers as a peer of benchmarks/embeddings.py: a line of texts in, seconds out.

Runs in the peer's own Python. Arguments: MODEL DIRECTORY, THREADS, BATCH SIZE.
"""

from __future__ import annotations

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes to stderr

import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
from sentence_transformers import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    SentenceTransformer,
    __version__,
)


def tell(message: dict) -> None:
    """One line to the benchmark."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


directory, num_threads, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(num_threads)
model = SentenceTransformer(directory, device="cpu")
tell(
    {
        "about": f"sentence-transformers {__version__}, torch {torch.__version__}, float32, "
        f"{num_threads} threads, batches of {batch_size}"
    }
)
for line in sys.stdin:
    texts = json.loads(line)
    start = time.perf_counter()
    vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
    tell({"seconds": time.perf_counter() - start, "first": vectors[0].tolist()})
