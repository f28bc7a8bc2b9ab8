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
from fastxent.backends.cpu.formulas import (
    add_gap,
    at_target,
    compiled,
    excess,
    inlined,
    lse_of,
    nll_of,
    whole_gap,
    with_target,
)
from fastxent.backends.cpu.memory import load_some, row_of, store_one, store_some
from fastxent.backends.cpu.rows import (
    add_strips,
    capped_one,
    factors_of_strips,
    first_of,
    load_one,
    peak_of,
    sum_strips,
    write_strip,
)
from fastxent.backends.cpu.vector import LANES, lanes_of, widest_registers
from fastxent.state import ABSENT, IGNORED, LARGEST, STRIP


class Scaling(NamedTuple):
    """`fastxent.rowmath.rate` in the type the logits are computed with, and in float64 for what belongs to a row.

    ``cap`` is 1 / softcap, 0 without: the logits are then tanh(cap x). Flat, because a parallel loop takes no tuple
    within a tuple.
    """

    high: np.floating
    low: np.floating
    nats: np.floating
    cap: np.floating
    row_high: np.float64
    row_low: np.float64
    row_nats: np.float64


class Shares(NamedTuple):
    """What each class weighs in the part of the loss that is spread over classes: weight_k (keep q_k + even).

    weight (V,) float64, or (1,) where all classes weigh the same, of length 0 where nothing is spread; probabilities q
    (N, V), not looked at where keep is 0.
    """

    weight: np.ndarray
    probabilities: np.ndarray
    keep: float
    even: float


class Coefficients(NamedTuple):
    """`fastxent.state.Coefficients` as float64 (N,), or (1,) where all rows have the same.

    ``square`` is looked at only where the results have room for lse.
    """

    hit: np.ndarray
    smooth: np.ndarray
    extra: np.ndarray
    square: np.ndarray


class Results(NamedTuple):
    """`fastxent.state.Statistics` as the kernels take it: float64 (N,), of length 0 where it is not wanted."""

    nll: np.ndarray
    target_logit: np.ndarray
    peak: np.ndarray
    lse: np.ndarray
    gap: np.ndarray


@inlined
def _row_rate(scaling):
    return scaling.row_high, scaling.row_low, scaling.row_nats


@inlined
def _of_row(values, i):
    if values.size == 1:
        return values[0]
    return values[i]


@compiled
def _first_largest(row):
    """The index of the largest logit, the lowest of equals; 0 when every logit is NaN."""
    peak = peak_of(row, np.int64(0), row.shape[0], np.int64(ABSENT))
    return max(0, first_of(row, peak, np.int64(0), row.shape[0]))


@inlined
def _resolve(row, target):
    return _first_largest(row) if target == LARGEST else target


@inlined
def _ignore_row(i, results):
    results.nll[i] = 0.0
    if results.target_logit.size > 0:
        results.target_logit[i] = np.nan
    if results.peak.size > 0:
        results.peak[i] = np.nan
    if results.lse.size > 0:
        results.lse[i] = np.nan
    if results.gap.size > 0:
        results.gap[i] = 0.0


@inlined
def _share_of(shares, i, k):
    if shares.weight.size == 0:
        return 0.0
    share = shares.weight[k if shares.weight.size > 1 else 0]
    if shares.keep != 0.0:
        share *= shares.keep * np.float64(shares.probabilities[i, k]) + shares.even
    return share


@inlined
def _finish_row(sums, target_logit, share, rate, i, results):
    """What was asked for of a row from its sums, but for the lse; the row's nll."""
    base, exponent, total, _, top, gap, mass = sums
    nll = nll_of(base, exponent, total, target_logit, rate)
    results.nll[i] = nll
    if results.target_logit.size > 0:
        results.target_logit[i] = target_logit
    if results.peak.size > 0:
        results.peak[i] = top
    if results.gap.size > 0:
        beyond = excess(base, exponent, total, top, target_logit, nll, rate) if top > -np.inf else 0.0
        results.gap[i] = whole_gap(gap, mass, beyond, share, nll, rate)
    return nll


@inlined
def _statistics_row(row, target, shares, scaling, strips, i, results):
    target = _resolve(row, target)
    if target == IGNORED:
        _ignore_row(i, results)
        return
    sum_strips(row, target, shares, i, None, strips, np.int64(0), strips.shape[0], scaling)
    _finish_statistics(row, target, shares, scaling, strips, i, results)


@inlined
def _finish_statistics(row, target, shares, scaling, strips, i, results):
    rate = _row_rate(scaling)
    sums = add_strips(strips, rate)
    target_logit, _ = capped_one(row, target, scaling.cap)
    nll = _finish_row(sums, target_logit, _share_of(shares, i, target), rate, i, results)
    if results.lse.size > 0:
        over, whole, _, _ = with_target(sums[0], sums[1], sums[2], target_logit, rate)
        results.lse[i] = lse_of(sums[0], over, whole, target_logit, nll, rate)


@inlined
def _prepare_gradient(target_logit, share, coefficients, rate, strips, i, results):
    """Finish a row's statistics, leave each strip's factor in strips[:, 0]; the target's own gradient."""
    hit, smooth = _of_row(coefficients.hit, i), _of_row(coefficients.smooth, i)
    extra, square = _of_row(coefficients.extra, i), _of_row(coefficients.square, i)
    sums = add_strips(strips, rate)
    nll = _finish_row(sums, target_logit, share, rate, i, results)
    over, whole, miss, own = with_target(sums[0], sums[1], sums[2], target_logit, rate)
    if results.lse.size > 0:
        results.lse[i] = lse_of(sums[0], over, whole, target_logit, nll, rate)
        extra += square * results.lse[i] if square != 0.0 else 0.0
    mass = sums[6]
    factors_of_strips(strips, sums[0], over, (hit + extra + smooth * (mass + share)) / whole, rate)
    return at_target(hit, smooth, extra, mass, share, miss, own)


@inlined
def _gradient_row(row, target, shares, coefficients, scaling, out, strips, i, results):
    target = _resolve(row, target)
    if target == IGNORED:
        _write_nothing(out, np.int64(0), out.shape[0])
        _ignore_row(i, results)
        return
    target_logit, slope = capped_one(row, target, scaling.cap)
    terms = waiting_room(row, out)
    sum_strips(row, target, shares, i, terms, strips, np.int64(0), strips.shape[0], scaling)
    share = _share_of(shares, i, target)
    own = _prepare_gradient(target_logit, share, coefficients, _row_rate(scaling), strips, i, results)
    _write_strips(row, terms, out, shares, coefficients, i, strips, np.int64(0), strips.shape[0], scaling)
    store_one(out, target, own * slope)


@inlined
def _write_strips(row, terms, out, shares, coefficients, i, strips, first, last, scaling):
    for s in range(first, last):
        stop = min(row.shape[0], (s + 1) * STRIP)
        shift = -_of_row(coefficients.smooth, i)
        write_strip(row, terms, out, shares, i, s * STRIP, stop, strips[s], scaling, shift)


@compiled
def _write_nothing(out, start, stop):
    for j in range(start, stop, LANES):
        store_some(out, j, stop - j, lanes_of(np.float32(0)))


@compiled
def _sum_segment(logits, classes, targets, shares, scaling, out, strips, segments, task):
    i, part = task // segments, task % segments
    if targets[i] != IGNORED:
        first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
        if out is None:
            sum_strips(row_of(logits, i, classes), targets[i], shares, i, None, strips[i], first, last, scaling)
        else:
            terms = waiting_room(row_of(logits, i, classes), row_of(out, i, classes))
            sum_strips(row_of(logits, i, classes), targets[i], shares, i, terms, strips[i], first, last, scaling)


@compiled
def _write_segment(logits, classes, targets, shares, coefficients, scaling, out, strips, segments, task):
    i, part = task // segments, task % segments
    first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
    if targets[i] == IGNORED:
        _write_nothing(row_of(out, i, classes), first * STRIP, min(classes, last * STRIP))
    else:
        terms = waiting_room(row_of(logits, i, classes), row_of(out, i, classes))
        _write_strips(
            row_of(logits, i, classes),
            terms,
            row_of(out, i, classes),
            shares,
            coefficients,
            i,
            strips[i],
            first,
            last,
            scaling,
        )


def statistics(logits, classes, targets, shares, scaling, segments, strips, results):
    """(N, V) logits, the first ``classes`` columns of a matrix, read once -> `Results`.

    strips (N, n, 8) is scratch. A row is cut into ``segments`` runs of strips, summed in parallel; 1 for many rows.
    """
    if classes <= FEW:
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            statistics_of_sixteen(logits, targets, shares, scaling, group, results)
        return
    if segments == 1:
        for i in prange(logits.shape[0]):
            _statistics_row(row_of(logits, i, classes), targets[i], shares, scaling, strips[i], i, results)
        return
    for task in prange(logits.shape[0] * segments):
        _sum_segment(logits, classes, targets, shares, scaling, None, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] == IGNORED:
            _ignore_row(i, results)
        else:
            _finish_statistics(row_of(logits, i, classes), targets[i], shares, scaling, strips[i], i, results)


def statistics_and_gradient(logits, classes, targets, shares, coefficients, scaling, out, segments, strips, results):
    """As `statistics`, and as many columns of out written: what `fastxent.state.Coefficients` says, times the slope of
    a softcap.

    A row is read once from memory; its terms wait in ``out`` and are scaled while they are in the cache, unless it is
    cut into segments: then all are summed before any is scaled. Where ``out`` cannot hold them the logits are looked
    at again.
    """
    if classes <= FEW:
        for group in prange((logits.shape[0] + LANES - 1) // LANES):
            gradient_of_sixteen(logits, targets, shares, coefficients, scaling, out, group, results)
        return
    if segments == 1:
        for i in prange(logits.shape[0]):
            _gradient_row(
                row_of(logits, i, classes),
                targets[i],
                shares,
                coefficients,
                scaling,
                row_of(out, i, classes),
                strips[i],
                i,
                results,
            )
        return
    for i in range(logits.shape[0]):
        if targets[i] != IGNORED:  # kept: the first term may take the target's place
            strips[i, 0, 6], strips[i, 0, 7] = capped_one(row_of(logits, i, classes), targets[i], scaling.cap)
    for task in prange(logits.shape[0] * segments):
        _sum_segment(logits, classes, targets, shares, scaling, out, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] == IGNORED:
            _ignore_row(i, results)
        else:
            share = _share_of(shares, i, targets[i])
            own = _prepare_gradient(strips[i, 0, 6], share, coefficients, _row_rate(scaling), strips[i], i, results)
            strips[i, 0, 6] = own * strips[i, 0, 7]
    for task in prange(logits.shape[0] * segments):
        _write_segment(logits, classes, targets, shares, coefficients, scaling, out, strips, segments, task)
    for i in range(logits.shape[0]):
        if targets[i] != IGNORED:
            store_one(row_of(out, i, classes), targets[i], strips[i, 0, 6])


def accumulate(logits, classes, targets, shares, scaling, strips, columns):
    """A block's sums added to ``columns`` (N, 9), in the order of `fastxent.state.FIELDS`."""
    for i in prange(logits.shape[0]):
        _accumulate_row(row_of(logits, i, classes), targets[i], shares, scaling, strips[i], i, columns[i])


@compiled
def _accumulate_row(row, target, shares, scaling, strips, i, state):
    if target == IGNORED:
        return
    sum_strips(row, target, shares, i, None, strips, np.int64(0), strips.shape[0], scaling)
    sums = add_strips(strips, _row_rate(scaling), (state[0], state[1], state[2], state[3]))
    state[0], state[1], state[2], state[3], peak, gap, mass = sums
    state[4], state[5], state[6] = add_gap(state[4], state[5], state[6], peak, gap, mass)
    if target >= 0:
        state[7], _ = capped_one(row, target, scaling.cap)
        state[8] += 1.0


class Whole(NamedTuple):
    """Of whole rows, whose block of classes the gradient is wanted of, float64 (N,): their sum's base and exponent,
    what each exponential is multiplied by, and what the target's entry is but for the slope; smooth as in
    `Coefficients`.
    """

    base: np.ndarray
    exponent: np.ndarray
    factor: np.ndarray
    own: np.ndarray
    smooth: np.ndarray


def gradient(logits, classes, targets, shares, whole, scaling, out, strips):
    """out (N, V) of a block of classes: what `fastxent.state.Coefficients` says, times the slope of a softcap.

    The block is read once, its terms wait in ``out`` as in `statistics_and_gradient`.
    """
    for i in prange(logits.shape[0]):
        _block_gradient_row(
            row_of(logits, i, classes), targets[i], shares, whole, scaling, row_of(out, i, classes), strips[i], i
        )


@compiled
def _block_gradient_row(row, target, shares, whole, scaling, out, strips, i):
    if target == IGNORED:
        _write_nothing(out, np.int64(0), out.shape[0])
        return
    slope = capped_one(row, target, scaling.cap)[1] if target >= 0 else 0.0
    sum_strips(row, target, shares, i, waiting_room(row, out), strips, np.int64(0), strips.shape[0], scaling)
    factors_of_strips(strips, whole.base[i], whole.exponent[i], whole.factor[i], _row_rate(scaling))
    _write_strips(row, waiting_room(row, out), out, shares, whole, i, strips, np.int64(0), strips.shape[0], scaling)
    if target >= 0:
        store_one(out, target, whole.own[i] * slope)


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
    sum_strips(row, largest, shares, i, None, strips, np.int64(0), strips.shape[0], scaling)
    sums = add_strips(strips, _row_rate(scaling))
    excess = nll_of(sums[0], sums[1], sums[2], load_one(row, largest), _row_rate(scaling))
    _shift_row(row, out, largest, _row_rate(scaling), excess)


def log_softmax(logits, classes, shares, scaling, strips, out):
    """(N, V) -> out (N, V): (x - largest) - log1p(others / largest), two positive losses that cannot cancel."""
    for i in prange(logits.shape[0]):
        _log_softmax_row(row_of(logits, i, classes), shares, scaling, strips[i], i, row_of(out, i, classes))
