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
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.fours import AHEAD, build_fetch, build_hide
from fastxent.backends.cuda.group import build_group
from fastxent.backends.cuda.words import build_along, build_shares
from fastxent.rowmath import Table

# sums of differences are kept so much smaller, exactly: finite masks such as -3e38 would overflow float32
_SCALE = 2.0**-24


@of_kind
def build_no_moments(ops):
    """What `build_sums` does beside the sums where nothing more is wanted."""
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
def build_sums(ops, kind, moments=None):
    """``thread_sums`` and ``group_sums`` of a strip, both in ``record_of``, and what these are made of; `moments` of it
    beside them, which change no bit of them.
    """
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, share_of = rowmath.build_terms(ops, real), build_shares(ops, kind)
    exp_parts, follow, rescale, tanh_parts = terms.exp_parts, terms.follow, terms.rescale, terms.tanh_parts
    floor_of = terms.floor_of
    fma, where, larger, weighted = ops.fma, ops.where, ops.larger, ops.weighted
    numbered, peak_of_lanes, sum_lanes, to_float64 = ops.numbered, ops.peak_of_lanes, ops.sum_lanes, ops.to_float64
    decode, lanes_of, to_real = form.decode, form.lanes_of, form.to_real
    from_bits = form.from_bits
    first_half, second_half, less_the_base = ops.first_half, ops.second_half, ops.less_the_base
    no_lanes = ops.form(np.dtype(form.real).name).lanes_of
    function, int32, int64, group = ops.function, ops.int32, ops.int64, build_group(ops, kind.threads)
    group_peak, group_total = group.peak, group.total
    zero, nothing, start_exponent = real.type(0), real.type(-np.inf), real.type(rowmath.NO_EXPONENT)
    scale, minus_scale, magic_zero = real.type(_SCALE), real.type(-_SCALE), real.magic
    count, itemsize, threads = form.count, form.itemsize, kind.threads
    capped, largest, spread, even = kind.capped, kind.largest, kind.spread != "none", kind.spread == "even"
    one, all_of_word, of_lane = real.type(1), real.type(count), real.type(max(1 / 4, 1 / count))
    along = build_along(ops, form)
    plus_all, add_exactly, first_equal = along.add, along.add_exactly, along.first_equal
    watch = build_no_moments(ops) if moments is None else moments
    # beside the sum nothing is under its power
    late = moments is None and not largest
    # all that is wanted of a word is its sum, and that of the logits themselves
    by_four = late and kind.spread in ("none", "even") and form.highest is not None
    plain = by_four and not (capped or spread)
    lift, limit = real.type(rowmath.LIFT), real.limit
    # logits so many octaves below a sum's largest, its `LIFT` above the rest, are 0 in it
    clear_of_limit = real.type(2 * real.bias) - real.limit
    highest_of_four, fetch = form.highest, build_fetch(ops, kind)
    fetch_whole, fetch_some, keep_whole, keep_some = fetch.whole, fetch.some, fetch.keep_whole, fetch.keep_some
    hidden = build_hide(ops, kind)
    begin, lifted_moments, plus_moments, noted, flushed = (
        watch.begin,
        watch.lifted,
        watch.plus,
        watch.noted,
        watch.flushed,
    )

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
    def word_of(t, gone):
        """Which word of the strip class ``gone`` is in, if it is one of thread ``t``, else -1."""
        word = int32(gone // count)
        return word if gone >= 0 and (word - t) % threads == 0 else int32(-1)

    @function
    def keeps_the_base(highest, base, rate):
        """Whether the reference of a logit has base 0, as the one before, and so has that of every logit beside it of
        which anything is left.
        """
        octaves = highest * rate[0]
        return base == zero and octaves < limit and octaves > clear_of_limit

    @function
    def in_units(x, cap):
        if capped:
            return tanh_parts(x * cap)[0]
        return x

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

    @function
    def take_whole(four, ahead, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """Four words within the strip, from word ``j`` on; the class that has gone is in the word so far ``ahead``."""
        is_calm, highest, sums = made_ready(four, not (ahead >= 0 and ahead < AHEAD * threads), cap, sums, rate)
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
        ahead, cut = int32(gone_word - j), classes % count != 0 and (last_word - j) % threads == 0
        return not cut and not (ahead >= 0 and ahead < AHEAD * threads)

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
    def empty_sums(own, rate):
        magic, floor = magic_zero - start_exponent, floor_of(start_exponent, rate)
        none = no_lanes(zero)
        return none, zero, zero, zero, magic, floor, nothing, none, zero, begin(own), nothing

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
            four = fetch_whole(place + int64(j) * 16, misplaced, first, last)
            ahead = int32(gone_word - j)
            sums, best = take_whole(four, ahead, j, row, start, classes, gone, shares, cap, sums, best, rate)
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
            gap = group_total(own, 5) / _SCALE
        return to_float64(new_base), to_float64(new_exponent), whole, peak, gap, mass, highest, winner

    @function
    def record_of(t, row, first, last, start, classes, gone, shares, scaling, slots):
        """`group_sums` of a strip."""
        found, best = thread_sums(t, row, first, last, start, classes, gone, shares, scaling, slots, 0)
        return group_sums(found, best, start, rate_of(scaling))

    return Table(
        thread_sums=thread_sums, group_sums=group_sums, record_of=record_of, rate_of=rate_of, plain=plain,
        empty_sums=empty_sums, take_each=take_each, plus_four_words=plus_four_words, word_of=word_of,
        keeps_the_base=keeps_the_base,
    )  # fmt: skip
