"""Exact arithmetic for the tests: 80-bit long double, itself checked against mpmath in test_exact.py.

The promise of the package is 2e-15; the rounding of these formulas is below 1e-17. Where long double is no more than a
double, as on Windows and on Apple's processors, tests that ask this oracle are skipped.
"""

import ml_dtypes
import numpy as np
import pytest

from fastxent import checks
from fastxent.bench.cases import Case

REAL = np.longdouble

# by the dtype that is computed with, see `fastxent.checks.loss_dtype`
LOSS = {"float32": 5e-7, "float64": 2e-15}
GRADIENT = {"float32": 1e-6, "float64": 4e-15}


def needed():
    """Skip the test where nothing here is exact."""
    if np.finfo(REAL).eps > 2e-19:
        pytest.skip("needs a long double of 80 bits or more, as on Linux")


def computed(dtype):
    """The name of the dtype that logits of ``dtype`` are computed with."""
    return checks.loss_dtype(np.dtype(dtype)).name


def rounding(dtype):
    """What one rounding to ``dtype`` may cost: relative to the number, and absolutely among the subnormals."""
    if np.dtype(dtype).name in LOSS:
        return 0.0, 0.0  # part of the promise
    limits = ml_dtypes.finfo(dtype)
    return float(limits.eps) / 2, float(limits.smallest_subnormal) / 2


def nll(row, target):
    """logsumexp(row) - row[target], nothing cancelling."""
    needed()
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
    """Losses and gradients of a case; every gradient entry beside the sum of the absolute values of its terms.

    ``loss_budget`` and ``gradient_budget`` are what the promise allows, relative to the loss and to those terms.
    ``most`` (N,) is what a row's probabilities are multiplied by at most, 1 at least: those below the smallest normal
    number may be taken for 0.
    """

    def __init__(self, case: Case):
        needed()
        self.logits, self.targets, options = case.build()
        self.options = dict(options)
        self._get = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "temperature": 1.0} | options
        (n, v), self.kind = self.logits.shape, case.targets
        self.weight = np.asarray(options.get("weight", np.ones(v)), REAL)
        self.sample_weight = np.asarray(options.get("sample_weight", np.ones(n)), REAL)
        self.counted = self.sample_weight > 0
        target_weight = np.ones(n, REAL)
        if self.kind == "index":
            self.counted &= self.targets != -100
            target_weight = self.weight[np.maximum(self.targets, 0)]
        self.divisor = REAL(1)
        if options.get("reduction", "mean") == "mean":
            whole = np.where(self.counted, target_weight * self.sample_weight, 0).sum()
            self.divisor = REAL(options.get("denominator") or whole)
        self.losses, self.lse = np.zeros(n, REAL), np.full(n, np.nan, REAL)
        self.gradient, self.terms = np.zeros((2, n, v), REAL)
        self.most, self._unsloped = np.ones(n, REAL), np.zeros(n, REAL)
        for i in np.flatnonzero(self.counted):
            self._row(i, target_weight[i])
        self._set_budgets(computed(case.dtype))

    def _set_budgets(self, dtype):
        self.loss_budget, self.gradient_budget, self.loss_slack = LOSS[dtype], GRADIENT[dtype], np.zeros(())
        if self._get["softcap"] is not None:
            bend = self._get["softcap"] * 2.0 ** {"float32": -22, "float64": -51}[dtype] / self._get["temperature"]
            # 1 - tanh^2 is exp(-2 |x / softcap|), whose argument is rounded
            steepest = min(
                np.abs(self.logits.astype(REAL)).max(initial=0) / self._get["softcap"], np.finfo(dtype).maxexp
            )
            self.gradient_budget += 2 * bend + float(steepest) * np.finfo(dtype).eps
            mass = self._unsloped
            self.loss_slack = bend * (mass if self.options.get("reduction") == "none" else mass.sum())

    def _in_nats(self, i):
        """The logits below the largest, the largest, and the slope; the difference is taken before the division."""
        x, softcap, temperature = self.logits[i].astype(REAL), self._get["softcap"], REAL(self._get["temperature"])
        if softcap is None:
            return (x - x.max()) / temperature, x.max() / temperature, 1 / temperature
        q, capped = np.exp(-2 * np.abs(x / softcap)), softcap * np.tanh(x / softcap)
        return (capped - capped.max()) / temperature, capped.max() / temperature, 4 * q / (1 + q) ** 2 / temperature

    def _shares(self, i, target_weight):
        """What each class weighs in sum r (lse - z), and the hit of a class index."""
        e, v = REAL(self._get["label_smoothing"]), self.logits.shape[1]
        even = self.weight * e / v
        if self.kind == "index":
            return even, (1 - e) * target_weight
        q = np.zeros(v, REAL)
        if self.kind == "dense":
            q[:] = self.targets[i]
        else:
            ids, probabilities = self.targets
            used = ids[i] != -100
            np.add.at(q, ids[i, used], probabilities[i, used])
        return (1 - e) * self.weight * q + even, REAL(0)

    def _row(self, i, target_weight):
        (z, top, slope), (r, hit) = self._in_nats(i), self._shares(i, target_weight)
        largest = z.argmax()
        t = self.targets[i] if self.kind == "index" else largest
        excess, loss = nll(z, largest), nll(z, t)
        self.lse[i] = lse = top + excess
        with np.errstate(invalid="ignore"):
            gaps = np.where(r > 0, r * (excess - z), 0).sum()
        lam, g = REAL(self._get["z_loss"]), self.sample_weight[i] / self.divisor
        self.losses[i] = self.sample_weight[i] * ((hit * loss if hit else 0) + gaps + lam * lse**2)
        p = np.exp(z - excess)
        gradient, terms = p * (hit + r.sum() + 2 * lam * lse) - r, p * (hit + r.sum() + 2 * lam * abs(lse)) + r
        gradient[t] = p[t] * (r.sum() + 2 * lam * lse) - r[t] - hit * -np.expm1(-loss)
        terms[t] = p[t] * (r.sum() + 2 * lam * abs(lse)) + r[t] + hit * -np.expm1(-loss)
        self.gradient[i], self.terms[i] = g * gradient * slope, g * terms * slope
        self._unsloped[i] = g * terms.sum()
        self.most[i] = max(1, g * (hit + r.sum() + 2 * lam * abs(lse)) * np.max(slope))

    @property
    def loss(self):
        if self.options.get("reduction", "mean") == "none":
            return self.losses
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.losses.sum() / self.divisor


def assert_close(got, exact, scale, relative, tiny):
    """|got - exact| <= relative * scale, or <= tiny, the smallest normal number, or so much for each; equal where exact
    is not finite.

    One rounding to a dtype of few bits is allowed on top.
    """
    needed()
    of_number, absolutely = rounding(got.dtype)
    got, exact = np.asarray(got, REAL), np.asarray(exact, REAL)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite])
    excess = np.abs(got[finite] - exact[finite]) - np.maximum(
        relative * np.broadcast_to(scale, exact.shape)[finite], np.broadcast_to(tiny, exact.shape)[finite]
    )
    excess -= np.maximum(of_number * np.abs(exact[finite]) * (1 + relative), absolutely)
    assert not (excess > 0).any(), f"off by {excess.max()} more than allowed, at {got[finite][excess.argmax()]}"
    assert np.isfinite(got[finite]).all()
