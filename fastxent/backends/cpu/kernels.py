"""The kernels: rows in parallel, each in the hands of `rows`, or sixteen at once in those of `columns`.

Every kernel is compiled twice, parallel and serial (`twins`), from the one function here. A target is a class index,
or one of the marks of `fastxent.state`: IGNORED (the row counts for nothing), ABSENT (no class is left out), LARGEST
(the first of the largest logits). Logits may be stand-ins for a format Numba does not know (`formats`).
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from fastxent.backends.cpu.columns import FEW, gradient_of_sixteen, statistics_of_sixteen
from fastxent.backends.cpu.formats import as_real, waiting_room
from fastxent.backends.cpu.formulas import add_gap, compiled, excess, inlined, nll_of, whole_gap, with_target
from fastxent.backends.cpu.memory import load_some, store_one, store_some
from fastxent.backends.cpu.rows import (
    add_strips,
    factors_of_strips,
    load_one,
    peak_of,
    sum_strips,
    write_strip,
)
from fastxent.backends.cpu.vector import LANES, lanes_of, widest_registers
from fastxent.state import ABSENT, IGNORED, LARGEST, STRIP


class Scaling(NamedTuple):
    """`fastxent.rowmath.rate` in the type the logits are computed with, and in float64 for what belongs to a row.

    Flat, because a parallel loop takes no tuple within a tuple.
    """

    high: np.floating
    low: np.floating
    nats: np.floating
    row_high: np.float64
    row_low: np.float64
    row_nats: np.float64


class Shares(NamedTuple):
    """What each class weighs in the part of the loss that is spread over classes: weight_k (keep q_k + even).

    weight (V,) float64, of length 0 where nothing is spread; probabilities q (N, V), not looked at where keep is 0.
    """

    weight: np.ndarray
    probabilities: np.ndarray
    keep: float
    even: float


class Results(NamedTuple):
    """`fastxent.state.Statistics` as the kernels take it: float64 (N,), gap of length 0 where nothing is spread."""

    nll: np.ndarray
    target_logit: np.ndarray
    peak: np.ndarray
    gap: np.ndarray


@inlined
def _rate(scaling):
    return scaling.high, scaling.low, scaling.nats


@inlined
def _row_rate(scaling):
    return scaling.row_high, scaling.row_low, scaling.row_nats


@compiled
def _first_largest(row):
    """The index of the largest logit, the lowest of equals; 0 when every logit is NaN."""
    peak = peak_of(row, np.int64(0), row.shape[0], np.int64(ABSENT))
    for j in range(row.shape[0]):
        if load_one(row, j) == peak:
            return j
    return 0


@compiled
def _resolve(row, target):
    return _first_largest(row) if target == LARGEST else target


@compiled
def _ignore_row(i, results):
    results.nll[i], results.target_logit[i], results.peak[i] = 0.0, np.nan, np.nan
    if results.gap.size > 0:
        results.gap[i] = 0.0


@compiled
def _share_of(shares, i, k):
    share = shares.weight[k]
    if shares.keep != 0.0:
        share *= shares.keep * np.float64(shares.probabilities[i, k]) + shares.even
    return share


@compiled
def _finish_row(sums, target_logit, share, rate, i, results):
    """A row's statistics from its sums: nll = lse - z_t, and gap = sum of r (lse - z) over all classes."""
    base, exponent, total, _, top, gap, mass = sums
    nll = nll_of(base, exponent, total, target_logit, rate)
    results.nll[i], results.target_logit[i], results.peak[i] = nll, target_logit, top
    if results.gap.size > 0:
        over = excess(base, exponent, total, top, target_logit, nll, rate) if top > -np.inf else 0.0
        results.gap[i] = whole_gap(gap, mass, over, share, nll, rate)


@compiled
def _statistics_row(row, target, shares, scaling, strips, i, results):
    target = _resolve(row, target)
    if target == IGNORED:
        _ignore_row(i, results)
        return
    sum_strips(row, target, shares, i, None, strips, np.int64(0), strips.shape[0], _rate(scaling))
    _finish_statistics(row, target, shares, scaling, strips, i, results)


@compiled
def _finish_statistics(row, target, shares, scaling, strips, i, results):
    share = _share_of(shares, i, target) if shares.weight.size > 0 else 0.0
    sums = add_strips(strips, _row_rate(scaling))
    _finish_row(sums, load_one(row, target), share, _row_rate(scaling), i, results)


@compiled
def _prepare_gradient(target_logit, share, coefficients, rate, strips, i, results):
    """Finish a row's statistics, leave each strip's factor in strips[:, 0]; returns the target's own gradient."""
    hit, smooth, extra = coefficients[0], coefficients[1], coefficients[2]
    sums = add_strips(strips, rate)
    _finish_row(sums, target_logit, share, rate, i, results)
    base, exponent, total, mass = sums[0], sums[1], sums[2], sums[6]
    extra += smooth * (mass + share)
    top, whole, miss, own = with_target(base, exponent, total, target_logit, rate)
    factors_of_strips(strips, base, top, (hit + extra) / whole, rate)
    return extra * own - hit * miss - smooth * share


@compiled
def _gradient_row(row, target, shares, coefficients, scaling, out, strips, i, results):
    target = _resolve(row, target)
    if target == IGNORED:
        _write_nothing(out, np.int64(0), out.shape[0])
        _ignore_row(i, results)
        return
    target_logit = load_one(row, target)
    share = _share_of(shares, i, target) if shares.weight.size > 0 else 0.0
    terms = waiting_room(row, out)
    sum_strips(row, target, shares, i, terms, strips, np.int64(0), strips.shape[0], _rate(scaling))
    own = _prepare_gradient(target_logit, share, coefficients, _row_rate(scaling), strips, i, results)
    _write_strips(row, terms, out, shares, i, strips, np.int64(0), strips.shape[0], _rate(scaling), coefficients[1])
    store_one(out, target, own)


@compiled
def _write_strips(row, terms, out, shares, i, strips, first, last, rate, smooth):
    for s in range(first, last):
        stop = min(row.shape[0], (s + 1) * STRIP)
        write_strip(row, terms, out, shares, i, s * STRIP, stop, strips[s], rate, -smooth)


@compiled
def _write_nothing(out, start, stop):
    for j in range(start, stop, LANES):
        store_some(out, j, stop - j, lanes_of(np.float32(0)))


@compiled
def _sum_segment(logits, targets, shares, rate, out, strips, segments, task):
    i, part = task // segments, task % segments
    if targets[i] != IGNORED:
        first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
        if out is None:
            sum_strips(logits[i], targets[i], shares, i, None, strips[i], first, last, rate)
        else:
            terms = waiting_room(logits[i], out[i])
            sum_strips(logits[i], targets[i], shares, i, terms, strips[i], first, last, rate)


@compiled
def _write_segment(logits, targets, shares, coefficients, rate, out, strips, segments, task):
    i, part = task // segments, task % segments
    first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
    if targets[i] == IGNORED:
        _write_nothing(out[i], first * STRIP, min(out.shape[1], last * STRIP))
    else:
        terms = waiting_room(logits[i], out[i])
        _write_strips(logits[i], terms, out[i], shares, i, strips[i], first, last, rate, coefficients[i, 1])


@compiled
def _by_sixteen(logits, shares):
    return shares.weight.size == 0 and logits.shape[1] <= FEW


def statistics(logits, targets, shares, scaling, segments, strips, results):
    """(N, V) logits read once -> `Results`.

    strips (N, n, 6) is scratch. A row is cut into ``segments`` runs of strips, summed in parallel; 1 for many rows.
    """
    if _by_sixteen(logits, shares):
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            statistics_of_sixteen(logits, targets, _rate(scaling), _row_rate(scaling), group, results)
        return
    if segments == 1:
        for i in prange(logits.shape[0]):
            _statistics_row(logits[i], targets[i], shares, scaling, strips[i], i, results)
        return
    for task in prange(logits.shape[0] * segments):
        _sum_segment(logits, targets, shares, _rate(scaling), None, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] == IGNORED:
            _ignore_row(i, results)
        else:
            _finish_statistics(logits[i], targets[i], shares, scaling, strips[i], i, results)


def statistics_and_gradient(logits, targets, shares, coefficients, scaling, out, segments, strips, results):
    """As `statistics`, and out (N, V) written: p_k (hit + extra + smooth R) - smooth r_k, on the target from 1 - p_t.

    A row is read once from memory; its terms wait in ``out`` and are scaled while they are in the cache, unless it is
    cut into segments: then all are summed before any is scaled. Where ``out`` cannot hold them the logits are looked
    at again. coefficients (N, 3): hit, smooth, extra; R is the sum of the shares r.
    """
    if _by_sixteen(logits, shares):
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            gradient_of_sixteen(logits, targets, coefficients, _rate(scaling), _row_rate(scaling), out, group, results)
        return
    if segments == 1:
        for i in prange(logits.shape[0]):
            _gradient_row(logits[i], targets[i], shares, coefficients[i], scaling, out[i], strips[i], i, results)
        return
    for i in range(logits.shape[0]):
        if targets[i] != IGNORED:
            results.target_logit[i] = load_one(logits[i], targets[i])  # kept: its place may be the first term's
    for task in prange(logits.shape[0] * segments):
        _sum_segment(logits, targets, shares, _rate(scaling), out, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] == IGNORED:
            _ignore_row(i, results)
        else:
            own = _share_of(shares, i, targets[i]) if shares.weight.size > 0 else 0.0
            strips[i, 0, 1] = _prepare_gradient(
                results.target_logit[i], own, coefficients[i], _row_rate(scaling), strips[i], i, results
            )
    for task in prange(logits.shape[0] * segments):
        _write_segment(logits, targets, shares, coefficients, _rate(scaling), out, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] != IGNORED:
            store_one(out[i], targets[i], strips[i, 0, 1])


def accumulate(logits, targets, shares, scaling, strips, columns):
    """A block's sums added to ``columns`` (N, 9), in the order of `fastxent.state.FIELDS`."""
    for i in prange(logits.shape[0]):
        _accumulate_row(logits[i], targets[i], shares, scaling, strips[i], i, columns[i])


@compiled
def _accumulate_row(row, target, shares, scaling, strips, i, state):
    if target == IGNORED:
        return
    sum_strips(row, target, shares, i, None, strips, np.int64(0), strips.shape[0], _rate(scaling))
    sums = add_strips(strips, _row_rate(scaling), (state[0], state[1], state[2], state[3]))
    state[0], state[1], state[2], state[3], peak, gap, mass = sums
    state[4], state[5], state[6] = add_gap(state[4], state[5], state[6], peak, gap, mass)
    if target >= 0:
        state[7] = load_one(row, target)
        state[8] += 1.0


@compiled
def _shift_row(row, out, largest, rate, excess):
    widest_registers()
    peak, unit = as_real(row, load_one(row, largest)), as_real(row, rate[2])
    for j in range(0, row.shape[0], LANES):
        count = min(row.shape[0] - j, LANES)
        store_some(out, j, count, (load_some(row, j, count, -1, 0.0) - peak) * unit - as_real(row, excess))


@compiled
def _log_softmax_row(row, shares, scaling, strips, i, out):
    largest = _first_largest(row)
    sum_strips(row, largest, shares, i, None, strips, np.int64(0), strips.shape[0], _rate(scaling))
    sums = add_strips(strips, _row_rate(scaling))
    excess = nll_of(sums[0], sums[1], sums[2], load_one(row, largest), _row_rate(scaling))
    _shift_row(row, out, largest, _row_rate(scaling), excess)


def log_softmax(logits, shares, scaling, strips, out):
    """(N, V) -> out (N, V): (x - largest) - log1p(others / largest), two positive losses that cannot cancel."""
    for i in prange(logits.shape[0]):
        _log_softmax_row(logits[i], shares, scaling, strips[i], i, out[i])
