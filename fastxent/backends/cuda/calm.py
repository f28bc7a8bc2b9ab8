"""How a thread's sums take four words at once: those that want nothing but to be added, as nearly all do."""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.absorb import SCALE, build_absorb, is_late
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.fours import AHEAD
from fastxent.backends.cuda.words import build_along
from fastxent.rowmath import Table


def goes_by_four(ops, kind, scored):
    """Whether all that is wanted of a word is its sum, and that of the logits themselves."""
    return is_late(kind, scored) and kind.spread in ("none", "even") and ops.form(kind.form).highest is not None


@of_kind
def build_calm(ops, kind, scored):
    """Whether four words are ``made_ready``, and ``take_calmly`` those that are; and what these are made of."""
    form, absorb = ops.form(kind.form), build_absorb(ops, kind, scored)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    bound_of, follow_highest, with_top = absorb.bound_of, absorb.follow_highest, absorb.with_top
    in_units, plus_exp, plus_all = absorb.in_units, absorb.plus_exp, build_along(ops, form).add
    highest_of_four, decode, lanes_of, to_real = form.highest, form.decode, form.lanes_of, form.to_real
    fma, function, int32 = ops.fma, ops.function, ops.int32
    zero, nothing, limit = real.zero, real.type(-np.inf), real.limit
    scale, minus_scale = real.type(SCALE), real.type(-SCALE)
    # logits so many octaves below a sum's largest, its `LIFT` above the rest, are 0 in it
    clear_of_limit = real.type(2 * real.bias) - real.limit
    count, threads, spread, by_four = form.count, kind.threads, kind.spread != "none", goes_by_four(ops, kind, scored)

    @function
    def keeps_the_base(highest, base, rate):
        """Whether the reference of a logit has base 0, as the one before, and so has that of every logit beside it of
        which anything is left.
        """
        octaves = highest * rate[0]
        return base == zero and octaves < limit and octaves > clear_of_limit

    @function
    def plus_word(lanes, gaps, seen, word, cap, anchor, rate, magic, floor):
        x = in_units(decode(word), cap)
        if spread:
            gaps = plus_all(gaps, fma(x, minus_scale, lanes_of(anchor * scale)))
        lanes, seen = plus_exp(lanes, seen, x, floor, rate, magic, floor)
        return lanes, gaps, seen

    @function
    def plus_four_words(lanes, gaps, seen, four, left, cap, anchor, rate, magic, floor):
        """The words of a strip, ``left`` of them, that are a thread's next four; no class has gone from these."""
        lanes, gaps, seen = plus_word(lanes, gaps, seen, four[0], cap, anchor, rate, magic, floor)
        if left > threads:
            lanes, gaps, seen = plus_word(lanes, gaps, seen, four[1], cap, anchor, rate, magic, floor)
        if left > 2 * threads:
            lanes, gaps, seen = plus_word(lanes, gaps, seen, four[2], cap, anchor, rate, magic, floor)
        if left > 3 * threads:
            lanes, gaps, seen = plus_word(lanes, gaps, seen, four[3], cap, anchor, rate, magic, floor)
        return lanes, gaps, seen

    @function
    def made_ready(four, is_whole, cap, sums, rate):
        """For four words that want nothing but to be added, whether they are, the largest of their logits, in the units
        of sums, and the sums, whose reference is that of it. They are ``is_whole`` where each of their logits counts.
        """
        if by_four:
            highest = in_units(highest_of_four(four[0], four[1], four[2], four[3]), cap)
            is_calm = is_whole and sums[3] == zero
            if is_calm and not highest <= bound_of(sums):
                is_calm = keeps_the_base(highest, sums[3], rate)
                if is_calm:
                    sums = follow_highest(highest, sums, rate)
            return is_calm, highest, sums
        return False, zero, sums

    @function
    def take_calmly(four, left, highest, cap, sums, rate):
        lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound = sums
        gaps, top = with_top(gaps, masses, top, highest)
        anchor = top if top > nothing else zero
        lanes, gaps, seen = plus_four_words(lanes, gaps, seen, four, left, cap, anchor, rate, magic, floor)
        if spread:
            masses += to_real(min(int32(AHEAD), int32((left - 1) // threads + 1)) * count)
        return lanes, total, low, base, magic, floor, top, gaps, masses, seen, bound

    return Table(
        keeps_the_base=keeps_the_base, plus_four_words=plus_four_words, made_ready=made_ready, take_calmly=take_calmly
    )
