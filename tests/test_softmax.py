"""logsumexp, log_softmax and softmax on every backend, against exact arithmetic and scipy."""

import numpy as np
import pytest
import scipy.special

import fastxent
from fastxent.bench.cases import KINDS, WIDTHS, Case
from tests import exact

BACKENDS = fastxent.backends.available()
CASES = [Case(5, width) for width in WIDTHS] + [
    Case(5, 700, kind, dtype) for kind in KINDS for dtype in ("float32", "float64")
]


def exact_rows(logits):
    """Log-probabilities in long double, the largest from the sum of the others."""
    rows = np.empty(logits.shape, exact.REAL)
    for row, x in zip(rows, logits, strict=True):
        largest = x.argmax()
        row[:] = (x.astype(exact.REAL) - exact.REAL(x[largest])) - exact.nll(x, largest)
    return rows


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgreement:
    def budget(self, backend, logits):
        budget = exact.GRADIENT[logits.dtype.name]
        if backend == "reference" and logits.dtype == np.float64:
            finite = np.where(np.isfinite(logits), logits, 0.0)
            budget += 2 * np.finfo(np.float64).eps * np.ptp(finite, axis=1).max()
        return budget

    def test_log_softmax(self, backend, case):
        logits = case.build()[0]
        want, got = exact_rows(logits), fastxent.log_softmax(logits, backend=backend)
        assert got.dtype == logits.dtype
        exact.assert_close(got, want, np.abs(want), self.budget(backend, logits), np.finfo(case.dtype).tiny)
        assert (got <= 0).all()

    def test_softmax(self, backend, case):
        logits = case.build()[0]
        want, got = np.exp(exact_rows(logits)), fastxent.softmax(logits, backend=backend)
        exact.assert_close(got, want, want, self.budget(backend, logits), np.finfo(case.dtype).tiny)

    def test_logsumexp(self, backend, case):
        logits = case.build()[0]
        largest = logits.max(axis=1).astype(exact.REAL)
        excess = np.array([exact.nll(row, row.argmax()) for row in logits])
        got = fastxent.logsumexp(logits, backend=backend)
        # the sum may cancel: held to its two terms
        exact.assert_close(got, largest + excess, np.abs(largest) + excess, exact.LOSS[case.dtype], 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [[-np.inf] * 4, [np.inf, 0, -np.inf], [np.nan, np.inf], [0, np.nan], [np.inf, np.inf]])
def test_corners_are_scipys(backend, row):
    logits = np.float64([row])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            fastxent.logsumexp(logits, backend=backend), scipy.special.logsumexp(logits, axis=1)
        )
    for function in (fastxent.softmax, fastxent.log_softmax):
        assert np.isnan(function(logits, backend=backend)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [fastxent.softmax, fastxent.log_softmax])
def test_in_place_and_any_rank(backend, function):
    logits = Case(24, 5001).build()[0].reshape(2, 3, 4, 5001)
    want = function(logits, backend=backend)
    assert want.shape == logits.shape
    kept = logits.copy()
    assert function(kept, out=kept, backend=backend) is kept
    np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_gives_a_scalar(backend):
    assert isinstance(fastxent.logsumexp(np.float32([1, 2, 3]), backend=backend), np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_byte_swapped_rows(backend):
    logits = Case(30, 300).build()[0]
    awkward = np.repeat(logits, 2, axis=1)[:, ::2].astype(">f4")[::-1]
    for function in (fastxent.softmax, fastxent.log_softmax, fastxent.logsumexp):
        want = function(np.ascontiguousarray(logits[::-1]), backend=backend)
        np.testing.assert_array_equal(function(awkward, backend=backend), want)
