"""Few classes: sixteen rows at a time, a row in each lane, so that nothing is spent on a row's beginning and end.

A row of ten classes costs 70 ns on its own, nearly all of it for one reference, one logarithm and two masks; here
sixteen rows share them. They are read once, transposed into scratch on the stack; the gradient is made there and goes
back the same way. A sum runs over the classes in order, four at a time in the logits' precision, then float64.
"""

import numpy as np

from fastxent.backends.cpu.formats import as_real
from fastxent.backends.cpu.formulas import (
    at_target,
    compiled,
    excess,
    exp_parts,
    inlined,
    lse_of,
    nll_of,
    power_of_two,
    reference,
    tanh_parts,
    whole_gap,
    with_target,
)
from fastxent.backends.cpu.memory import load, load_some, load_tile, on_stack, prefetch, store, store_some, store_tile
from fastxent.backends.cpu.rows import PREFETCH
from fastxent.backends.cpu.vector import LANES, fma, lanes_of, larger, to_float64, weighted, where, widest_registers
from fastxent.state import IGNORED, LARGEST

# up to as many classes: 50 ns a row there against 117 for rows one by one
FEW = 128

_tiles = on_stack(FEW * LANES)


@inlined
def _load_columns(matrix, first, last, tiles):
    for j in range(first * matrix.shape[1], (first + LANES) * matrix.shape[1], 64 // matrix.itemsize):
        prefetch(matrix, j + PREFETCH)
    for k in range(0, matrix.shape[1], LANES):
        load_tile(matrix, first, k, last, tiles)


@inlined
def _cap(tiles, slopes, classes, cap):
    """The logits x in ``tiles`` become tanh(cap x), ``slopes`` their derivative over cap; nothing where cap is 0."""
    if cap != 0.0:
        for k in range(0, classes * LANES, LANES):
            capped, slope = tanh_parts(load(tiles, k) * cap)
            store(tiles, k, capped)
            if slopes is not None:
                store(slopes, k, slope)


@inlined
def _targets_of(tiles, targets, first, last, classes):
    """The targets of the rows from ``first`` on, LARGEST resolved; IGNORED beyond the last row."""
    own, some_largest = load_some(targets, first, last + 1 - first, -1, IGNORED), False
    for i in range(first, min(last + 1, first + LANES)):
        some_largest = some_largest or targets[i] == LARGEST
    if some_largest:
        top, largest = lanes_of(as_real(tiles, -np.inf)), own * 0
        for k in range(classes):
            x = load(tiles, k * LANES)
            largest, top = where(x > top, k, largest), larger(x, top)
        own = where(own == LARGEST, largest, own)
    return own


@inlined
def _peak_and_target(tiles, targets, classes):
    """The largest logit beside the target, and the target's."""
    peak = lanes_of(as_real(tiles, -np.inf))
    target_logit = peak
    for k in range(classes):
        x = load(tiles, k * LANES)
        target_logit = where(targets == k, x, target_logit)
        peak = larger(where(targets == k, -np.inf, x), peak)
    return peak, target_logit


@inlined
def _term(x, targets, k, base, rate, magic, floor):
    """exp(x - base) 2**-exponent of class ``k``, 0 in rows that have it as their target."""
    power, scale = exp_parts(where(targets == k, -np.inf, x) - base, rate, magic, floor)
    return power * scale


@inlined
def _share(shares, probabilities, k):
    """weight_k (keep q_k + even) in every lane; see `kernels.Shares`."""
    share = lanes_of(shares.weight[k if shares.weight.size > 1 else 0])
    if shares.keep != 0.0:
        share = share * fma(to_float64(load(probabilities, k * LANES)), shares.keep, shares.even)
    return share


@inlined
def _sum_gaps(tiles, probabilities, targets, shares, classes, peak):
    """``gap, mass, share`` of the other classes, sum r (peak - x) and sum r, and the target's own share; or zeros."""
    anchor = to_float64(where(peak > -np.inf, peak, 0.0))
    gap, mass, own = lanes_of(0.0), lanes_of(0.0), lanes_of(0.0)
    if shares.weight.size > 0:
        for k in range(classes):
            share = _share(shares, probabilities, k)
            own = where(targets == k, share, own)
            share = where(targets == k, 0.0, share)
            gap = gap + weighted(share, anchor - to_float64(load(tiles, k * LANES)))
            mass = mass + share
    return gap, mass, own


@inlined
def _sum_columns(tiles, targets, classes, peak, rate, keep_terms):
    """Lanes of base, exponent and total without the target; the terms may take the logits' place."""
    base, exponent, magic, floor = reference(peak, rate)
    total = lanes_of(0.0)
    for k in range(0, classes, 4):
        part = lanes_of(as_real(tiles, 0.0))
        for j in range(k, min(k + 4, classes)):
            term = _term(load(tiles, j * LANES), targets, j, base, rate, magic, floor)
            part = part + term
            if keep_terms:
                store(tiles, j * LANES, term)
        total = total + to_float64(part)
    return to_float64(base), to_float64(exponent), total


@inlined
def _finish(targets, sums, top, target_logit, gaps, rate, first, count, results):
    """Leave what was asked for of sixteen rows in ``results``, but for the lse; their nll."""
    base, exponent, total = sums
    nll = nll_of(base, exponent, total, target_logit, rate)
    store_some(results.nll, first, count, where(targets == IGNORED, 0.0, nll))
    if results.target_logit.size > 0:
        store_some(results.target_logit, first, count, where(targets == IGNORED, np.nan, target_logit))
    if results.peak.size > 0:
        store_some(results.peak, first, count, where(targets == IGNORED, np.nan, top))
    if results.gap.size > 0:
        beyond = where(top > -np.inf, excess(base, exponent, total, top, target_logit, nll, rate), 0.0)
        gap = whole_gap(gaps[0], gaps[1], beyond, gaps[2], nll, rate)
        store_some(results.gap, first, count, where(targets == IGNORED, 0.0, gap))
    return nll


@inlined
def _finish_lse(targets, sums, parts, target_logit, nll, rate, first, count, results):
    lse = lse_of(sums[0], parts[0], parts[1], target_logit, nll, rate)
    store_some(results.lse, first, count, where(targets == IGNORED, np.nan, lse))
    return lse


@inlined
def _sums_of_sixteen(logits, targets, shares, scaling, first, last, tiles, slopes, probabilities, results, keep_terms):
    """What `statistics_of_sixteen` and `gradient_of_sixteen` share; the logits' tiles hold terms afterwards."""
    classes = logits.shape[1]
    _load_columns(logits, first, last, tiles)
    if shares.keep != 0.0:
        _load_columns(shares.probabilities, first, last, probabilities)
    _cap(tiles, slopes, classes, scaling.cap)
    own = _targets_of(tiles, targets, first, last, classes)
    peak, target_logit = _peak_and_target(tiles, own, classes)
    gaps = _sum_gaps(tiles, probabilities, own, shares, classes, peak)
    sums = _sum_columns(tiles, own, classes, peak, (scaling.high, scaling.low, scaling.nats), keep_terms)
    rate, own_logit = (scaling.row_high, scaling.row_low, scaling.row_nats), to_float64(target_logit)
    nll = _finish(own, sums, to_float64(peak), own_logit, gaps, rate, first, last + 1 - first, results)
    return own, own_logit, sums, gaps, nll


@compiled
def statistics_of_sixteen(logits, targets, shares, scaling, group, results):
    """The statistics of rows 16 group to 16 group + 15, as `kernels.statistics` gives them."""
    widest_registers()
    first, last = group * LANES, logits.shape[0] - 1
    tiles, probabilities = _tiles(logits), _tiles(logits)
    own, own_logit, sums, _, nll = _sums_of_sixteen(
        logits, targets, shares, scaling, first, last, tiles, None, probabilities, results, False
    )
    if results.lse.size > 0:
        rate = scaling.row_high, scaling.row_low, scaling.row_nats
        parts = with_target(sums[0], sums[1], sums[2], own_logit, rate)
        _finish_lse(own, sums, parts, own_logit, nll, rate, first, last + 1 - first, results)


@inlined
def _of_rows(values, first, last):
    """One number for each of sixteen rows, or the one that is the same for all rows."""
    if values.size == 1:
        return lanes_of(values[0])
    return load_some(values, first, last + 1 - first, -1, 0.0)


@compiled
def gradient_of_sixteen(logits, targets, shares, coefficients, scaling, out, group, results):
    """And the gradient of those rows, as `kernels.statistics_and_gradient` gives it."""
    widest_registers()
    first, last, classes = group * LANES, logits.shape[0] - 1, logits.shape[1]
    tiles, slopes, probabilities = _tiles(logits), _tiles(logits), _tiles(logits)
    own, own_logit, sums, gaps, nll = _sums_of_sixteen(
        logits, targets, shares, scaling, first, last, tiles, slopes, probabilities, results, True
    )
    rate = scaling.row_high, scaling.row_low, scaling.row_nats
    parts = with_target(sums[0], sums[1], sums[2], own_logit, rate)
    over, whole, miss, share = parts
    hit, smooth = _of_rows(coefficients.hit, first, last), _of_rows(coefficients.smooth, first, last)
    extra = _of_rows(coefficients.extra, first, last)
    if results.lse.size > 0:
        lse = _finish_lse(own, sums, parts, own_logit, nll, rate, first, last + 1 - first, results)
        extra = extra + weighted(_of_rows(coefficients.square, first, last), lse)
    target_gradient = as_real(logits, at_target(hit, smooth, extra, gaps[1], gaps[2], miss, share))
    factor = (hit + extra + smooth * (gaps[1] + gaps[2])) / whole * power_of_two(sums[1] - over)
    factor = where(sums[2] == 0.0, where(whole > 0.0, 0.0, np.nan), factor)
    for k in range(classes):
        term = load(tiles, k * LANES)
        if shares.weight.size > 0:
            gradient = as_real(logits, to_float64(term) * factor - smooth * _share(shares, probabilities, k))
        else:
            gradient = term * as_real(logits, factor)
        gradient = where(own == k, target_gradient, gradient)
        if scaling.cap != 0.0:
            gradient = gradient * load(slopes, k * LANES)
        store(tiles, k * LANES, where(own == IGNORED, 0.0, gradient))
    for k in range(0, classes, LANES):
        store_tile(out, first, k, last, tiles)
