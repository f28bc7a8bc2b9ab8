"""Copies between arrays of any strides: every element arrives, and nothing else is written."""

import itertools

import numpy as np
import pytest

from fastxent.backends.cpu import strided

# below, at and above a tile of sixteen and a span of 128; up to five axes
SHAPES = [(5,), (15, 100), (17, 16), (16, 300), (3, 40, 150), (2, 3, 4, 17, 33)]
SIZES = (1, 2, 4, 8)


def _layouts(array):
    yield "as it is", array
    for order in itertools.islice(itertools.permutations(range(array.ndim)), 1, 30):
        yield f"axes {order}", array.transpose(order).copy().transpose(np.argsort(order))
    yield "reversed", array[..., ::-1].copy()[..., ::-1]
    yield "rows reversed", array[::-1].copy()[::-1]
    yield "every other", np.repeat(array, 2, axis=-1)[..., ::2]
    yield "other byte order", array.astype(array.dtype.newbyteorder(">"))
    yield "unaligned", np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_and_to_every_layout(shape, size):
    array = np.random.default_rng(0).integers(0, 2 ** (8 * size), shape, f"u{size}")
    for name, source in _layouts(array):
        gathered = np.zeros(shape, array.dtype)
        strided.copy(source, gathered)
        np.testing.assert_array_equal(gathered, array, name)
        if source.flags.writeable and source.base is not None:
            whole = source.base
            before, mask = whole.copy(), np.ones(whole.shape, bool)
            source[...] = 0
            mask &= whole == before
            strided.copy(array, source)
            np.testing.assert_array_equal(source, array, name)
            np.testing.assert_array_equal(whole[mask], before[mask], name)


def test_broadcast_and_empty():
    row = np.arange(40, dtype=np.float32)
    gathered = np.zeros((30, 40), np.float32)
    strided.copy(np.broadcast_to(row, gathered.shape), gathered)
    np.testing.assert_array_equal(gathered, np.tile(row, (30, 1)))
    strided.copy(np.zeros((0, 3)), np.zeros((0, 3)))
