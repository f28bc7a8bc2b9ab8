"""The kernels: rows in parallel, each in the hands of `rows`, or sixteen at once in those of `columns`.

Every kernel is compiled twice, parallel and serial (`twins`), from the one function here. A target is a class index,
or IGNORED (the row counts for nothing), or ABSENT (no class is left out).
"""

import numpy as np
from numba import prange

from fastxent.backends.cpu.columns import FEW, gradient_of_sixteen, statistics_of_sixteen
from fastxent.backends.cpu.formulas import add_gap, compiled, nll_of, with_target
from fastxent.backends.cpu.memory import load_some, store_some
from fastxent.backends.cpu.rows import (
    add_strips,
    factors_of_strips,
    finish_row,
    peak_of,
    scale_strips,
    sum_row,
    sum_strips,
)
from fastxent.backends.cpu.vector import LANES, widest_registers
from fastxent.state import ABSENT, IGNORED, STRIP


@compiled
def _ignore_row(i, nll, peak, gap):
    nll[i], peak[i] = 0.0, np.nan
    if gap is not None:
        gap[i] = 0.0


@compiled
def _statistics_row(row, target, weight, strips, to_sum, i, nll, peak, gap):
    if target == IGNORED:
        _ignore_row(i, nll, peak, gap)
        return
    if to_sum:
        sum_strips(row, target, weight, None, strips, 0, strips.shape[0])
    target_weight = np.float64(weight[target]) if weight is not None else 1.0
    finish_row(add_strips(strips), np.float64(row[target]), target_weight, i, nll, peak, gap)


@compiled
def _prepare_gradient(target_logit, target_weight, coefficients, strips, i, nll, peak, gap):
    """Finish a row's statistics, leave each strip's factor in strips[:, 0]; returns the target's own gradient."""
    hit, smooth, extra = coefficients[0], coefficients[1], coefficients[2]
    sums = add_strips(strips)
    finish_row(sums, target_logit, target_weight, i, nll, peak, gap)
    base, exponent, total = sums[0], sums[1], sums[2]
    top, whole, miss, own = with_target(base, exponent, total, target_logit)
    factors_of_strips(strips, base, top, (hit + extra) / whole)
    return extra * own - hit * miss - smooth * target_weight


@compiled
def _gradient_row(row, target, weight, coefficients, out, strips, i, nll, peak, gap):
    if target == IGNORED:
        out[:] = 0.0
        _ignore_row(i, nll, peak, gap)
        return
    target_logit = np.float64(row[target])
    target_weight = np.float64(weight[target]) if weight is not None else 1.0
    sum_strips(row, target, weight, out, strips, 0, strips.shape[0])
    own = _prepare_gradient(target_logit, target_weight, coefficients, strips, i, nll, peak, gap)
    scale_strips(out, weight, strips, 0, strips.shape[0], coefficients[1])
    out[target] = out.dtype.type(own)


@compiled
def _sum_segment(logits, targets, weight, out, strips, segments, task):
    i, part = task // segments, task % segments
    if targets[i] != IGNORED:
        first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
        if out is None:
            sum_strips(logits[i], targets[i], weight, None, strips[i], first, last)
        else:
            sum_strips(logits[i], targets[i], weight, out[i], strips[i], first, last)


@compiled
def _scale_segment(targets, weight, coefficients, out, strips, segments, task):
    i, part = task // segments, task % segments
    first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
    if targets[i] == IGNORED:
        out[i, first * STRIP : last * STRIP] = 0.0
    else:
        scale_strips(out[i], weight, strips[i], first, last, coefficients[i, 1])


def statistics(logits, targets, weight, segments, strips, nll, peak, gap):
    """(N, V) logits read once -> nll, peak of the other classes and, with class weights, gap: float64 (N,).

    strips (N, n, 6) is scratch. A row is cut into ``segments`` runs of strips, summed in parallel; 1 for many rows.
    """
    if weight is None and logits.shape[1] <= FEW:
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            statistics_of_sixteen(logits, targets, group, nll, peak)
        return
    if segments == 1:
        for i in prange(logits.shape[0]):
            _statistics_row(logits[i], targets[i], weight, strips[i], True, i, nll, peak, gap)
        return
    for task in prange(logits.shape[0] * segments):
        _sum_segment(logits, targets, weight, None, strips, segments, task)
    for i in range(logits.shape[0]):
        _statistics_row(logits[i], targets[i], weight, strips[i], False, i, nll, peak, gap)


def statistics_and_gradient(logits, targets, weight, coefficients, out, segments, strips, nll, peak, gap):
    """As `statistics`, and out (N, V) written: p_k (hit + extra) - smooth w_k, on the target from 1 - p_t.

    A row is read once from memory; its terms wait in ``out`` and are scaled while they are in the cache, unless it is
    cut into segments: then all are summed before any is scaled. coefficients (N, 3): hit, smooth, extra.
    """
    if weight is None and logits.shape[1] <= FEW:
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            gradient_of_sixteen(logits, targets, coefficients, out, group, nll, peak)
        return
    if segments == 1:
        for i in prange(logits.shape[0]):
            _gradient_row(logits[i], targets[i], weight, coefficients[i], out[i], strips[i], i, nll, peak, gap)
        return
    for i in range(logits.shape[0]):
        if targets[i] != IGNORED:
            nll[i] = np.float64(logits[i, targets[i]])  # kept here: its place may be the first term's
    for task in prange(logits.shape[0] * segments):
        _sum_segment(logits, targets, weight, out, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] == IGNORED:
            _ignore_row(i, nll, peak, gap)
        else:
            own = np.float64(weight[targets[i]]) if weight is not None else 1.0
            strips[i, 0, 1] = _prepare_gradient(nll[i], own, coefficients[i], strips[i], i, nll, peak, gap)
    for task in prange(logits.shape[0] * segments):
        _scale_segment(targets, weight, coefficients, out, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] != IGNORED:
            out[i, targets[i]] = strips[i, 0, 1]


def accumulate(logits, targets, weight, strips, columns):
    """A block's sums added to ``columns`` (N, 9), in the order of `fastxent.state.FIELDS`."""
    for i in prange(logits.shape[0]):
        _accumulate_row(logits[i], targets[i], weight, strips[i], columns[i])


@compiled
def _accumulate_row(row, target, weight, strips, state):
    if target == IGNORED:
        return
    sums = sum_row(row, target, weight, None, strips, (state[0], state[1], state[2], state[3]))
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


def logsumexp(logits, strips, lse):
    """(N, V) -> (N,) float64."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        excess = _log_sum(row, sum_row(row, largest, None, None, strips[i]), largest)
        lse[i] = excess if np.isinf(excess) else np.float64(row[largest]) + excess


@compiled
def _shift_row(row, out, largest, excess):
    widest_registers()
    peak = row[largest]
    for j in range(0, row.shape[0], LANES):
        count = min(row.shape[0] - j, LANES)
        store_some(out, j, count, (load_some(row, j, count, -1, 0.0) - peak) - row.dtype.type(excess))


def log_softmax(logits, strips, out):
    """(N, V) -> out (N, V): (x - largest) - log1p(others / largest), two positive losses that cannot cancel."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        sums = sum_row(row, largest, None, None, strips[i])
        _shift_row(row, out[i], largest, nll_of(sums[0], sums[1], sums[2], np.float64(row[largest])))


def softmax(logits, strips, out):
    """(N, V) -> out (N, V), the largest probability from the sum of the others."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        peak = np.float64(row[largest])
        base, exponent, total, _, _, _, _ = sum_row(row, largest, None, out[i], strips[i])
        top, whole, _, own = with_target(base, exponent, total, peak)
        factors_of_strips(strips[i], base, top, 1.0 / whole)
        scale_strips(out[i], None, strips[i], 0, strips.shape[1], 0.0)
        out[i, largest] = own
