"""Few classes: sixteen rows at a time, a row in each lane, so that nothing is spent on a row's beginning and end.

A row of ten classes costs 70 ns on its own, nearly all of it for one reference, one logarithm and two masks; here
sixteen rows share them. A sum runs over the classes in order, four at a time in the logits' precision, then float64.
"""

import numpy as np

from fastxent.backends.cpu.formulas import compiled, exp_parts, inlined, nll_of, power_of_two, reference, with_target
from fastxent.backends.cpu.memory import load_column, load_some, store_column, store_some
from fastxent.backends.cpu.vector import LANES, fma, lanes_of, larger, narrow, to_float64, where, widest_registers
from fastxent.state import IGNORED

# up to as many classes: 50 ns a row there against 117 for rows one by one
FEW = 128


@inlined
def _term_parts(x, base, magic, floor, targets, k):
    """power, scale of class ``k``, the scale 0 in rows that have it as their target."""
    return exp_parts(where(targets == k, -np.inf, x) - base, magic, floor)


@inlined
def _sum_columns(logits, first, last, targets):
    """Lanes of base, exponent, total, peak and target logit of the rows from ``first`` on, the target left out."""
    classes = logits.shape[1]
    peak = lanes_of(logits.dtype.type(-np.inf))
    target_logit = peak
    for k in range(classes):
        x = load_column(logits, first, k, last)
        target_logit = where(targets == k, x, target_logit)
        peak = larger(where(targets == k, -np.inf, x), peak)
    base, exponent, magic, floor = reference(peak)
    total = lanes_of(0.0)
    for k in range(0, classes, 4):
        part = lanes_of(logits.dtype.type(0))
        for j in range(k, min(k + 4, classes)):
            power, scale = _term_parts(load_column(logits, first, j, last), base, magic, floor, targets, j)
            part = fma(power, scale, part)
        total = total + to_float64(part)
    return base, exponent, total, peak, target_logit


@inlined
def _finish(targets, sums, first, count, nll, peak):
    base, exponent, total, top, target_logit = sums
    value = nll_of(to_float64(base), to_float64(exponent), total, to_float64(target_logit))
    store_some(nll, first, count, where(targets == IGNORED, 0.0, value))
    store_some(peak, first, count, where(targets == IGNORED, np.nan, to_float64(top)))


@compiled
def statistics_of_sixteen(logits, targets, group, nll, peak):
    """nll and peak of rows 16 group to 16 group + 15, as `kernels.statistics` gives them."""
    widest_registers()
    first, last = group * LANES, logits.shape[0] - 1
    count = last + 1 - first
    own = load_some(targets, first, count, -1, IGNORED)
    _finish(own, _sum_columns(logits, first, last, own), first, count, nll, peak)


@compiled
def gradient_of_sixteen(logits, targets, coefficients, out, group, nll, peak):
    """And the gradient of those rows, as `kernels.statistics_and_gradient` gives it."""
    widest_registers()
    first, last = group * LANES, logits.shape[0] - 1
    count = last + 1 - first
    own = load_some(targets, first, count, -1, IGNORED)
    base, exponent, total, top, target_logit = _sum_columns(logits, first, last, own)
    _finish(own, (base, exponent, total, top, target_logit), first, count, nll, peak)
    hit = load_column(coefficients, first, 0, last)
    smooth = load_column(coefficients, first, 1, last)
    extra = load_column(coefficients, first, 2, last)
    under = to_float64(exponent)
    over, whole, miss, share = with_target(to_float64(base), under, total, to_float64(target_logit))
    factor = (hit + extra) / whole * power_of_two(under - over)
    factor = where(total == 0.0, where(whole > 0.0, 0.0, np.nan), factor)
    factor, shift = narrow(factor, out), narrow(0.0 - smooth, out)
    target_gradient = narrow(extra * share - hit * miss - smooth, out)
    _, _, magic, floor = reference(top)
    for k in range(logits.shape[1]):
        power, scale = _term_parts(load_column(logits, first, k, last), base, magic, floor, own, k)
        gradient = fma(power * scale, factor, shift)
        gradient = where(own == k, target_gradient, where(own == IGNORED, 0.0, gradient))
        store_column(out, first, k, last, gradient)
