"""The reference backend: float64 NumPy, obvious on sight. It is the oracle of the tests and never chosen by itself.

Rows of ``logits`` (N, V) with ``targets`` (N,) int64: a class index, IGNORED, ABSENT or LARGEST (`fastxent.state`).
"""

from typing import Any

import numpy as np

from fastxent import probmath, rowmath
from fastxent.state import IGNORED, LARGEST, LseState, RowScores, Statistics, in_block

_NOUGHT = np.zeros(1)


def why_unavailable():
    """None: NumPy is always there."""
    return None


@np.errstate(over="ignore")
def statistics(logits, targets, *, spread=None, softcap=None, temperature=1.0, wanted=()):
    """`fastxent.state.Statistics` of whole rows; with a `fastxent.state.Spread` the gap too.

    The logits in nats are softcap tanh(logits / softcap) / temperature, logits / temperature without a softcap.
    """
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    found = {name: getattr(result, name) for name in ("target_logit", "peak", "lse", "gap")}
    unit = temperature if softcap is None else temperature / softcap
    for i, t in enumerate(targets):
        numbers = {"target_logit": np.nan, "peak": np.nan, "lse": np.nan, "gap": 0.0}
        result.nll[i] = 0.0
        if t != IGNORED:
            z, _ = _in_nats(logits[i : i + 1][0], softcap, temperature)
            t = z.argmax() if t == LARGEST else t
            result.nll[i] = _nll(z, t)
            others = np.delete(z, t).max(initial=-np.inf)
            numbers = {
                "target_logit": z[t] * unit,
                "peak": others * unit,
                "lse": _logsumexp(z) if z.max() < np.inf else np.nan,
            }
            if spread is not None:
                share = _share(spread, i, len(z))
                numbers["gap"] = (share[share > 0] * _gaps(z, t)[share > 0]).sum()
        for name, array in found.items():
            if array.size:
                array[i] = numbers[name]
    return result


@np.errstate(over="ignore", invalid="ignore")  # a mean of rows without weight has infinite coefficients
def statistics_and_gradient(
    logits, targets, coefficients, out, *, spread=None, softcap=None, temperature=1.0, wanted=()
):
    """`statistics`, and to ``out`` (N, V) what `fastxent.state.Coefficients` says, times the slope of the softcap."""
    result = statistics(logits, targets, spread=spread, softcap=softcap, temperature=temperature, wanted=wanted)
    columns = [np.broadcast_to(column, len(logits)) for column in coefficients]
    for i, t in enumerate(targets):
        if t == IGNORED:
            out[i : i + 1] = np.zeros((1, out.shape[1]))
            continue
        hit, smooth, extra, square = (column[i] for column in columns)
        z, slope = _in_nats(logits[i : i + 1][0], softcap, temperature)
        t = z.argmax() if t == LARGEST else t
        nll, share = _nll(z, t), _share(spread, i, len(z))
        p = _softmax(z)
        others = np.delete(share, t).sum()
        extra += square * _logsumexp(z) if square else 0.0
        gradient = p * (hit + extra + smooth * (others + share[t])) - smooth * share
        gradient[t] = hit * np.expm1(-nll) + extra * p[t]
        if p[t] > 0.5:
            gradient[t] += smooth * (others + (others + share[t]) * np.expm1(-nll))
        else:
            gradient[t] += smooth * ((others + share[t]) * p[t] - share[t])
        out[i : i + 1] = gradient * slope
    return result


@np.errstate(over="ignore")
def accumulate(logits, targets, *, spread=None, vocab_start=0, state=None, softcap=None, temperature=1.0):
    """The LseState of the classes from ``vocab_start`` on, merged to ``state``; targets count from class 0."""
    block = LseState.empty(len(logits), softcap, temperature)
    unit = temperature if softcap is None else temperature / softcap
    for i, t in enumerate(in_block(targets, logits, vocab_start)):
        if t == IGNORED:
            continue
        z, _ = _in_nats(logits[i : i + 1][0], softcap, temperature)
        keep = np.arange(len(z)) != t
        others, peak = z[keep], z[keep].max(initial=-np.inf)
        w = _share(spread, i, len(z))[keep]
        base = peak if np.isfinite(peak) else 0.0
        total = np.exp(others - base).sum() if peak < np.inf else np.nan
        gap = (w[w > 0] * (base - others[w > 0])).sum()
        block.columns[i, :7] = base * unit, 0.0, total, 0.0, peak * unit, gap * unit, w.sum()
        if not keep.all():
            block.columns[i, 7:] = z[t] * unit, 1.0
    return block if state is None else state.merge(block)


@np.errstate(over="ignore", invalid="ignore")
def gradient(logits, targets, state, coefficients, out, *, spread=None, vocab_start=0, target_share=_NOUGHT):
    """To ``out`` what `fastxent.state.Coefficients` says of the classes from ``vocab_start`` on, times the slope of the
    softcap; ``state`` is that of all classes and ``target_share``, (N,) or (1,), the r of each row's target.
    """
    columns = [np.broadcast_to(column, len(logits)) for column in (*coefficients, target_share, state.nll())]
    lse, rate = state.lse(), rowmath.rate(np.float64, state.softcap, state.temperature)
    for i, t in enumerate(in_block(targets, logits, vocab_start)):
        if t == IGNORED:
            out[i : i + 1] = np.zeros((1, out.shape[1]))
            continue
        hit, smooth, extra, square, own_share, nll = (column[i] for column in columns)
        z, slope = _in_nats(logits[i : i + 1][0], state.softcap, state.temperature)
        others, extra = state["mass"][i], extra + (square * lse[i] if square else 0.0)
        base, exponent, total, peak, own = (
            state[name][i] for name in ("base", "exponent", "total", "peak", "target_logit")
        )
        above = rowmath.NUMPY_ROWS.excess(base, exponent, total, peak, own, nll, rate)
        p = np.exp((z - peak * rate[2]) - above) if np.isfinite(peak) else np.exp(z - lse[i])
        entries = p * (hit + extra + smooth * (others + own_share)) - smooth * _share(spread, i, len(z))
        if t >= 0:
            entries[t] = rowmath.NUMPY_ROWS.at_target(
                hit, smooth, extra, others, own_share, -np.expm1(-nll), np.exp(-nll)
            )
        out[i : i + 1] = entries * slope


def count(logits, levels):
    """How many logits of each row are above and level with its number in ``levels`` (N,): int64 (N, 2)."""
    rows = [logits[i : i + 1][0].astype(np.float64) for i in range(len(logits))]
    counts = [((x > level).sum(), (x == level).sum()) for x, level in zip(rows, levels, strict=True)]
    return np.array(counts, np.int64).reshape(-1, 2)


@np.errstate(over="ignore")
def score(logits, targets, *, ids=None, top_k=0, softcap=None, temperature=1.0):
    """`fastxent.state.RowScores` of whole rows, whose targets are class indices or IGNORED; ids (N, K) are the classes
    whose log-probabilities are wanted. Logits are ranked as they are stored.
    """
    ids = np.empty((len(logits), 0), np.int64) if ids is None else ids
    result = RowScores.allocate(len(logits), top_k, ids.shape[1])
    for i, t in enumerate(targets):
        x = logits[i : i + 1][0]
        z, _ = _in_nats(x, softcap, temperature)
        nll = 0.0 if t == IGNORED else _nll(z, t)
        found: dict[str, Any] = {"rank": 0, "rank_hi": 0, "argmax": -1, "top_ids": -1}
        if t != IGNORED and not np.isnan(nll):
            x, largest = x.astype(np.float64), x.argmax()
            log_p = -_gaps(z, largest)
            p, top = np.exp(log_p), np.argsort(-x, kind="stable")[:top_k]
            found = {
                "lse": _logsumexp(z),
                "entropy": -(p[p > 0] * log_p[p > 0]).sum(),
                "sum_p2": (p**2).sum(),
                "rank": 1 + (x > x[t]).sum(),
                "rank_hi": (x >= x[t]).sum(),
                "argmax": largest,
                "top_ids": top,
                "top_log_probs": log_p[top],
                "id_log_probs": log_p[ids[i]],
            }
        for name in RowScores._fields:
            getattr(result, name)[i] = nll if name == "nll" else found.get(name, np.nan)
    return result


def divergences(logits_p, logits_q, lse_p, lse_q):
    """KL(p || q) and JS(p, q) in nats of the rows of two arrays of logits, float64 (N,), given their logsumexps."""
    kl, js = np.empty((2, len(logits_p)))
    for i, (z, y) in enumerate(zip(_each(logits_p, 1.0), _each(logits_q, 1.0), strict=True)):
        with np.errstate(invalid="ignore"):
            log_p, log_q = z - lse_p[i], y - lse_q[i]
        distributions = np.exp(log_p), log_p, np.exp(log_q), log_q
        kl[i], js[i] = probmath.kl_divergence(*distributions)[0], probmath.js_divergence(*distributions)[0]
    return kl, js


def logsumexp(logits, *, temperature=1.0):
    """log sum exp of each row of logits / temperature in nats, float64 (N,)."""
    return np.array([_logsumexp(z) for z in _each(logits, temperature)])


def log_softmax(logits, out, *, temperature=1.0):
    """z - logsumexp(z) of each row, written to ``out`` (N, V); the largest logit's from the sum of the others."""
    for i, z in enumerate(_each(logits, temperature)):
        largest = z.argmax()
        with np.errstate(invalid="ignore", over="ignore"):
            out[i : i + 1] = (z - z[largest]) - _nll(z, largest)
    return out


def softmax(logits, out, *, temperature=1.0):
    """exp(z) / sum exp(z) of each row, written to ``out`` (N, V)."""
    for i, z in enumerate(_each(logits, temperature)):
        out[i : i + 1] = _softmax(z)
    return out


def binary(logits, targets, weight, pos_weight, label_smoothing, upstream, losses, gradient):
    """weight [pos_weight y log(1 + exp(-x)) + (1 - y) log(1 + exp(x))] of each logit x to ``losses``, y its target
    drawn towards 1/2; and the derivative by x, times ``upstream``, to ``gradient`` unless that has length 0.

    logits and targets (n,), weights and upstream (n,) or (1,); losses, weights and upstream float64; all contiguous.
    """
    x, y = logits.astype(np.float64), targets * (1 - label_smoothing) + 0.5 * label_smoothing
    positive, negative, q = pos_weight * y, 1 - y, np.exp(-np.abs(x))
    wrong = np.where(x < 0, positive, negative)
    with np.errstate(invalid="ignore"):
        loss = (positive + negative) * np.log1p(q) + wrong * np.where(wrong > 0, np.abs(x), 0.0)
        losses[:] = np.where(weight == 0, 0.0, weight * loss)
    if len(gradient):
        near, far = 1 / (1 + q), q / (1 + q)
        slope = negative * np.where(x < 0, far, near) - positive * np.where(x < 0, near, far)
        gradient[:] = upstream * weight * slope


def _each(logits, temperature):
    return (_in_nats(logits[i : i + 1][0], None, temperature)[0] for i in range(len(logits)))


def _in_nats(x, softcap, temperature):
    """A row's logits in nats and, but for 1 / temperature, their derivative."""
    x = x.astype(np.float64)
    if softcap is None:
        return x / float(temperature), 1.0
    q = np.exp(-2 * np.abs(x / softcap))
    return softcap * np.tanh(x / softcap) / temperature, 4 * q / (1 + q) ** 2


def _share(spread, i, classes):
    """weight_k (keep q_ik + even) of row ``i``; zeros where nothing is spread."""
    if spread is None:
        return np.zeros(classes)
    weight = np.broadcast_to(spread.weight, classes)
    if not spread.keep:
        return weight
    return weight * (spread.keep * spread.probabilities[i : i + 1][0].astype(np.float64) + spread.even)


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
    with np.errstate(invalid="ignore", over="ignore"):
        p = np.exp(z - z.max())
        return p / p.sum()
