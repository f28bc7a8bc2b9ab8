"""Sums over rows: exact enough, in a fixed order, of the right dtype."""

import math

import numpy as np
import pytest

from fastxent import reduction


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 10_000])
def test_total(size):
    values = np.random.default_rng(size).standard_normal(size) * 10.0 ** np.arange(size).clip(0, 12)
    assert reduction.total(values) == pytest.approx(math.fsum(values), rel=1e-13, abs=1e-13)


def test_total_keeps_blocks_apart():
    values = np.random.default_rng(0).random(5000)
    parts = np.array([reduction.total(values[i : i + 1024]) for i in range(0, 4096, 1024)])
    assert reduction.total(values) == parts.sum() + values[4096:].sum()


def test_divisor():
    weights = np.array([1.0, 0.5, 0.0])
    assert reduction.divisor(weights, 2, "mean", None) == 1.5
    assert reduction.divisor(weights, 2, "mean", 4) == 4
    assert reduction.divisor(weights, 2, "sum", None) == 1


@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f8")])
def test_reduce(dtype):
    losses = np.array([1.0, 2.0, 3.0, 4.0])
    none = reduction.reduce(losses, "none", 1.0, dtype, (2, 2))
    assert (none.shape, none.dtype) == ((2, 2), dtype)
    mean = reduction.reduce(losses, "mean", 4.0, dtype, (2, 2))
    assert (mean, mean.dtype) == (2.5, dtype)
    assert np.isnan(reduction.reduce(losses * 0, "mean", 0.0, dtype, (4,)))
