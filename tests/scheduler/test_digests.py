"""Digests of pages: equal exactly where everything that KV depends on is equal."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.digests import DIGEST_BYTES, extend_digests, root_digest

ROOT = root_digest(b"model", b"", b"")


def digests_of(tokens: list[int], page_size: int, root: bytes = ROOT) -> list[bytes]:
    """Of all full pages."""
    digests: list[bytes] = []
    extend_digests(digests, root, tokens, len(tokens) // page_size, page_size)
    return digests


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=24)


@given(tokens, tokens, st.integers(1, 5))
def test_pages_are_equal_exactly_where_all_tokens_so_far_are(first, second, page_size):
    pairs = zip(digests_of(first, page_size), digests_of(second, page_size), strict=False)
    for index, (one, other) in enumerate(pairs):
        end = (index + 1) * page_size
        assert (one == other) == (first[:end] == second[:end])


@given(tokens, st.integers(1, 5), st.lists(st.integers(0, 24)))
def test_they_are_the_same_however_they_are_extended(values, page_size, stops):
    whole = digests_of(values, page_size)
    digests: list[bytes] = []
    for stop in [*sorted(stops), len(values)]:
        known = min(stop, len(values))
        extend_digests(digests, ROOT, values[:known], known // page_size, page_size)
    assert digests == whole
    assert len({*whole}) == len(whole)
    assert all(len(digest) == DIGEST_BYTES for digest in whole)


def test_roots_differ_wherever_a_part_does():
    """Parts that only come to the same bytes one behind the other among them."""
    words = [b"", b"a", b"b", b"ab", b"\0", b"a\0", b"\x01\0\0\0\0\0\0\0a", b"a" * 300]
    parts = list(product(words, words, words))
    assert len({root_digest(*each) for each in parts}) == len(parts)
    assert root_digest(b"a", b"") != root_digest(b"a")


def test_another_root_makes_all_pages_others():
    values = list(range(12))
    own, other = digests_of(values, 4), digests_of(values, 4, root_digest(b"model", b"x", b""))
    assert not {*own} & {*other}
