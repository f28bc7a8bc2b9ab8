"""What is made of a row's sums: its statistics, and what its gradient needs to know. One thread a row, in float64."""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.ends import build_ends
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.places import RECORD
from fastxent.backends.cuda.words import build_point, build_shares
from fastxent.rowmath import Table


@of_kind
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


@of_kind
def build_finish(ops, kind, ends):
    """``statistics``, ``gradient`` and ``log_softmax`` of a row from its sums, and ``plain``, which put them where
    ``ends`` say, see `build_ends`.
    """
    row_algebra, logit_of = rowmath.build_rows(ops), build_point(ops, kind).logit
    of_ends = build_ends(ops, kind, ends)
    nll_of, excess, whole_gap, with_target = (
        row_algebra.nll, row_algebra.excess, row_algebra.whole_gap, row_algebra.with_target
    )  # fmt: skip
    lse_of, at_target, power_of_two = row_algebra.lse, row_algebra.at_target, row_algebra.power_of_two
    share_of, lane, to_float64, int64 = build_shares(ops, kind), ops.lane, ops.to_float64, ops.int64
    put, coefficients_of, lift = of_ends.put, of_ends.coefficients_of, rowmath.LIFT
    to_real = ops.form(kind.form).to_real
    largest, spread, function = kind.largest, kind.spread != "none", ops.function

    @function
    def class_of(target, index, classes):
        if largest:
            return int64(index) if index < classes else int64(0)
        return target

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
    def known_of(first, last, target, scaling):
        """The target's logit and slope, where it is known which that is."""
        if largest:
            return 0.0, 0.0
        return logit_of(first, last, target, scaling)

    @function
    def statistics(i, sums, target, target_logit, share, shares, scaling, rows, results):
        """What is wanted of a row; its nll, lse and `with_target`."""
        base, exponent, total, _, peak, gap, mass, _, _ = sums
        rate = scaling.row_high, scaling.row_low, scaling.row_nats
        nll = nll_of(base, exponent, total, target_logit, rate)
        over, whole, miss, own = with_target(base, exponent, total, target_logit, rate)
        lse = lse_of(base, over, whole, target_logit, nll, rate)
        if spread:
            beyond = nll
            if not largest:
                beyond = excess(base, exponent, total, peak, target_logit, nll, rate) if peak > -np.inf else 0.0
            gap = whole_gap(gap * shares.scale, of_others(mass, share, shares), beyond, share, nll, rate)
        put(i, target, nll, target_logit, peak, lse, gap, rows, results)
        return nll, lse, over, whole, miss, own

    @function
    def gradient(i, first, last, known, sums, target, shares, coefficients, scaling, rows, results):
        """The row's plan: base and exponent of its terms, their factor, what a share takes, the target's own, class."""
        k = class_of(target, sums[8], rows.classes)
        target_logit, slope = logit_of(first, last, k, scaling) if largest else known
        share = share_at(shares, i, k, rows.classes)
        found = statistics(i, sums, target, target_logit, share, shares, scaling, rows, results)
        _, lse, over, whole, miss, own = found
        hit, smooth, extra, square = coefficients_of(i, target, coefficients, rows, results)
        if square != 0.0:
            extra += square * lse
        mass = of_others(sums[6], share, shares)
        # terms are taken under their own largest, which is the only one of them that is sure to be near 1
        highest = sums[1] + lift
        factor = (hit + extra + smooth * (mass + share)) / whole * power_of_two(highest - over)
        entry = at_target(hit, smooth, extra, mass, share, miss, own) * slope
        base = sums[0]
        if largest and sums[4] > -np.inf and to_float64(to_real(factor)) == 0.0:
            # so far below the largest that nothing is left of them: under their peak no term is infinite
            base, highest = sums[4], 0.0
        return base, highest, factor, -smooth * shares.scale, entry, to_float64(k)

    @function
    def log_softmax(i, first, last, known, sums, target, shares, coefficients, scaling, rows, results):
        """The row's plan: its largest logit and how far that is below the logsumexp."""
        k = class_of(target, sums[8], rows.classes)
        target_logit, _ = logit_of(first, last, k, scaling)
        nll, _, _, _, _, _ = statistics(i, sums, target, target_logit, 0.0, shares, scaling, rows, results)
        return target_logit, nll, 0.0, 0.0, 0.0, -1.0

    @function
    def plain(i, first, last, sums, target, shares, scaling, rows, results):
        """The statistics alone."""
        k = class_of(target, sums[8], rows.classes)
        target_logit, _ = logit_of(first, last, k, scaling)
        share = share_at(shares, i, k, rows.classes)
        statistics(i, sums, target, target_logit, share, shares, scaling, rows, results)

    return Table(plain=plain, gradient=gradient, log_softmax=log_softmax, known_of=known_of)
