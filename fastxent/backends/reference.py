"""The reference backend: float64 NumPy, obvious on sight. It is the oracle of the tests and never chosen by itself.

Rows of ``logits`` (N, V) with ``targets`` (N,) int64: a class index, IGNORED or ABSENT (`fastxent.state`).
"""

import numpy as np

from fastxent.state import IGNORED, LseState, Statistics


def why_unavailable():
    """None: NumPy is always there."""
    return None


def statistics(logits, targets, weight=None):
    """nll, the peak of the other classes and, with class weights (V,), the gap of whole rows."""
    result = Statistics.allocate(len(logits), weight is not None)
    for i, t in enumerate(targets):
        if t == IGNORED:
            result.nll[i], result.target_logit[i], result.peak[i] = 0.0, np.nan, np.nan
            if weight is not None:
                result.gap[i] = 0.0
            continue
        z = logits[i : i + 1][0].astype(np.float64)
        result.nll[i], result.target_logit[i] = _nll(z, t), z[t]
        result.peak[i] = np.delete(z, t).max(initial=-np.inf)
        if weight is not None:
            counted = weight > 0
            result.gap[i] = (weight[counted] * _gaps(z, t)[counted]).sum()
    return result


def statistics_and_gradient(logits, targets, coefficients, out, weight=None):
    """`statistics`, and to ``out`` (N, V) p_k (hit + extra + smooth W) - smooth w_k, less hit on the target.

    ``coefficients`` (N, 3) holds hit, smooth and extra of each row; W is the sum of the weights w, 0 without them.
    """
    result = statistics(logits, targets, weight)
    for i, t in enumerate(targets):
        if t == IGNORED:
            out[i] = 0.0
            continue
        hit, smooth, extra = coefficients[i]
        z = logits[i : i + 1][0].astype(np.float64)
        with np.errstate(invalid="ignore"):
            p = np.exp(z - z[t] - result.nll[i]) if np.isfinite(z[t]) else _softmax(z)
        w = np.zeros(len(z)) if weight is None else weight
        extra += smooth * w.sum()
        gradient = p * (hit + extra) - smooth * w
        gradient[t] = hit * np.expm1(-result.nll[i]) + extra * p[t] - smooth * w[t]
        with np.errstate(over="ignore"):
            out[i] = gradient
    return result


def accumulate(logits, targets, weight=None, vocab_start=0, state=None):
    """The LseState of the classes from ``vocab_start`` on, merged to ``state``; targets count from class 0."""
    block = LseState.empty(len(logits))
    for i, t in enumerate(targets):
        if t == IGNORED:
            continue
        z = logits[i : i + 1][0].astype(np.float64)
        keep = np.arange(len(z)) != t - vocab_start
        others, peak = z[keep], z[keep].max(initial=-np.inf)
        w = np.zeros(len(others)) if weight is None else np.asarray(weight, np.float64)[keep]
        base = peak if np.isfinite(peak) else 0.0
        total = np.exp(others - base).sum() if peak < np.inf else np.nan
        gap = (w[w > 0] * (base - others[w > 0])).sum()
        block.columns[i, :7] = base, 0.0, total, 0.0, peak, gap, w.sum()
        if not keep.all():
            block.columns[i, 7:] = z[t - vocab_start], 1.0
    return block if state is None else state.merge(block)


def logsumexp(logits):
    """log sum exp of each row, float64 (N,)."""
    return np.array([_logsumexp(z.astype(np.float64)) for z in _each(logits)])


def log_softmax(logits, out):
    """z - logsumexp(z) of each row, written to ``out`` (N, V); the largest logit's from the sum of the others."""
    for z, row in zip(_each(logits), out, strict=True):
        z = z.astype(np.float64)
        largest = z.argmax()
        with np.errstate(invalid="ignore"):
            row[:] = (z - z[largest]) - _nll(z, largest)
    return out


def softmax(logits, out):
    """exp(z) / sum exp(z) of each row, written to ``out`` (N, V)."""
    for z, row in zip(_each(logits), out, strict=True):
        z = z.astype(np.float64)
        row[:] = _softmax(z)
    return out


def _each(logits):
    return (logits[i : i + 1][0] for i in range(len(logits)))


def _nll(z, t):
    """log(sum exp(z)) - z[t] = log(1 + sum of the other classes' exp(z - z[t])), in the range of exp."""
    others = np.delete(z, t)
    peak = others.max(initial=-np.inf)
    if peak == -np.inf:
        return 0.0 if np.isfinite(z[t]) else np.nan
    if not np.isfinite(peak) or z[t] == np.inf:
        return np.nan
    total = np.exp(others - peak).sum()
    if z[t] > peak:
        return np.log1p(total * np.exp(peak - z[t]))
    return (peak - z[t]) + np.log(total + np.exp(z[t] - peak))


def _gaps(z, t):
    """logsumexp(z) - z: from the target where that is largest, else from the largest of the others."""
    largest = t if z[t] >= z.max() else z.argmax()
    with np.errstate(invalid="ignore"):
        return _nll(z, largest) + (z[largest] - z)


def _logsumexp(z):
    largest = z.max()
    if not np.isfinite(largest):
        return largest
    return largest + _nll(z, z.argmax())


def _softmax(z):
    with np.errstate(invalid="ignore"):
        p = np.exp(z - z.max())
        return p / p.sum()
