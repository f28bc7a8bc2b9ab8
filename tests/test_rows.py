"""Rows of arrays that have no view of them: gathered and scattered slice by slice, wherever it is cut."""

import numpy as np
import pytest

from fastxent import rows

SHAPES = [(5,), (7, 5), (1, 1, 5), (3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 2, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slice(shape):
    array = np.asfortranarray(np.random.default_rng(0).random(shape))
    gathered, want = rows.Rows(array), array.reshape(-1, 5)
    assert gathered.shape == want.shape
    for start in range(len(want) + 1):
        for stop in range(start, len(want) + 1):
            np.testing.assert_array_equal(gathered[start:stop], want[start:stop])
            written, scattered = np.zeros(want.shape), np.asfortranarray(np.zeros(shape))
            rows.Rows(scattered)[start:stop] = want[start:stop]
            written[start:stop] = want[start:stop]
            np.testing.assert_array_equal(scattered.reshape(-1, 5), written)


def test_several_class_axes():
    array = np.moveaxis(np.random.default_rng(0).random((3, 4, 5, 2)), (0, 2), (-2, -1))
    np.testing.assert_array_equal(rows.Rows(array, 2)[2:7], array.reshape(8, 15)[2:7])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single_elements(shape):
    array = np.asfortranarray(np.random.default_rng(0).random(shape))
    flat = array.reshape(-1, 5).copy()
    ids = np.arange(2 * len(flat)).reshape(-1, 2) % 5
    np.testing.assert_array_equal(rows.points(rows.Rows(array), ids), np.take_along_axis(flat, ids, axis=1))
    where = ids > 1
    rows.put(rows.Rows(array), ids, -ids.astype(float), where)
    np.put_along_axis(flat, ids, np.where(where, -ids.astype(float), np.take_along_axis(flat, ids, axis=1)), axis=1)
    np.testing.assert_array_equal(array.reshape(-1, 5), flat)


def test_rows_that_lie_together():
    array = np.zeros((3, 4, 5))

    def together(array):
        return rows.Rows(array).together(lambda view: view.flags.c_contiguous)

    assert together(array) == 12
    assert together(array[:, :-1]) == 3
    assert together(array[:, ::2]) == 1
    assert together(array[..., ::2]) == 0
    assert together(np.zeros((0, 4, 5))[:, :-1]) == 0


def test_pitch():
    array = np.zeros((3, 4, 10), np.float32)
    assert rows.pitch(array, 10) == 10
    assert rows.pitch(array, 40) == 40
    assert rows.pitch(array[..., 2:9], 7) == 10
    assert rows.pitch(array[:, ::2], 10) == 20
    assert rows.pitch(array[:, :-1], 10) is None  # three rows, then a gap
    assert rows.pitch(array[:, 1], 10) == 40
    assert rows.pitch(array[:1, 1:, :3], 3) == 10
    assert rows.pitch(array[:, :2], 20) == 40  # two axes of classes
    assert rows.pitch(array[..., ::2], 5) is None
    assert rows.pitch(array[::-1], 10) is None
    assert rows.pitch(array[..., ::-1], 10) is None
    assert rows.pitch(array.transpose(0, 2, 1), 4) is None
    assert rows.pitch(np.broadcast_to(array[0, 0], (5, 10)), 10) is None
    assert rows.pitch(np.lib.stride_tricks.sliding_window_view(np.zeros(30), 10), 10) is None  # one over another
    odd = np.zeros((4, 41), np.uint8)[:, :40].view(np.float32)
    assert rows.pitch(odd, 10) is None  # no whole number of elements apart


def test_blocks_are_some_megabytes():
    assert list(rows.row_blocks(np.empty((3, 1 << 19)))) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(rows.row_blocks(np.empty((5, 1 << 18)))) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(rows.row_blocks(np.empty((0, 7)))) == []
