"""A thread's sums, and how they take logits a word at a time: what counts of it, and the reference it may need.

Sums are: four lanes that have been added since the last flush, their total and its rounding error so far; the base,
magic and floor of the reference; the largest logit; lanes of differences from it and the mass of these; what is seen
for `moments`; and the bound above which the reference follows.
"""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.moments import build_moments, build_no_moments
from fastxent.backends.cuda.words import build_along, build_shares
from fastxent.rowmath import Table

# sums of differences are kept so much smaller, exactly: finite masks such as -3e38 would overflow float32
SCALE = 2.0**-24


def is_late(kind, scored):
    """Whether the reference follows a larger logit late: nothing beside the sum is under its power."""
    return not (scored or kind.largest)


@of_kind
def build_absorb(ops, kind, scored):
    """``empty_sums`` of a thread, ``take`` of a word and ``take_last`` of one that may reach beyond the strip, and
    ``flush`` after some; with `moments` beside them where they are ``scored``, which change no bit of them. And what
    these are made of.
    """
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, share_of, along = rowmath.build_terms(ops, real), build_shares(ops, kind), build_along(ops, form)
    exp_parts, follow, tanh_parts, floor_of = terms.exp_parts, terms.follow, terms.tanh_parts, terms.floor_of
    fma, where, larger, weighted, numbered = ops.fma, ops.where, ops.larger, ops.weighted, ops.numbered
    peak_of_lanes, sum_lanes, less_the_base = ops.peak_of_lanes, ops.sum_lanes, ops.less_the_base
    decode, lanes_of, to_real, from_bits = form.decode, form.lanes_of, form.to_real, form.from_bits
    first_half, second_half, function, int32 = ops.first_half, ops.second_half, ops.function, ops.int32
    no_lanes = ops.form(np.dtype(form.real).name).lanes_of
    plus_all, add_exactly, first_equal = along.add, along.add_exactly, along.first_equal
    zero, nothing, start_exponent = real.zero, real.type(-np.inf), real.type(rowmath.NO_EXPONENT)
    scale, minus_scale, magic_zero = real.type(SCALE), real.type(-SCALE), real.magic
    lift, limit, count = real.type(rowmath.LIFT), real.limit, form.count
    one, all_of_word, of_lane = real.type(1), real.type(count), real.type(max(1 / 4, 1 / count))
    capped, largest, late = kind.capped, kind.largest, is_late(kind, scored)
    spread, even = kind.spread != "none", kind.spread == "even"
    watch = build_moments(ops, kind) if scored else build_no_moments(ops)
    begin, lifted_moments, plus_moments, noted, flushed = (
        watch.begin, watch.lifted, watch.plus, watch.noted, watch.flushed
    )  # fmt: skip

    @function
    def rate_of(scaling):
        return from_bits(scaling.high), from_bits(scaling.low), from_bits(scaling.nats)

    @function
    def bound_of(sums):
        """Above which logit the reference follows."""
        return sums[10] if late else sums[6]

    @function
    def lifted(mass, top, highest):
        """By how much a sum of differences grows when the largest logit does; 0 for an empty one."""
        return weighted(mass, fma(highest, scale, top * minus_scale))

    @function
    def with_top(gaps, masses, top, highest):
        """The lanes' differences from a thread's largest logit, and that, where ``highest`` is one of its logits."""
        if spread and highest > top:
            # a whole power of two of it in each lane
            gaps = gaps + no_lanes(lifted(masses, top, highest) * of_lane)
        return gaps, larger(top, highest)

    @function
    def plus_four(lanes, seen, x, reach, rate, magic, floor):
        power, size = exp_parts(x, rate, magic, floor)
        return fma(power, size, lanes), plus_moments(seen, power, size, x, reach, floor)

    @function
    def plus_eight(lanes, seen, x, reach, rate, magic, floor):
        lanes, seen = plus_four(lanes, seen, first_half(x), reach, rate, magic, floor)
        return plus_four(lanes, seen, second_half(x), reach, rate, magic, floor)

    @function
    def plus_sixteen(lanes, seen, x, reach, rate, magic, floor):
        lanes, seen = plus_eight(lanes, seen, first_half(x), reach, rate, magic, floor)
        return plus_eight(lanes, seen, second_half(x), reach, rate, magic, floor)

    # four lanes at most run along a row: eight would be four registers more, and a block less on a multiprocessor
    plus_exp = {2: plus_four, 4: plus_four, 8: plus_eight, 16: plus_sixteen}[count]

    @function
    def follow_highest(highest, sums, rate):
        """A thread's sums under the reference of a logit above their bound."""
        lanes, total, low, base, magic, _, top, gaps, masses, seen, _ = sums
        base, _, magic, floor, factor = follow(base, magic_zero - magic, highest, rate)
        seen = lifted_moments(seen, lanes, total, top, highest, factor)
        lanes, total, low = lanes * factor, total * factor, low * factor
        bound = highest
        if late and base == zero:  # and stays so up to the limit
            octave = one / rate[0]
            bound = min(highest + lift * octave, limit * octave)
        return lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound

    @function
    def raise_reference(x, first, highest, sums, best, rate):
        """The same where that logit is one of a word, which it leaves if the largest is left out."""
        before, (index, others) = sums[6], best
        sums = follow_highest(highest, sums, rate)
        if largest:
            lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound = sums
            power, size = exp_parts(before - base, rate, magic, floor)
            total, low = add_exactly(total, low, power * size)
            sums = lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound
            place = first_equal(x, highest)
            x = where(numbered(x) == place, nothing, x)
            others = larger(larger(others, before), peak_of_lanes(x))
            index = int32(first + place)
        return x, sums, (index, others)

    @function
    def less_the_reference(x, first, highest, sums, best, rate):
        """A word less the base of the sums, whose reference follows where the word is higher than their bound."""
        if highest > bound_of(sums):
            x, sums, best = raise_reference(x, first, highest, sums, best, rate)
        elif largest:
            best = best[0], larger(best[1], highest)
        if sums[3] != zero:
            x = less_the_base(x, sums[3])
        return x, sums, best

    @function
    def absorb(x, stored, first, gone, share, mass, sums, best, rate):
        """One word of logits, the first of them class ``first`` of the strip, and ``mass`` of them of the row; with
        them as they are stored.
        """
        place = int32(gone - first)
        if place >= 0 and place < count:
            x, stored = where(numbered(x) == place, nothing, x), where(numbered(x) == place, nothing, stored)
            share, mass = where(numbered(x) == place, zero, share), mass - one
        whole, highest = x, peak_of_lanes(x)
        # both are rare: a difference that is seldom taken would cost its instructions in every word
        if highest > bound_of(sums) or sums[3] != zero:
            x, sums, best = less_the_reference(x, first, highest, sums, best, rate)
        elif largest:
            best = best[0], larger(best[1], highest)
        lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound = sums
        gaps, top = with_top(gaps, masses, top, highest)
        seen = noted(seen, stored, first)
        if spread:
            anchor = top if top > nothing else zero
            gaps = plus_all(gaps, weighted(share, fma(whole, minus_scale, lanes_of(anchor * scale))))
            masses += mass if even else sum_lanes(share)
        lanes, seen = plus_exp(lanes, seen, x, top - base if top > nothing else floor, rate, magic, floor)
        return (lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound), best

    @function
    def flush(sums):
        """The lanes' sum added to the thread's."""
        lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound = sums
        total, low = add_exactly(total, low, sum_lanes(lanes))
        return no_lanes(zero), total, low, base, magic, floor, top, gaps, masses, flushed(seen), bound

    @function
    def in_units(x, cap):
        if capped:
            return tanh_parts(x * cap)[0]
        return x

    @function
    def take(word, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """Word ``j`` of the strip from class ``start`` on."""
        every, x = lanes_of(zero), decode(word)
        if spread:
            every = share_of(shares, row, start + j * count, start + classes)
        return absorb(in_units(x, cap), x, int32(j * count), gone, every, all_of_word, sums, best, rate)

    @function
    def take_last(word, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """The same of a word that may reach beyond the strip, or lie there."""
        first, x, every = int32(j * count), decode(word), lanes_of(zero)
        if spread:
            every = share_of(shares, row, start + first, start + classes)
        left = max(int32(0), min(int32(classes - first), int32(count)))
        inside = numbered(x) < left
        stored, every = where(inside, x, nothing), where(inside, every, zero)
        x = where(inside, in_units(x, cap), nothing)
        return absorb(x, stored, first, gone, every, to_real(left), sums, best, rate)

    @function
    def empty_sums(own, rate):
        magic, floor = magic_zero - start_exponent, floor_of(start_exponent, rate)
        none = no_lanes(zero)
        return none, zero, zero, zero, magic, floor, nothing, none, zero, begin(own), nothing

    return Table(
        rate_of=rate_of, bound_of=bound_of, lifted=lifted, with_top=with_top, plus_exp=plus_exp,
        follow_highest=follow_highest, flush=flush, in_units=in_units, take=take, take_last=take_last,
        empty_sums=empty_sums,
    )  # fmt: skip
