"""Few classes: sixteen rows at a time, a row in each lane, so that nothing is spent on a row's beginning and end.

A row of ten classes costs 70 ns on its own, nearly all of it for one reference, one logarithm and two masks; here
sixteen rows share them. A sum runs over the classes in order, four at a time in the logits' precision, then float64.
"""

import numpy as np

from fastxent.backends.cpu.formats import as_real
from fastxent.backends.cpu.formulas import compiled, exp_parts, inlined, nll_of, power_of_two, reference, with_target
from fastxent.backends.cpu.memory import load_column, load_some, store_column, store_some
from fastxent.backends.cpu.vector import LANES, fma, lanes_of, larger, to_float64, where, widest_registers
from fastxent.state import IGNORED, LARGEST

# up to as many classes: 50 ns a row there against 117 for rows one by one
FEW = 128


@inlined
def _targets_of(logits, targets, first, last):
    """The targets of the rows from ``first`` on, LARGEST resolved; IGNORED beyond the last row."""
    own = load_some(targets, first, last + 1 - first, -1, IGNORED)
    if targets[first] == LARGEST:
        top, largest = lanes_of(as_real(logits, -np.inf)), own * 0
        for k in range(logits.shape[1]):
            x = load_column(logits, first, k, last)
            largest, top = where(x > top, k, largest), larger(x, top)
        own = where(own == LARGEST, largest, own)
    return own


@inlined
def _term_parts(x, base, rate, magic, floor, targets, k):
    """power, scale of class ``k``, the scale 0 in rows that have it as their target."""
    return exp_parts(where(targets == k, -np.inf, x) - base, rate, magic, floor)


@inlined
def _sum_columns(logits, first, last, targets, rate):
    """Lanes of base, exponent, total, peak and target logit of the rows from ``first`` on, the target left out."""
    classes = logits.shape[1]
    peak = lanes_of(as_real(logits, -np.inf))
    target_logit = peak
    for k in range(classes):
        x = load_column(logits, first, k, last)
        target_logit = where(targets == k, x, target_logit)
        peak = larger(where(targets == k, -np.inf, x), peak)
    base, exponent, magic, floor = reference(peak, rate)
    total = lanes_of(0.0)
    for k in range(0, classes, 4):
        part = lanes_of(as_real(logits, 0.0))
        for j in range(k, min(k + 4, classes)):
            power, scale = _term_parts(load_column(logits, first, j, last), base, rate, magic, floor, targets, j)
            part = fma(power, scale, part)
        total = total + to_float64(part)
    return base, exponent, total, peak, target_logit


@inlined
def _finish(targets, sums, rate, first, count, results):
    base, exponent, total, top, target_logit = sums
    own = to_float64(target_logit)
    value = nll_of(to_float64(base), to_float64(exponent), total, own, rate)
    store_some(results.nll, first, count, where(targets == IGNORED, 0.0, value))
    store_some(results.target_logit, first, count, where(targets == IGNORED, np.nan, own))
    store_some(results.peak, first, count, where(targets == IGNORED, np.nan, to_float64(top)))


@compiled
def statistics_of_sixteen(logits, targets, rate, row_rate, group, results):
    """The statistics of rows 16 group to 16 group + 15, as `kernels.statistics` gives them."""
    widest_registers()
    first, last = group * LANES, logits.shape[0] - 1
    own = _targets_of(logits, targets, first, last)
    sums = _sum_columns(logits, first, last, own, rate)
    _finish(own, sums, row_rate, first, last + 1 - first, results)


@compiled
def gradient_of_sixteen(logits, targets, coefficients, rate, row_rate, out, group, results):
    """And the gradient of those rows, as `kernels.statistics_and_gradient` gives it."""
    widest_registers()
    first, last = group * LANES, logits.shape[0] - 1
    own = _targets_of(logits, targets, first, last)
    base, exponent, total, top, target_logit = _sum_columns(logits, first, last, own, rate)
    _finish(own, (base, exponent, total, top, target_logit), row_rate, first, last + 1 - first, results)
    hit = load_column(coefficients, first, 0, last)
    extra = load_column(coefficients, first, 2, last)
    under = to_float64(exponent)
    over, whole, miss, share = with_target(to_float64(base), under, total, to_float64(target_logit), row_rate)
    factor = (hit + extra) / whole * power_of_two(under - over)
    factor = where(total == 0.0, where(whole > 0.0, 0.0, np.nan), factor)
    factor, target_gradient = as_real(logits, factor), as_real(logits, extra * share - hit * miss)
    _, _, magic, floor = reference(top, rate)
    for k in range(logits.shape[1]):
        x = load_column(logits, first, k, last)
        power, scale = _term_parts(x, base, rate, magic, floor, own, k)
        gradient = where(own == IGNORED, 0.0, power * scale * factor)
        gradient = where(own == k, target_gradient, gradient)
        store_column(out, first, k, last, gradient)
