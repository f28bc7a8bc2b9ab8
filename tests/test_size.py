"""More than 2^31 and 2^32 logits, where an index of 32 bits would wrap: the far end is read, written and ranked."""

import ctypes
import mmap
import os

import ml_dtypes
import numpy as np
import pytest

import fastxent

PERIOD, CLASSES = 128, 131_072  # rows of a chunk of 64 MiB of float32, which lies in memory once and is seen often
ROWS = (1 << 32) // CLASSES + PERIOD
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


class Repeated:
    """A float32 array (ROWS, CLASSES) of 17 GB whose first chunks are one and the same memory, the last its own."""

    def __init__(self):
        self._room = mmap.mmap(-1, 4 * ROWS * CLASSES, mmap.MAP_PRIVATE | _MAP_NORESERVE)
        self.array = np.frombuffer(self._room, np.float32).reshape(ROWS, CLASSES)
        size, start = 4 * PERIOD * CLASSES, self.array.ctypes.data
        own = os.memfd_create("chunks")
        os.ftruncate(own, 2 * size)
        for chunk in range(ROWS // PERIOD):
            last = (chunk + 1) * PERIOD == ROWS
            address = start + chunk * size
            flags = mmap.MAP_SHARED | _MAP_FIXED
            found = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, own, size if last else 0)
            assert found == address
        os.close(own)

    def fill(self, first, last):
        self.array[:PERIOD], self.array[-PERIOD:] = first, last
        return self.array


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    chunks = 4 * rng.standard_normal((2, PERIOD, CLASSES), np.float32)
    targets = rng.integers(0, CLASSES, (2, PERIOD))
    chunks[:, np.arange(0, PERIOD, 2), -1] += 40  # far in the row, too
    whole = np.concatenate([np.tile(targets[0], ROWS // PERIOD - 1), targets[1]])
    return chunks, targets, Repeated().fill(*chunks), whole


def spread_out(first, last):
    return np.concatenate([np.tile(first, (ROWS // PERIOD - 1, *[1] * (first.ndim - 1))), last])


def test_losses(problem):
    chunks, targets, logits, whole = problem
    assert logits.size > 1 << 32
    want = [fastxent.cross_entropy(chunks[k], targets[k], reduction="none") for k in (0, 1)]
    got = fastxent.cross_entropy(logits, whole, reduction="none")
    np.testing.assert_array_equal(got, spread_out(*want))


def test_scores_and_the_largest_classes(problem):
    chunks, targets, logits, whole = problem
    want = [fastxent.score(chunks[k], targets[k], top_k=3) for k in (0, 1)]
    got = fastxent.score(logits, whole, top_k=3)
    for name in ("log_prob", "rank", "top_ids", "top_log_probs", "entropy"):
        np.testing.assert_array_equal(getattr(got, name), spread_out(*(getattr(part, name) for part in want)))


def test_gradients(problem):
    """On one thread: two would write the same memory, which no array has twice."""
    chunks, targets, logits, whole = problem
    want = [fastxent.cross_entropy_grad(chunks[k], targets[k], reduction="sum") for k in (0, 1)]
    out, threads = Repeated().array, fastxent.get_num_threads()
    try:
        fastxent.set_num_threads(1)
        fastxent.cross_entropy_grad(logits, whole, reduction="sum", out=out)
    finally:
        fastxent.set_num_threads(threads)
    np.testing.assert_array_equal(out[:PERIOD], want[0])
    np.testing.assert_array_equal(out[-PERIOD:], want[1])


def test_one_row_seen_often():
    """A view of stride 0 of 2^32 logits, gathered block by block."""
    row = 4 * np.random.default_rng(0).standard_normal((1, 65_537), np.float32)
    logits, targets = np.broadcast_to(row, (65_537, 65_537)), np.arange(65_537)
    want = -fastxent.log_softmax(row)[0]
    got = fastxent.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose(got, want, rtol=1e-6)
    far = fastxent.cross_entropy_grad(logits[-3:], targets[-3:], reduction="sum")
    assert np.abs(far.sum(axis=1)).max() < 1e-5
    assert (far[[0, 1, 2], [-3, -2, -1]] < 0).all()


@pytest.mark.slow
def test_scores_of_one_row_seen_often():
    row = 4 * np.random.default_rng(0).standard_normal((1, 65_537), np.float32)
    logits, targets = np.broadcast_to(row, (65_537, 65_537)), np.arange(65_537)
    got = fastxent.score(logits, targets, top_k=3)
    order = np.argsort(-row[0], kind="stable")
    np.testing.assert_array_equal(got.top_ids, np.broadcast_to(order[:3], got.top_ids.shape))
    np.testing.assert_array_equal(got.rank[order], 1 + np.searchsorted(-row[0, order], -row[0, order]))
    log_p = fastxent.log_softmax(row)[0]
    np.testing.assert_allclose(got.log_prob, log_p, rtol=1e-6)
    np.testing.assert_allclose(got.top_log_probs, np.broadcast_to(log_p[order[:3]], got.top_ids.shape), rtol=1e-6)
    assert len(np.unique(got.entropy)) == 1


@pytest.mark.slow
def test_the_gradient_of_one_row_seen_often():
    """On one thread, see `test_gradients`."""
    row = 4 * np.random.default_rng(0).standard_normal((1, CLASSES), np.float32)
    targets = np.arange(CLASSES - PERIOD, CLASSES)
    want = fastxent.cross_entropy_grad(np.repeat(row, PERIOD, axis=0), targets, reduction="sum")
    out, threads = Repeated().array, fastxent.get_num_threads()
    try:
        fastxent.set_num_threads(1)
        logits, whole = np.broadcast_to(row, (ROWS, CLASSES)), np.tile(targets, ROWS // PERIOD)
        fastxent.cross_entropy_grad(logits, whole, reduction="sum", out=out)
    finally:
        fastxent.set_num_threads(threads)
    np.testing.assert_array_equal(out[:PERIOD], want)
    np.testing.assert_array_equal(out[-PERIOD:], want)


@pytest.mark.parametrize("classes", [(1 << 31) + 77, pytest.param((1 << 32) + 77, marks=pytest.mark.slow)])
def test_one_row_of_so_many_classes(tmp_path, classes):
    """A sparse file of float8, all 0 but for two logits at its end."""
    logits = np.memmap(tmp_path / "logits", np.uint8, "w+", shape=(1, classes)).view(ml_dtypes.float8_e5m2)
    logits[0, -40], logits[0, -2] = 28.0, 24.0
    want = np.log(np.exp(np.longdouble([28, 24])).sum() + (classes - 2))
    scores = fastxent.score(logits, [classes - 2], top_k=3)
    np.testing.assert_allclose(scores.log_prob, [np.float64(24 - want)], rtol=5e-7)
    assert scores.top_ids.tolist() == [[classes - 40, classes - 2, 0]]
    assert (scores.rank[0], scores.argmax[0]) == (2, classes - 40)
    np.testing.assert_allclose(fastxent.cross_entropy(logits, [classes - 1]), want, rtol=5e-7)


@pytest.mark.slow
def test_the_gradient_of_one_row_of_so_many_classes(tmp_path):
    """In place in a file of float16, sparse until it is written: 4.3 GB."""
    classes = (1 << 31) + 77
    logits = np.memmap(tmp_path / "logits", np.float16, "w+", shape=(1, classes))
    logits[0, -40], logits[0, -2] = 28.0, 24.0
    total = np.exp(np.longdouble([28, 24])).sum() + (classes - 2)
    fastxent.cross_entropy_grad(logits, [classes - 2], reduction="sum", out=logits)
    want = np.exp(np.longdouble([0, 28, 0, 24])) / total - [0, 0, 0, 1]
    np.testing.assert_allclose(logits[0, [0, -40, -1, -2]].astype(np.float64), want.astype(np.float64), 2**-11, 2**-25)
    for start in range(1, classes - 40, 1 << 28):
        part = logits[0, start : min(start + (1 << 28), classes - 40)]
        assert (part == logits[0, 0]).all()
