"""Side by side with pytest-benchmark, checked before timed: ``pytest test_speed.py --benchmark-group-by=group``."""

import functools

import numpy as np
import pytest

from fastxent.bench import candidates, cases, exact, limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
SHAPES = [f"{rows}x{classes}" for rows, classes in cases.SPEED_SHAPES]
SLOW = "fastxent cuda", "fastxent reference"  # a GPU has a suite of its own, and the reference no speed


@functools.lru_cache(1)  # candidates vary fastest
def problem(shape, dtype):
    rows, classes = map(int, shape.split("x"))
    return cases.speed_case(rows, classes, dtype).build()[:2]


def compare(benchmark, operation, table, candidate, shape, dtype, want_of, limit_of):
    benchmark.group = f"{operation} {shape} {dtype}"
    logits, targets = problem(shape, dtype)
    if candidate not in table:
        benchmark(limit_of(logits))
        return
    try:
        run = table[candidate](logits, targets)
    except (ImportError, candidates.UnsupportedError) as reason:
        pytest.skip(str(reason))
    rows = exact.some_rows(len(logits))[::-4]
    want = want_of(*exact.losses_and_gradient(logits[rows], targets[rows])).astype(float)
    np.testing.assert_allclose(np.asarray(run())[rows].astype(float), want, rtol=1e-4, atol=1e-9)
    benchmark(run)


@pytest.mark.parametrize("candidate", ["read", *(name for name in candidates.LOSS if name not in SLOW)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss(benchmark, candidate, shape, dtype):
    def read(logits):
        return functools.partial(limits.read, logits)

    compare(benchmark, "loss", candidates.LOSS, candidate, shape, dtype, lambda losses, _: losses, read)


@pytest.mark.parametrize("candidate", ["copy", *(name for name in candidates.LOSS_AND_GRADIENT if name not in SLOW)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(benchmark, candidate, shape, dtype):
    def copy(logits):
        return functools.partial(limits.copy, logits, np.zeros_like(logits))

    table = candidates.LOSS_AND_GRADIENT
    compare(benchmark, "loss and gradient", table, candidate, shape, dtype, lambda _, gradient: gradient, copy)
