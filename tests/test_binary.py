"""Binary cross entropy on every backend, against exact arithmetic at both ends."""

import numpy as np
import pytest

import fastxent
from tests import exact

BACKENDS = fastxent.backends.available()
REAL = exact.REAL


def softplus(x):
    """log(1 + exp(x)) in long double."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def problem(dtype, size=(37, 19)):
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(size) * rng.choice([0.1, 3, 40], size)).astype(dtype)
    targets = np.where(rng.random(size) < 0.7, rng.random(size) > 0.5, rng.random(size))
    return logits, targets.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_exact_arithmetic(backend, dtype, smoothing, weighted):
    logits, targets = problem(dtype)
    rng = np.random.default_rng(1)
    weight, pos_weight = (rng.random((37, 1)), 3 * rng.random(19)) if weighted else (1.0, 1.0)
    options = {"weight": weight, "pos_weight": pos_weight} if weighted else {}
    loss, gradient = fastxent.binary_cross_entropy_with_logits_with_grad(
        logits, targets, label_smoothing=smoothing, reduction="none", backend=backend, **options
    )
    x, y = logits.astype(REAL), targets.astype(REAL) * (1 - smoothing) + REAL(smoothing) / 2
    a, b = weight * pos_weight * y, weight * (1 - y)
    computed = exact.computed(dtype)
    assert loss.dtype == computed
    want, tiny = a * softplus(-x) + b * softplus(x), np.finfo(computed).tiny
    exact.assert_close(loss, want, want, exact.LOSS[computed], tiny)
    up, down = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    exact.assert_close(gradient, b * up - a * down, b * up + a * down, exact.GRADIENT[computed], tiny)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_ends_keep_their_digits(backend):
    logits = np.float32([-14, -16, -30, -80])
    want = np.float32([8.3152838e-07, 1.1253517e-07, 9.3576230e-14, 1.8048513e-35])
    for sign, target in ((1, 0), (-1, 1)):
        loss, gradient = fastxent.binary_cross_entropy_with_logits_with_grad(
            sign * logits, np.full(4, target), reduction="none", backend=backend
        )
        np.testing.assert_allclose(loss, want, rtol=5e-7)
        np.testing.assert_allclose(gradient, sign * want, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend):
    loss, gradient = fastxent.binary_cross_entropy_with_logits_with_grad(
        [np.inf, -np.inf, np.inf, np.nan], [1, 0, 0, 1], reduction="none", backend=backend
    )
    np.testing.assert_array_equal(loss, [0, 0, np.inf, np.nan])
    np.testing.assert_array_equal(gradient, [0, 0, 1, np.nan])


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_grad_output(backend):
    logits, targets = problem("float64")
    losses = fastxent.binary_cross_entropy_with_logits(logits, targets, reduction="none", backend=backend)
    assert fastxent.binary_cross_entropy_with_logits(logits, targets, backend=backend) == pytest.approx(losses.mean())
    total = fastxent.binary_cross_entropy_with_logits(logits, targets, reduction="sum", backend=backend)
    assert total == pytest.approx(losses.sum())
    plain = fastxent.binary_cross_entropy_with_logits_grad(logits, targets, reduction="sum", backend=backend)
    mean = fastxent.binary_cross_entropy_with_logits_grad(logits, targets, grad_output=2.0, backend=backend)
    np.testing.assert_allclose(mean, plain * 2 / logits.size, rtol=1e-15)
    assert np.isnan(fastxent.binary_cross_entropy_with_logits(np.empty(0), np.empty(0), backend=backend))


def test_layouts_and_sizes():
    logits, targets = problem("float32", (700, 801))
    want = fastxent.binary_cross_entropy_with_logits_with_grad(logits, targets)
    for other in (np.asfortranarray(logits), logits.astype(">f4"), np.repeat(logits, 2, axis=1)[:, ::2]):
        got = fastxent.binary_cross_entropy_with_logits_with_grad(other, targets)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    kept = logits.copy()
    assert fastxent.binary_cross_entropy_with_logits_grad(kept, targets, out=kept) is kept
    np.testing.assert_array_equal(kept, want[1])
    strided = np.empty((801, 700)).T
    fastxent.binary_cross_entropy_with_logits_grad(logits, targets, out=strided)
    np.testing.assert_array_equal(strided, want[1])


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (TypeError, "logits must have one of the dtypes", {"logits": [1, 2]}),
        (ValueError, r"targets must have the logits' shape \(2,\); got \(3,\)", {"targets": [0, 1, 0]}),
        (ValueError, r"targets must lie in \[0, 1\]; got 1.5", {"targets": [0, 1.5]}),
        (ValueError, r"targets must lie in \[0, 1\]; got nan", {"targets": [0, np.nan]}),
        (ValueError, "weight must be finite and not negative; got -1", {"weight": -1.0}),
        (ValueError, "pos_weight must broadcast to the logits' shape", {"pos_weight": [1, 2, 3]}),
        (ValueError, "reduction must be one of", {"reduction": "avg"}),
        (ValueError, r"label_smoothing must lie in \[0, 1\]", {"label_smoothing": 2}),
        (ValueError, "grad_output must be a scalar unless", {"grad_output": [1.0, 2.0]}),
    ],
)
def test_errors(kind, message, arguments):
    out = np.full(2, 7.0)
    with pytest.raises(kind, match=message):
        fastxent.binary_cross_entropy_with_logits_grad(
            **{"logits": np.zeros(2), "targets": [0, 1], "out": out} | arguments
        )
    np.testing.assert_array_equal(out, 7.0)
