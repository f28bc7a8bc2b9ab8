"""Entropy and divergences of logits on every backend, against exact arithmetic; never negative."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxent
from fastxent.bench.cases import Case
from tests import exact
from tests.test_softmax import exact_rows

BACKENDS = fastxent.backends.available()
KINDS = ("typical", "confident", "masked", "wide", "ties")


def pair(kind, dtype):
    """Logits of two models, the second near the first in half the rows."""
    p = Case(8, 300, kind, dtype).build()[0]
    q = Case(9, 300, "typical", dtype).build()[0][:8]
    q[::2] = (p[::2].astype(np.float64) + 1e-3 * q[::2].astype(np.float64)).astype(dtype)
    return p, q


def times(p, value):
    with np.errstate(invalid="ignore"):
        return np.where(p == 0, 0, p * value)


def budget(backend, logits):
    """Relative error of a gradient; plain NumPy rounds z - largest before the exponential."""
    allowed = exact.GRADIENT[logits.dtype.name]
    if backend == "reference" and logits.dtype == np.float64:
        allowed += 2 * np.finfo(np.float64).eps * np.ptp(np.where(np.isfinite(logits), logits, 0.0), axis=1).max()
    return allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestAgreement:
    def test_entropy(self, backend, kind, dtype):
        logits, _ = pair(kind, dtype)
        log_p = exact_rows(logits)
        p = np.exp(log_p)
        want = -times(p, log_p).sum(axis=1)
        got = fastxent.entropy_from_logits(logits, backend=backend)
        assert got.dtype == dtype
        exact.assert_close(got, want, want, exact.LOSS[dtype], np.finfo(dtype).tiny)
        gradient = fastxent.entropy_from_logits_grad(logits, backend=backend)
        scale = times(p, np.abs(log_p)) + p * want[:, None]
        exact.assert_close(gradient, -times(p, log_p + want[:, None]), scale, budget(backend, logits), 1e-300)

    def test_kullback_leibler(self, backend, kind, dtype):
        logits_p, logits_q = pair(kind, dtype)
        log_p, log_q = exact_rows(logits_p), exact_rows(logits_q)
        p, q = np.exp(log_p), np.exp(log_q)
        with np.errstate(invalid="ignore"):
            want = times(p, log_p - log_q)
        got = fastxent.kl_divergence_from_logits(logits_p, logits_q, backend=backend)
        assert (got >= 0).all()
        exact.assert_close(got, want.sum(axis=1), np.abs(want).sum(axis=1), 1e-6 if dtype == "float32" else 4e-15, 0)
        by_p, by_q = fastxent.kl_divergence_from_logits_grad(logits_p, logits_q, backend=backend)
        gradient = want - p * want.sum(axis=1, keepdims=True)
        scale = times(p, np.abs(log_p) + np.abs(log_q)) + p * np.abs(want).sum(axis=1, keepdims=True)
        exact.assert_close(by_p, gradient, scale, budget(backend, logits_p), 1e-300)
        exact.assert_close(by_q, q - p, q + p, budget(backend, logits_p), 1e-300)

    def test_jensen_shannon(self, backend, kind, dtype):
        logits_p, logits_q = pair(kind, dtype)
        log_p, log_q = exact_rows(logits_p), exact_rows(logits_q)
        p, q = np.exp(log_p), np.exp(log_q)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.log((p + q) / 2)
            a, b = times(p, log_p - mean), times(q, log_q - mean)
        want, scale = (a + b).sum(axis=1) / 2, (np.abs(a) + np.abs(b)).sum(axis=1) / 2
        got = fastxent.js_divergence_from_logits(logits_p, logits_q, backend=backend)
        assert (got >= 0).all()
        assert (got <= np.log(2) * (1 + 1e-7)).all()
        # the oracle's own log((p + q) / 2) is good to 1e-19
        exact.assert_close(got, want, scale, 1e-6 if dtype == "float32" else 4e-15, 1e-18)
        swapped = fastxent.js_divergence_from_logits(logits_q, logits_p, backend=backend)
        np.testing.assert_allclose(got, swapped, rtol=1e-6)
        by_p, by_q = fastxent.js_divergence_from_logits_grad(logits_p, logits_q, backend=backend)
        for got, mass, term in ((by_p, p, a), (by_q, q, b)):
            gradient = (term - mass * term.sum(axis=1, keepdims=True)) / 2
            scale = times(mass, np.abs(log_p) + np.abs(log_q)) + mass * np.abs(term).sum(axis=1, keepdims=True)
            exact.assert_close(got, gradient, scale, exact.GRADIENT[dtype], 1e-18)


@pytest.mark.parametrize("backend", BACKENDS)
def test_corners(backend):
    kl, entropy = fastxent.kl_divergence_from_logits, fastxent.entropy_from_logits
    assert kl([0.0, 0.0], [0.0, -np.inf], backend=backend) == np.inf
    np.testing.assert_allclose(kl([0.0, -np.inf], [0.0, 0.0], backend=backend), np.log(2), rtol=1e-15)
    assert kl([0.0, -np.inf], [3.0, -np.inf], backend=backend) == 0
    assert entropy([5.0, -np.inf], backend=backend) == 0
    for bad in ([np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]):
        assert np.isnan(entropy(bad, backend=backend))
        assert np.isnan(kl(bad, [0.0, 0.0], backend=backend))
    np.testing.assert_allclose(entropy(np.float32([30, 0]), backend=backend), 2.9008631e-12, rtol=5e-7)


def test_axis_mixed_dtypes_and_out():
    p, q = pair("typical", "float32")
    want = fastxent.kl_divergence_from_logits(p.astype(np.float64), q.astype(np.float64))
    cube = fastxent.kl_divergence_from_logits(p.T, q.astype(np.float64).T, axis=0)
    np.testing.assert_array_equal(cube, want)
    first = np.empty(p.shape)
    got = fastxent.kl_divergence_from_logits_grad(p, q, grad_output=np.arange(8.0), out=(first, None))
    assert got[0] is first
    plain = fastxent.kl_divergence_from_logits_grad(p, q)
    np.testing.assert_allclose(got[1], np.arange(8.0)[:, None] * plain[1], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"logits_q must have the shape of logits_p \(2,\), not \(3,\)"):
        fastxent.kl_divergence_from_logits(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="axis must lie in"):
        fastxent.entropy_from_logits(np.zeros(2), axis=1)


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=12), st.floats(-40, 40))
@settings(deadline=None, max_examples=200)
def test_laws(logits, shift):
    p, q = np.array(logits).T
    assert fastxent.kl_divergence_from_logits(p, q) >= 0
    assert fastxent.js_divergence_from_logits(p, q) >= 0
    assert fastxent.kl_divergence_from_logits(p, p) == 0
    assert fastxent.kl_divergence_from_logits(p, p + shift) <= 1e-13
    assert 0 <= fastxent.entropy_from_logits(p) <= np.log(len(p)) * (1 + 1e-15) + 1e-15
