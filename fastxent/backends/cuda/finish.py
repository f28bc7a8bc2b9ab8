"""What is made of a row's sums: its statistics, and what its gradient needs to know. One thread a row, in float64."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.words import build_loads, build_shares

RECORD = 64  # bytes of a strip's sums, and of a row's plan


class Results(NamedTuple):
    """Addresses of `fastxent.state.Statistics`, float64 (N,) each; 0 where it is not wanted."""

    nll: int
    target_logit: int
    peak: int
    lse: int
    gap: int


class Coefficients(NamedTuple):
    """Addresses of `fastxent.state.Coefficients`, float64; a step is 8, or 0 where all rows have the same."""

    hit: int
    smooth: int
    extra: int
    square: int
    hit_step: int
    smooth_step: int
    extra_step: int
    square_step: int


def build_fold(ops, kind):
    """``fold(records, strips, rate)``: a row's sums from those of its strips, in order."""
    rows = rowmath.build_rows(ops)
    join, add_gap, exp_split = rows.join, rows.add_gap, rows.exp_split
    load_float64, larger = ops.load_float64, ops.larger
    largest, lift, lifted = kind.largest, rowmath.LIFT, 2.0**rowmath.LIFT

    @ops.function
    def winner_of(records, strips):
        """The largest logit, its class and its strip; the first of equals."""
        best, index, strip = load_float64(records + 48), load_float64(records + 56), 0
        for s in range(1, strips):
            if load_float64(records + s * RECORD + 48) > best:
                best, index, strip = load_float64(records + s * RECORD + 48), load_float64(records + s * RECORD + 56), s
        return best, index, strip

    @ops.function
    def fold(records, strips, rate):
        base, exponent, total, low = 0.0, 0.0, 0.0, 0.0
        peak, top, gap, mass = -np.inf, -np.inf, 0.0, 0.0
        best, index, strip = winner_of(records, strips)
        for s in range(strips):
            at = records + s * RECORD
            base, exponent, total, low = join(
                base, exponent, total, low,
                load_float64(at), load_float64(at + 8), load_float64(at + 16), 0.0, rate,
            )  # fmt: skip
            own = load_float64(at + 48)
            peak = larger(peak, load_float64(at + 24))
            if largest and s != strip and own > -np.inf:
                power, n = exp_split(own - base, rate)
                base, exponent, total, low = join(
                    base, exponent, total, low, base, n - lift, power * lifted, 0.0, rate
                )  # fmt: skip
                peak = larger(peak, own)
            top, gap, mass = add_gap(top, gap, mass, own, load_float64(at + 32), load_float64(at + 40))
        return base, exponent, total, low, peak, gap, mass, best, index

    return fold


def build_finish(ops, kind):
    """``statistics``, ``gradient`` and ``log_softmax`` of a row from its sums, and ``ignore``."""
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    tanh_parts, rows = rowmath.build_terms(ops, real).tanh_parts, rowmath.build_rows(ops)
    nll_of, excess, whole_gap, with_target = rows.nll, rows.excess, rows.whole_gap, rows.with_target
    lse_of, at_target, power_of_two, lift = rows.lse, rows.at_target, rows.power_of_two, rowmath.LIFT
    load, share_of = build_loads(ops, form), build_shares(ops, kind)
    decode, from_bits, lane = form.decode, form.from_bits, ops.lane
    load_float64, store_float64, to_float64, int64 = ops.load_float64, ops.store_float64, ops.to_float64, ops.int64
    capped, largest, spread = kind.capped, kind.largest, kind.spread != "none"
    itemsize, function = form.itemsize, ops.function

    @function
    def put(address, i, value):
        if address != 0:
            store_float64(address + i * 8, value)

    @function
    def ignore(i, nothing, results):
        """An ignored row, or with NaN for ``nothing`` one whose target is out of range."""
        put(results.nll, i, nothing)
        put(results.target_logit, i, np.nan)
        put(results.peak, i, np.nan)
        put(results.lse, i, np.nan)
        put(results.gap, i, nothing)

    @function
    def class_of(target, index, classes):
        if largest:
            return int64(index) if index < classes else int64(0)
        return target

    @function
    def logit_of(first, last, k, scaling):
        """The logit of class ``k`` and its slope."""
        x = lane(decode(load(first + k * itemsize, (first + k * itemsize) & 15, first, last)), 0)
        if capped:
            value, slope = tanh_parts(x * from_bits(scaling.cap))
            return to_float64(value), to_float64(slope)
        return to_float64(x), 1.0

    @function
    def share_at(shares, i, k, classes):
        if spread:
            return to_float64(lane(share_of(shares, i, k, classes), 0)) * shares.scale
        return 0.0

    @function
    def of_others(mass, share, shares):
        """Where the largest logit is left out of the sum, it is still in the mass."""
        mass *= shares.scale
        return mass - share if largest else mass

    @function
    def statistics(i, sums, target_logit, share, shares, scaling, results):
        """What is wanted of a row; its nll, lse and `with_target`."""
        base, exponent, total, _, peak, gap, mass, _, _ = sums
        rate = scaling.row_high, scaling.row_low, scaling.row_nats
        nll = nll_of(base, exponent, total, target_logit, rate)
        put(results.nll, i, nll)
        put(results.target_logit, i, target_logit)
        put(results.peak, i, peak)
        if spread:
            beyond = nll
            if not largest:
                beyond = excess(base, exponent, total, peak, target_logit, nll, rate) if peak > -np.inf else 0.0
            put(results.gap, i, whole_gap(gap * shares.scale, of_others(mass, share, shares), beyond, share, nll, rate))
        over, whole, miss, own = with_target(base, exponent, total, target_logit, rate)
        lse = lse_of(base, over, whole, target_logit, nll, rate)
        put(results.lse, i, lse)
        return nll, lse, over, whole, miss, own

    @function
    def gradient(i, first, last, classes, sums, target, shares, coefficients, scaling, results):
        """The row's plan: base and exponent of its terms, their factor, what a share takes, the target's own, class."""
        k = class_of(target, sums[8], classes)
        target_logit, slope = logit_of(first, last, k, scaling)
        share = share_at(shares, i, k, classes)
        _, lse, over, whole, miss, own = statistics(i, sums, target_logit, share, shares, scaling, results)
        hit = load_float64(coefficients.hit + i * coefficients.hit_step)
        smooth = load_float64(coefficients.smooth + i * coefficients.smooth_step)
        extra = load_float64(coefficients.extra + i * coefficients.extra_step)
        square = load_float64(coefficients.square + i * coefficients.square_step)
        if square != 0.0:
            extra += square * lse
        mass = of_others(sums[6], share, shares)
        # terms are taken under their own largest, which is the only one of them that is sure to be near 1
        highest = sums[1] + lift
        factor = (hit + extra + smooth * (mass + share)) / whole * power_of_two(highest - over)
        entry = at_target(hit, smooth, extra, mass, share, miss, own) * slope
        return sums[0], highest, factor, -smooth * shares.scale, entry, to_float64(k)

    @function
    def log_softmax(i, first, last, classes, sums, target, shares, coefficients, scaling, results):
        """The row's plan: its largest logit and how far that is below the logsumexp."""
        k = class_of(target, sums[8], classes)
        target_logit, _ = logit_of(first, last, k, scaling)
        nll, _, _, _, _, _ = statistics(i, sums, target_logit, 0.0, shares, scaling, results)
        return target_logit, nll, 0.0, 0.0, 0.0, -1.0

    @function
    def plain(i, first, last, classes, sums, target, shares, scaling, results):
        """The statistics alone."""
        k = class_of(target, sums[8], classes)
        target_logit, _ = logit_of(first, last, k, scaling)
        statistics(i, sums, target_logit, share_at(shares, i, k, classes), shares, scaling, results)

    return SimpleNamespace(ignore=ignore, plain=plain, gradient=gradient, log_softmax=log_softmax)
