"""The sums of a row that is so short that its threads hold all its words in registers: four or eight each.

Its largest logit is known before the first is added. So all threads have one reference from the beginning, and nothing
is rescaled where they meet. To the last bit these are the sums of `sums`, whose references are powers of two.
"""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.absorb import build_absorb
from fastxent.backends.cuda.calm import build_calm
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.fours import AHEAD, build_fetch, build_hide
from fastxent.backends.cuda.group import build_group
from fastxent.backends.cuda.sums import build_sums
from fastxent.backends.cuda.words import build_along

WORDS = 2 * AHEAD


def fits(ops, kind):
    """Whether all rows of a kind are so short, and whole."""
    return kind.rows > 1 and kind.strip <= WORDS * kind.threads * ops.form(kind.form).count


@of_kind
def build_record(ops, kind):
    """``record_of`` as that of `fastxent.backends.cuda.sums.build_sums`, of plain logits."""
    form, of_group, fetch = ops.form(kind.form), build_group(ops, kind.threads), build_fetch(ops, kind)
    sums, absorb, calm = build_sums(ops, kind), build_absorb(ops, kind, False), build_calm(ops, kind, False)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    follow, add_exactly = rowmath.build_terms(ops, real).follow, build_along(ops, form).add_exactly
    fetch_some, keep_some, hidden, highest_of_four = (
        fetch.some, fetch.keep_some, build_hide(ops, kind), form.highest
    )  # fmt: skip
    empty_sums, take_each, plus_four_words = absorb.empty_sums, sums.take_each, calm.plus_four_words
    word_of, keeps_the_base, group_sums, rate_of = sums.word_of, calm.keeps_the_base, sums.group_sums, absorb.rate_of
    group_peak, group_total, sum_lanes, larger = of_group.peak, of_group.total, ops.sum_lanes, ops.larger
    no_lanes, to_float64, to_real, from_bits = (
        ops.form(np.dtype(form.real).name).lanes_of, ops.to_float64, form.to_real, form.from_bits
    )  # fmt: skip
    function, int32, int64, anew = ops.function, ops.int32, ops.int64, ops.anew
    zero, nothing, start_exponent = real.zero, real.type(-np.inf), real.type(rowmath.NO_EXPONENT)
    count, of_four = form.count, AHEAD * kind.threads

    @function
    def fetched(first, j, last_word, last, classes, gone, gone_word, slots):
        four = fetch_some(first, j, last_word, int32(first & 15), first, last)
        if slots != -1:
            keep_some(slots, anew(j), last_word, four)
        return hidden(four, j, classes, gone, gone_word)

    @function
    def highest_of(four):
        return highest_of_four(four[0], four[1], four[2], four[3])

    def record_of_words(is_long):
        @function
        def record(t, row, first, last, classes, gone, shares, scaling, slots):
            rate, cap, words = rate_of(scaling), from_bits(scaling.cap), int32((classes - 1) // count + 1)
            j, start, gone_word = anew(t), int64(0), word_of(t, gone)
            near = fetched(first, j, int32(words - 1), last, classes, gone, gone_word, slots)
            far, highest = near, highest_of(near)
            j, left = int32(j + of_four), int32(words - of_four)
            if is_long:
                far = fetched(first, j, int32(words - 1), last, classes, gone, gone_word, slots)
                highest = larger(highest, highest_of(far))
            peak = group_peak(highest, 0)
            highest = to_real(peak)
            if not keeps_the_base(highest, zero, rate):  # it is subtracted first: one word after the other
                found, best = empty_sums(0, rate), (int32(classes), nothing)
                found, best = take_each(
                    near, words, int32(t), row, start, classes, gone, shares, cap, found, best, rate
                )
                if is_long:
                    found, best = take_each(far, left, j, row, start, classes, gone, shares, cap, found, best, rate)
                return group_sums(found, best, start, rate)
            none = no_lanes(zero)
            _, exponent, magic, floor, _ = follow(zero, start_exponent, highest, rate)
            lanes, _, _ = plus_four_words(none, none, 0, near, words, zero, zero, rate, magic, floor)
            total, low = sum_lanes(lanes), zero
            if is_long:
                lanes, _, _ = plus_four_words(none, none, 0, far, left, zero, zero, rate, magic, floor)
                total, low = add_exactly(total, zero, sum_lanes(lanes))
            whole = group_total(to_float64(total) + to_float64(low), 3)
            return 0.0, to_float64(exponent), whole, peak, 0.0, 0.0, peak, 0.0

        return record

    record_of_four, record_of_eight = record_of_words(False), record_of_words(True)

    @function
    def record_of(t, row, first, last, start, classes, gone, shares, scaling, slots):
        if classes <= of_four * count:
            return record_of_four(t, row, first, last, classes, gone, shares, scaling, slots)
        return record_of_eight(t, row, first, last, classes, gone, shares, scaling, slots)

    return record_of
