"""Threefry against the published vectors and JAX's own."""

import jax
import numpy as np

from jaxserve.sampling.bits import threefry


def words(*values):
    return tuple(np.array([value], np.uint32) for value in values)


def test_known_answers():
    """Random123's vectors for threefry2x32, 20 rounds."""
    ones = 0xFFFFFFFF
    for key, counter, expected in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]:
        got = threefry(words(*key), words(*counter))
        assert [int(word[0]) for word in got] == list(expected)


def test_equals_jax_random():
    key = jax.random.wrap_key_data(np.array([7, 9], np.uint32), impl="threefry2x32")
    folded = jax.random.key_data(jax.random.fold_in(key, 5))
    got = threefry(words(7, 9), words(0, 5))
    assert [int(word[0]) for word in got] == np.asarray(folded).tolist()
