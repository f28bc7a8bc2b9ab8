"""What a score knows of a strip beside its sums: moments, counts and the largest logit, in the same read of it.

With z the logits but the target's and peak the largest of them: drop = sum exp(z) (peak - z), for the entropy,
square = sum exp(2 z), and how many logits as they are stored are above and level with the target's. Every term of a
sum is positive. A thread's largest stays in its sums, and its class is known.
"""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.group import build_group
from fastxent.backends.cuda.words import build_along
from fastxent.rowmath import Table

# below this share of a strip a logit costs the sum around it no digit
_DOMINANT = 2 / 3


@of_kind
def build_moments(ops, kind):
    """The functions that `fastxent.backends.cuda.absorb` calls beside its own."""
    form = ops.form(kind.form)
    function, int32, where, fma, weighted = ops.function, ops.int32, ops.where, ops.fma, ops.weighted
    sum_lanes, peak_of_lanes, at_least, lanes_of = ops.sum_lanes, ops.peak_of_lanes, ops.at_least, form.lanes_of
    along = build_along(ops, form)
    plus_all, first_equal = along.add, along.first_equal
    no_lanes, zero, one = ops.form(np.dtype(form.real).name).lanes_of, form.real(0), form.real(1)
    nothing, to_real = form.real(-np.inf), form.to_real

    @function
    def begin(own):
        none = no_lanes(zero)
        return none, none, zero, zero, none, none, nothing, int32(0), to_real(own)

    @function
    def lifted(seen, lanes, total, top, highest, factor):
        """The reference follows a larger logit: what lay below the old one lies deeper below the new."""
        drops, squares, drop, square, above, level, stored_top, index, own = seen
        drop = drop + sum_lanes(drops) + weighted(total + sum_lanes(lanes), highest - top)
        square = weighted(factor, (square + sum_lanes(squares)) * factor)
        none = no_lanes(zero)
        return none, none, weighted(factor, drop), square, above, level, stored_top, index, own

    @function
    def plus(seen, power, size, x, reach, floor):
        drops, squares, drop, square, above, level, stored_top, index, own = seen
        term = power * size
        drops, squares = fma(term, reach - at_least(x, floor), drops), fma(term, term, squares)
        return drops, squares, drop, square, above, level, stored_top, index, own

    @function
    def noted(seen, stored, first):
        """The counts, and the first of the largest logits as they are stored."""
        drops, squares, drop, square, above, level, stored_top, index, own = seen
        above = plus_all(above, where(stored > own, lanes_of(one), lanes_of(zero)))
        level = plus_all(level, where(stored == own, lanes_of(one), lanes_of(zero)))
        highest = peak_of_lanes(stored)
        if highest > stored_top:
            stored_top, index = highest, int32(first + first_equal(stored, highest))
        return drops, squares, drop, square, above, level, stored_top, index, own

    @function
    def flushed(seen):
        drops, squares, drop, square, above, level, stored_top, index, own = seen
        none = no_lanes(zero)
        return (
            none, none, drop + sum_lanes(drops), square + sum_lanes(squares), above, level, stored_top, index, own,
        )  # fmt: skip

    return Table(begin=begin, lifted=lifted, plus=plus, noted=noted, flushed=flushed)


@of_kind
def build_no_moments(ops):
    """The same where nothing is wanted beside the sums."""
    function = ops.function

    @function
    def begin(own):
        return 0

    @function
    def lifted(seen, lanes, total, top, highest, factor):
        return seen

    @function
    def plus(seen, power, size, x, reach, floor):
        return seen

    @function
    def noted(seen, stored, first):
        return seen

    @function
    def flushed(seen):
        return seen

    return Table(begin=begin, lifted=lifted, plus=plus, noted=noted, flushed=flushed)


@of_kind
def build_group_moments(ops, kind):
    """``group_moments`` of a strip, and whether one logit ``dominates`` it."""
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, group = rowmath.build_terms(ops, real), build_group(ops, kind.threads)
    rescale, exp_parts, floor_of, magic_zero = terms.rescale, terms.exp_parts, terms.floor_of, real.magic
    to_float64, to_real, sum_lanes, weighted = ops.to_float64, form.to_real, ops.sum_lanes, ops.weighted
    total_of, peak_of, function = group.total, group.peak, ops.function

    @function
    def group_moments(sums, record, rate):
        """drop, square, above, level, the largest logit as it is stored and its class of the strip, float64."""
        _, total, low, base, magic, _, top, _, _, seen, _ = sums
        _, _, drop, square, above, level, stored_top, index, _ = seen
        factor = to_float64(rescale(base, magic_zero - magic, to_real(record[0]), to_real(record[1]), rate))
        whole, below = to_float64(total) + to_float64(low), record[6] - to_float64(top)
        drop = total_of(weighted(factor, to_float64(drop) + weighted(whole, below)), 6)
        square = total_of(weighted(factor, factor * to_float64(square)), 7)
        above, level = (
            total_of(to_float64(sum_lanes(above)), 9),
            total_of(to_float64(sum_lanes(level)), 10),
        )
        highest = peak_of(to_float64(stored_top), 11)
        rank = to_float64(index) if to_float64(stored_top) == highest else np.inf
        return drop, square, above, level, highest, 0.0 - peak_of(0.0 - rank, 12)

    @function
    def dominates(record, own, rate):
        """Whether a strip's largest logit has most of its sum, the target's ``own`` logit, no larger, with it."""
        base, exponent = to_real(record[0]), to_real(record[1])
        magic, floor = magic_zero - exponent, floor_of(exponent, rate)
        power, size = exp_parts(to_real(record[6]) - base, rate, magic, floor)
        of_target, size_of_target = exp_parts(to_real(own) - base, rate, magic, floor)
        whole = record[2] + to_float64(of_target * size_of_target)
        return own <= record[6] and to_float64(power * size) > _DOMINANT * whole

    return group_moments, dominates
