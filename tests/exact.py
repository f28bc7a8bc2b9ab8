"""Exact arithmetic for the tests: 80-bit long double, itself checked against mpmath in test_exact.py.

The promise of the package is 2e-15; the rounding of these formulas is below 1e-17.
"""

import ml_dtypes
import numpy as np

from fastxent import arguments
from fastxent.bench.cases import Case

REAL = np.longdouble
assert np.finfo(REAL).eps < 2e-19, "the exact oracle needs 80-bit long double, as on x86-64"

# by the dtype that is computed with, see `fastxent.arguments.loss_dtype`
LOSS = {"float32": 5e-7, "float64": 2e-15}
GRADIENT = {"float32": 1e-6, "float64": 4e-15}


def computed(dtype):
    """The name of the dtype that logits of ``dtype`` are computed with."""
    return arguments.loss_dtype(np.dtype(dtype)).name


def rounding(dtype):
    """What one rounding to ``dtype`` may cost: relative to the number, and absolutely among the subnormals."""
    if np.dtype(dtype).name in LOSS:
        return 0.0, 0.0  # part of the promise
    limits = ml_dtypes.finfo(dtype)
    return float(limits.eps) / 2, float(limits.smallest_subnormal) / 2


def nll(row, target):
    """logsumexp(row) - row[target], nothing cancelling."""
    z = row.astype(REAL)
    others = np.delete(z, target)
    peak = others.max(initial=-np.inf)
    if peak == -np.inf:
        return REAL(0)
    total = np.exp(others - peak).sum()
    if z[target] > peak:
        return np.log1p(total * np.exp(peak - z[target]))
    return (peak - z[target]) + np.log(total + np.exp(z[target] - peak))


class Exact:
    """Losses and gradients of a case; every gradient entry beside the sum of the absolute values of its terms."""

    def __init__(self, case: Case):
        self.logits, self.targets, options = case.build()
        self.options = dict(options)
        n, v = self.logits.shape
        self.smoothing = REAL(options.get("label_smoothing", 0.0))
        self.weight = np.asarray(options.get("weight", np.ones(v)), REAL)
        self.counted = self.targets != options.get("ignore_index", -100)
        self.losses = np.zeros(n, REAL)
        self.gradient = np.zeros((n, v), REAL)
        self.terms = np.zeros((n, v), REAL)
        row_weights = np.where(self.counted, self.weight[np.maximum(self.targets, 0)], 0)
        self.divisor = self._divisor(row_weights)
        for i in np.flatnonzero(self.counted):
            self._row(i, row_weights[i])

    def _divisor(self, row_weights):
        if self.options.get("reduction", "mean") != "mean":
            return REAL(1)
        return REAL(self.options.get("denominator") or row_weights.sum())

    def _row(self, i, target_weight):
        z, t, v = self.logits[i].astype(REAL), self.targets[i], self.logits.shape[1]
        e, w = self.smoothing, self.weight
        loss = nll(self.logits[i], t)
        with np.errstate(invalid="ignore"):
            gap = np.where(w > 0, w * (loss + (z[t] - z)), 0).sum()
        self.losses[i] = (1 - e) * target_weight * loss + ((e / v) * gap if e else 0)
        p, g = np.exp((z - z[t]) - loss), 1 / self.divisor
        hit, smooth = g * (1 - e) * target_weight, g * e / v
        extra = smooth * w.sum()
        self.gradient[i] = p * (hit + extra) - smooth * w
        self.gradient[i, t] = hit * np.expm1(-loss) + extra * p[t] - smooth * w[t]
        self.terms[i] = p * (hit + extra) + smooth * w
        self.terms[i, t] = hit * -np.expm1(-loss) + extra * p[t] + smooth * w[t]

    @property
    def loss(self):
        if self.options.get("reduction", "mean") == "none":
            return self.losses
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.losses.sum() / self.divisor


def assert_close(got, exact, scale, relative, tiny):
    """|got - exact| <= relative * scale, or <= tiny, the smallest normal number; equal where exact is not finite.

    One rounding to a dtype of few bits is allowed on top.
    """
    of_number, absolutely = rounding(got.dtype)
    got, exact = np.asarray(got, REAL), np.asarray(exact, REAL)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite])
    excess = np.abs(got[finite] - exact[finite]) - np.maximum(
        relative * np.broadcast_to(scale, exact.shape)[finite], tiny
    )
    excess -= np.maximum(of_number * np.abs(exact[finite]) * (1 + relative), absolutely)
    assert not (excess > 0).any(), f"off by {excess.max()} more than allowed, at {got[finite][excess.argmax()]}"
    assert np.isfinite(got[finite]).all()
