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


AXES = (0, -1, (0, 2), (2, -3), None)


def cube():
    rng = np.random.default_rng(2)
    kept = rng.random((3, 7, 5)) < 0.8
    kept[0], kept[..., 0] = True, True  # no row along any axis without a class
    return 4 * rng.standard_normal((3, 7, 5)), kept, rng.standard_normal((3, 7, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", AXES)
class TestAxes:
    def test_scipys_answers(self, backend, axis):
        logits, _, _ = cube()
        for array in (logits, np.asfortranarray(logits)):
            for keepdims in (False, True):
                got = fastxent.logsumexp(array, axis=axis, keepdims=keepdims, backend=backend)
                want = scipy.special.logsumexp(logits, axis=axis, keepdims=keepdims)
                np.testing.assert_allclose(got, want, rtol=1e-14)
                assert got.shape == want.shape
            for name in ("softmax", "log_softmax"):
                want = getattr(scipy.special, name)(logits, axis=axis)
                got = getattr(fastxent, name)(array, axis=axis, backend=backend)
                np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-15)

    def test_mask_and_scale(self, backend, axis):
        logits, kept, _ = cube()
        options = {"axis": axis, "where": kept, "scale": 0.3, "backend": backend}
        masked = np.where(kept, 0.3 * logits, -np.inf)
        np.testing.assert_allclose(
            fastxent.logsumexp(logits, **options), scipy.special.logsumexp(masked, axis=axis), rtol=1e-13
        )
        want = scipy.special.softmax(masked, axis=axis)
        np.testing.assert_allclose(fastxent.softmax(logits, **options), want, rtol=1e-13)
        log_p = fastxent.log_softmax(logits, **options)
        assert np.isneginf(log_p[~kept]).all()

    @pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
    def test_vector_jacobian_products_are_slopes(self, backend, axis, name):
        logits, kept, direction = cube()
        options = {"axis": axis, "where": kept, "scale": 0.3, "backend": backend}
        function, gradient = getattr(fastxent, name), getattr(fastxent, f"{name}_grad")

        def value(h):
            result = function(logits + h * direction, **options)
            return np.where(np.isfinite(result), result, 0.0)

        h = 1e-3
        slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
        g = np.sin(np.arange(slope.size)).reshape(slope.shape)
        got = np.sum(gradient(logits, grad_output=g, **options) * direction)
        np.testing.assert_allclose(got, np.sum(g * slope), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_attention_is_one_call(backend):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 4, 9, 16), np.float32)
    scores = q @ k.swapaxes(-1, -2)
    got = fastxent.softmax(scores, scale=1 / 4, where=np.tri(9, dtype=bool), backend=backend)
    want = scipy.special.softmax(np.where(np.tri(9, dtype=bool), scores.astype(float) / 4, -np.inf), axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert not got[..., ~np.tri(9, dtype=bool)].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [5, 20, 40, 80])
def test_gradients_of_a_confident_row_keep_their_digits(backend, margin):
    logits, g = np.float32([[margin, 0.0, -1.0]]), np.array([[3.0, 0.0, 0.0]])
    small = np.exp(logits[0, 1:].astype(np.longdouble) - margin)
    p = np.append(1, small) / (1 + small.sum())
    rest = small.sum() / (1 + small.sum())
    for name, want in (
        ("log_softmax_grad", 3 * np.append(rest, -p[1:])),
        ("softmax_grad", 3 * p[0] * np.append(rest, -p[1:])),
    ):
        got = getattr(fastxent, name)(logits, grad_output=g, out=np.empty(logits.shape), backend=backend)
        np.testing.assert_allclose(got[0], want.astype(float), rtol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_costs_no_digit(backend):
    logits = np.float32([[1e4, 1e4 - 30, 0]])
    exactly = (logits.astype(np.longdouble) - 10_000) / 3
    want = (exactly - np.log1p(np.exp(exactly[0, 1:]).sum())).astype(np.float32)
    scale = float(np.float64(1) / 3)
    np.testing.assert_allclose(fastxent.log_softmax(logits, scale=scale, backend=backend), want, rtol=5e-7)


def test_masks_of_every_dtype():
    for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        logits = np.array([[1, 2, 3]], dtype)
        got = fastxent.softmax(logits, where=[True, False, True])
        want = scipy.special.softmax([1.0, -np.inf, 3.0])
        np.testing.assert_allclose(got.astype(float)[0], want, rtol=1e-2)


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (ValueError, r"axis must lie in \[-2, 1\]", {"axis": (0, 2)}),
        (ValueError, r"axis must name one axis or more, each once; got \(1, -1\)", {"axis": (1, -1)}),
        (ValueError, r"axis must name one axis or more, each once; got \(\)", {"axis": ()}),
        (TypeError, "axis must be an integer, not 0.5", {"axis": 0.5}),
        (TypeError, "where must hold truth values, not int64", {"where": [1, 0]}),
        (ValueError, r"where must broadcast to the logits' shape \(2, 3\); got \(2,\)", {"where": [True, False]}),
        (ValueError, "scale must be positive and finite; got 0", {"scale": 0}),
        (ValueError, "out must be writable|out must have", {"out": np.zeros(3)}),
        (ValueError, "grad_output must broadcast to the logits' shape", {"grad_output": [1, 2]}),
    ],
)
def test_errors(kind, message, arguments):
    with pytest.raises(kind, match=message):
        fastxent.softmax_grad(np.zeros((2, 3)), **arguments)
