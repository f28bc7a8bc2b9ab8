"""The sums of a strip of a row, as one thread takes its share of them and as its group joins them.

Goals: each logit read once, 16 bytes at a time, wherever the row begins; the same bits for any number of rows or
blocks, any order and any address; every digit of a confident row. How:

- Thread t of a group takes words t, t + threads ... of the strip, counted from its first class. Where the row does not
  begin at a multiple of 16 bytes a word is put together from two that do, the second of which the neighbour has
  fetched: what is added to what never depends on an address.
- A thread keeps a running sum in the logits' own precision under a whole power of two that follows its largest logit,
  with the rounding errors of the additions beside it. Float64 only begins where the group joins its threads' sums.
- The power follows only a logit that is `LIFT` octaves above the one it was chosen for: 32 threads go together, and
  there are few words in which none of them has a larger logit than before.
- The target is left out. Where the row has none of its own, each thread leaves its largest logit out, and all but the
  row's largest join the sum later.
"""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.absorb import SCALE, build_absorb
from fastxent.backends.cuda.calm import build_calm, goes_by_four
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.fours import AHEAD, build_among, build_fetch, build_hide
from fastxent.backends.cuda.group import build_group
from fastxent.backends.cuda.words import build_along
from fastxent.rowmath import Table


def is_plain(ops, kind, scored=False):
    """Whether a strip's sum is all that is wanted of it, of logits as they are stored."""
    return goes_by_four(ops, kind, scored) and not kind.capped and kind.spread == "none"


@of_kind
def build_sums(ops, kind, scored=False):
    """``thread_sums`` and ``group_sums`` of a strip, both in ``record_of``; ``scored``: see `build_absorb`."""
    form, absorb, calm = ops.form(kind.form), build_absorb(ops, kind, scored), build_calm(ops, kind, scored)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, group, fetch = rowmath.build_terms(ops, real), build_group(ops, kind.threads), build_fetch(ops, kind)
    exp_parts, follow, rescale = terms.exp_parts, terms.follow, terms.rescale
    take, take_last, flush, empty_sums = absorb.take, absorb.take_last, absorb.flush, absorb.empty_sums
    rate_of, lifted, made_ready, take_calmly = absorb.rate_of, absorb.lifted, calm.made_ready, calm.take_calmly
    fetch_whole, fetch_some, keep_whole, keep_some = fetch.whole, fetch.some, fetch.keep_whole, fetch.keep_some
    hidden, is_among = build_hide(ops, kind), build_among(ops, kind)
    group_peak, group_total = group.peak, group.total
    add_exactly, larger, sum_lanes = build_along(ops, form).add_exactly, ops.larger, ops.sum_lanes
    function, int32, int64, to_float64 = ops.function, ops.int32, ops.int64, ops.to_float64
    to_real, from_bits, count, itemsize = form.to_real, form.from_bits, form.count, form.itemsize
    zero, nothing, start_exponent = real.zero, real.type(-np.inf), real.type(rowmath.NO_EXPONENT)
    magic_zero, threads, largest, spread = real.magic, kind.threads, kind.largest, kind.spread != "none"
    by_four, plain = goes_by_four(ops, kind, scored), is_plain(ops, kind, scored)

    @function
    def word_of(t, gone):
        """Which word of the strip class ``gone`` is in, if it is one of thread ``t``, else -1."""
        word = int32(gone // count)
        return word if gone >= 0 and (word - t) % threads == 0 else int32(-1)

    @function
    def take_whole(four, gone_word, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """Four words within the strip, from word ``j`` on; the class that has gone is in word ``gone_word``."""
        is_calm, highest, sums = made_ready(four, not is_among(gone_word, j), cap, sums, rate)
        if is_calm:
            sums = take_calmly(four, int32(AHEAD * threads), highest, cap, sums, rate)
        else:
            sums, best = take(four[0], j, row, start, classes, gone, shares, cap, sums, best, rate)
            sums, best = take(four[1], j + threads, row, start, classes, gone, shares, cap, sums, best, rate)
            sums, best = take(four[2], j + 2 * threads, row, start, classes, gone, shares, cap, sums, best, rate)
            sums, best = take(four[3], j + 3 * threads, row, start, classes, gone, shares, cap, sums, best, rate)
        return flush(sums), best

    @function
    def take_each(four, left, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """The last four words of the strip one by one, of which ``left`` are left."""
        sums, best = take_last(four[0], j, row, start, classes, gone, shares, cap, sums, best, rate)
        if left > threads:
            j = int32(j + threads)
            sums, best = take_last(four[1], j, row, start, classes, gone, shares, cap, sums, best, rate)
        if left > 2 * threads:
            j = int32(j + threads)
            sums, best = take_last(four[2], j, row, start, classes, gone, shares, cap, sums, best, rate)
        if left > 3 * threads:
            j = int32(j + threads)
            sums, best = take_last(four[3], j, row, start, classes, gone, shares, cap, sums, best, rate)
        return flush(sums), best

    @function
    def are_counted(j, last_word, classes, gone_word):
        """Whether every logit of a thread's last four words counts: none has gone, none lies beyond the end."""
        cut = classes % count != 0 and (last_word - j) % threads == 0
        return not cut and not is_among(gone_word, j)

    @function
    def take_some(four, left, are_whole, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """The last four words of the strip, of which ``left`` are left. Hidden is what does not count; ``are_whole``
        says that it is nothing to what is wanted of them.
        """
        is_calm, highest, sums = made_ready(four, are_whole, cap, sums, rate)
        if is_calm:
            return flush(take_calmly(four, left, highest, cap, sums, rate)), best
        return take_each(four, left, j, row, start, classes, gone, shares, cap, sums, best, rate)

    @function
    def thread_sums(t, row, first, last, start, classes, gone, shares, scaling, slots, own):
        """Of a strip from class ``start`` on with ``classes`` classes, without class ``gone`` of it.

        The row lies from ``first`` to ``last`` in memory. Its words are left in shared memory from ``slots`` on unless
        that is -1. ``own`` is the target's logit as it is stored, for `moments`.
        """
        rate, cap = rate_of(scaling), from_bits(scaling.cap)
        sums, best = empty_sums(own, rate), (int32(classes), nothing)
        place, last_word = first + start * itemsize, int32((classes - 1) // count)
        misplaced, gone_word = int32(place & 15), word_of(t, gone)
        j, left = int32(t), int32(classes // count)
        while left >= AHEAD * threads:
            four = fetch_whole(place + int64(j) * 16, misplaced)
            sums, best = take_whole(four, gone_word, j, row, start, classes, gone, shares, cap, sums, best, rate)
            if slots != -1:
                keep_whole(int32(slots + j * 16), four)
            j, left = int32(j + AHEAD * threads), int32(left - AHEAD * threads)
        # the thread's own where what is hidden would count; else the group's, which stays together
        left = int32(last_word + 1 - j) if by_four and not plain else int32(last_word + 1 + t - j)
        if left > 0:
            four = fetch_some(place, j, last_word, misplaced, first, last)
            if slots != -1:
                keep_some(slots, j, last_word, four)
            if by_four:
                four = hidden(four, j, classes, gone, gone_word)
            are_whole = plain or are_counted(j, last_word, classes, gone_word)
            sums, best = take_some(four, left, are_whole, j, row, start, classes, gone, shares, cap, sums, best, rate)
        return sums, best

    @function
    def group_sums(sums, best, start, rate):
        """All the group knows of a strip, float64: base, exponent, total, peak of the others, gap, mass, and the
        largest logit with its class where that is left out.
        """
        _, total, low, base, magic, floor, top, gaps, masses, _, _ = sums
        exponent = magic_zero - magic
        index, others = best
        highest = group_peak(to_float64(top), 0)
        peak, winner = highest, 0.0
        if largest:
            rank = to_float64(start + index) if to_float64(top) == highest else np.inf
            winner = 0.0 - group_peak(0.0 - rank, 1)
            if rank != winner:
                power, size = exp_parts(top - base, rate, magic, floor)
                total, low = add_exactly(total, low, power * size)
                others = larger(others, top)
            peak = group_peak(to_float64(others), 2)
        new_base, new_exponent, _, _, _ = follow(zero, start_exponent, to_real(highest), rate)
        factor = rescale(base, exponent, new_base, new_exponent, rate)
        whole = (to_float64(total) + to_float64(low)) * to_float64(factor)
        whole = group_total(whole, 3)
        gap, mass = 0.0, 0.0
        if spread:
            mass = group_total(to_float64(masses), 4)
            own = to_float64(sum_lanes(gaps))
            if to_real(highest) > top:
                own += to_float64(lifted(masses, top, to_real(highest)))
            gap = group_total(own, 5) / SCALE
        return to_float64(new_base), to_float64(new_exponent), whole, peak, gap, mass, highest, winner

    @function
    def record_of(t, row, first, last, start, classes, gone, shares, scaling, slots):
        """`group_sums` of a strip."""
        found, best = thread_sums(t, row, first, last, start, classes, gone, shares, scaling, slots, 0)
        return group_sums(found, best, start, rate_of(scaling))

    return Table(
        thread_sums=thread_sums, group_sums=group_sums, record_of=record_of, take_each=take_each, word_of=word_of
    )
