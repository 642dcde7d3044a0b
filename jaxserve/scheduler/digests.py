"""Names of pages by content: a chain of digests, one for each full page of a sequence.

A page's digest covers its tokens and, through its parent's, all tokens before them and the root:
what KV depends on besides tokens (the model, later an adapter) and who may share it. Equal digests
therefore mean equal KV. blake2b with 16 bytes: nobody can make two contents with one digest, so a
page of somebody else's is never taken for one's own.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root_digest(*parts: bytes) -> bytes:
    """What a chain begins with.

    Each part is preceded by its length, so that no other parts give the same bytes.
    """
    state = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


def extend_digests(
    digests: list[bytes], root: bytes, token_ids: Sequence[int], num_pages: int, page_size: int
) -> None:
    """Appends the digests of further full pages, up to `num_pages` of them in all.

    Args:
        root: the chain's beginning, of which the first page is the child.
        token_ids: of the sequence, at least num_pages × page_size.
    """
    known = len(digests)
    if known >= num_pages:
        return
    parent = digests[-1] if digests else root
    tokens = token_ids[known * page_size : num_pages * page_size]
    content = struct.pack(f"{len(tokens)}i", *tokens)
    page_bytes = len(content) // (num_pages - known)
    for start in range(0, len(content), page_bytes):
        parent = blake2b(
            parent + content[start : start + page_bytes], digest_size=DIGEST_BYTES
        ).digest()
        digests.append(parent)
