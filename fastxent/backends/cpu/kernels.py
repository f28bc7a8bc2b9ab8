"""The kernels: rows in parallel, each in the hands of `rows`, or sixteen at once in those of `columns`.

Every kernel is compiled twice, parallel and serial (`twins`), from the one function here. A target is a class index,
or IGNORED (the row counts for nothing), or ABSENT (no class is left out).
"""

import numpy as np
from numba import prange

from fastxent.backends.cpu.columns import FEW, gradient_of_sixteen, statistics_of_sixteen
from fastxent.backends.cpu.formulas import add_gap, compiled, nll_of, with_target
from fastxent.backends.cpu.memory import load_some, store_some
from fastxent.backends.cpu.rows import finish_row, peak_of, scale_terms, sum_row
from fastxent.backends.cpu.vector import LANES, widest_registers
from fastxent.state import ABSENT, IGNORED


@compiled
def _statistics_row(row, target, weight, i, nll, peak, gap):
    if target == IGNORED:
        nll[i], peak[i] = 0.0, np.nan
        if gap is not None:
            gap[i] = 0.0
        return
    sums = sum_row(row, target, weight, None, None)
    target_weight = np.float64(weight[target]) if weight is not None else 1.0
    finish_row(sums, np.float64(row[target]), target_weight, i, nll, peak, gap)


@compiled
def _gradient_row(row, target, weight, hit, smooth, extra, out, references, i, nll, peak, gap):
    if target == IGNORED:
        out[:] = 0.0
        nll[i], peak[i] = 0.0, np.nan
        if gap is not None:
            gap[i] = 0.0
        return
    target_logit = np.float64(row[target])
    target_weight = np.float64(weight[target]) if weight is not None else 1.0
    sums = sum_row(row, target, weight, out, references)
    finish_row(sums, target_logit, target_weight, i, nll, peak, gap)
    base, exponent, total = sums[0], sums[1], sums[2]
    top, whole, miss, own = with_target(base, exponent, total, target_logit)
    scale_terms(out, weight, references, base, top, (hit + extra) / whole, smooth)
    out[target] = out.dtype.type(extra * own - hit * miss - smooth * target_weight)


def statistics(logits, targets, weight, nll, peak, gap):
    """(N, V) logits read once -> nll, peak of the other classes and, with class weights, gap: float64 (N,)."""
    if weight is None and logits.shape[1] <= FEW:
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            statistics_of_sixteen(logits, targets, group, nll, peak)
        return
    for i in prange(logits.shape[0]):
        _statistics_row(logits[i], targets[i], weight, i, nll, peak, gap)


def statistics_and_gradient(logits, targets, weight, coefficients, out, references, nll, peak, gap):
    """As `statistics`, and out (N, V) written: p_k (hit + extra) - smooth w_k, on the target from 1 - p_t.

    The row is read once from memory; its terms wait in ``out`` and are scaled while they are in the cache.
    coefficients (N, 3): hit, smooth, extra; references (N, strips, 2) is scratch.
    """
    if weight is None and logits.shape[1] <= FEW:
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            gradient_of_sixteen(logits, targets, coefficients, out, group, nll, peak)
        return
    for i in prange(logits.shape[0]):
        hit, smooth, extra = coefficients[i, 0], coefficients[i, 1], coefficients[i, 2]
        _gradient_row(logits[i], targets[i], weight, hit, smooth, extra, out[i], references[i], i, nll, peak, gap)


def accumulate(logits, targets, weight, columns):
    """A block's sums added to ``columns`` (N, 9), in the order of `fastxent.state.FIELDS`."""
    for i in prange(logits.shape[0]):
        _accumulate_row(logits[i], targets[i], weight, columns[i])


@compiled
def _accumulate_row(row, target, weight, state):
    if target == IGNORED:
        return
    sums = sum_row(row, target, weight, None, None, (state[0], state[1], state[2], state[3]))
    state[0], state[1], state[2], state[3], peak, gap, mass = sums
    state[4], state[5], state[6] = add_gap(state[4], state[5], state[6], peak, gap, mass)
    if target >= 0:
        state[7] = np.float64(row[target])
        state[8] += 1.0


@compiled
def _first_largest(row):
    """The index of the largest logit, the lowest of equals; 0 when every logit is NaN."""
    peak = peak_of(row, 0, row.shape[0], ABSENT)
    for j in range(row.shape[0]):
        if row[j] == peak:
            return j
    return 0


@compiled
def _has_nan(row):
    for j in range(row.shape[0]):
        if row[j] != row[j]:
            return True
    return False


@compiled
def _log_sum(row, sums, largest):
    """log(sum exp(row)) - row[largest]; +inf stays +inf, and nothing else hides a NaN."""
    if row[largest] == np.inf and not _has_nan(row):
        return np.inf
    if row[largest] == -np.inf and sums[2] == 0.0:
        return -np.inf
    return nll_of(sums[0], sums[1], sums[2], np.float64(row[largest]))


def logsumexp(logits, lse):
    """(N, V) -> (N,) float64."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        excess = _log_sum(row, sum_row(row, largest, None, None, None), largest)
        lse[i] = excess if np.isinf(excess) else np.float64(row[largest]) + excess


@compiled
def _shift_row(row, out, largest, excess):
    widest_registers()
    peak = row[largest]
    for j in range(0, row.shape[0], LANES):
        count = min(row.shape[0] - j, LANES)
        store_some(out, j, count, (load_some(row, j, count, -1, 0.0) - peak) - row.dtype.type(excess))


def log_softmax(logits, out):
    """(N, V) -> out (N, V): (x - largest) - log1p(others / largest), two positive losses that cannot cancel."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        sums = sum_row(row, largest, None, None, None)
        _shift_row(row, out[i], largest, nll_of(sums[0], sums[1], sums[2], np.float64(row[largest])))


def softmax(logits, out, references):
    """(N, V) -> out (N, V), the largest probability from the sum of the others."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        peak = np.float64(row[largest])
        base, exponent, total, _, _, _, _ = sum_row(row, largest, None, out[i], references[i])
        top, whole, _, own = with_target(base, exponent, total, peak)
        scale_terms(out[i], None, references[i], base, top, 1.0 / whole, 0.0)
        out[i, largest] = own
