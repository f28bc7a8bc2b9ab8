"""The sums of a strip of a row, as one thread takes its share of them and as its group joins them.

Goals: each logit read once, 16 bytes at a time, wherever the row begins; the same bits for any number of rows or
blocks, any order and any address; every digit of a confident row. How:

- Thread t of a group takes words t, t + threads ... of the strip, counted from its first class. Where the row does not
  begin at a multiple of 16 bytes a word is put together from two that do, the second of which the neighbour has
  fetched: what is added to what never depends on an address.
- A thread keeps a running sum in the logits' own precision under a whole power of two that follows its largest logit,
  with the rounding errors of the additions beside it. Float64 only begins where the group joins its threads' sums.
- The target is left out. Where the row has none of its own, each thread leaves its largest logit out, and all but the
  row's largest join the sum later.
"""

from types import SimpleNamespace

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.words import build_loads, build_shares

# sums of differences are kept so much smaller, exactly: finite masks such as -3e38 would overflow float32
_SCALE = 2.0**-24
AHEAD = 4  # words a thread has on the way


def build_group(ops, threads):
    """What the threads of a row tell each other: a warp by shuffles, a block by shared memory, in a fixed order.

    ``slot`` numbers the meetings of a block; each has its own place in the first bytes of shared memory.
    """
    shuffle_xor, first_of_warp, thread = ops.shuffle_xor, ops.first_of_warp, ops.thread
    put, get = ops.shared_store_float64, ops.shared_load_float64
    sync_block, sync_warp = ops.sync_block, ops.sync_warp
    function, larger = ops.function, ops.larger
    warps = threads // 32

    @function
    def add(x, y):
        return x + y

    def in_warp(combine):
        @function
        def joined(x):
            for step in range(5):
                x = combine(x, shuffle_xor(x, 16 >> step))
            return x

        return joined

    def in_group(combine):
        of_warp = in_warp(combine)
        if warps <= 1:
            return function(lambda x, slot: of_warp(x))

        @function
        def joined(x, slot):
            x = of_warp(x)
            t = thread()
            if t & 31 == 0:
                put((slot * warps + (t >> 5)) * 8, x)
            sync_block()
            x = get(slot * warps * 8)
            for warp in range(1, warps):
                x = combine(x, get((slot * warps + warp) * 8))
            return x

        return joined

    @function
    def announced_in_warp(slot, a, b, c, d, e, f):
        sync_warp()
        return (
            first_of_warp(a), first_of_warp(b), first_of_warp(c),
            first_of_warp(d), first_of_warp(e), first_of_warp(f),
        )  # fmt: skip

    @function
    def announced_in_block(slot, a, b, c, d, e, f):
        at = slot * warps * 8
        if thread() == 0:
            put(at, a)
            put(at + 8, b)
            put(at + 16, c)
            put(at + 24, d)
            put(at + 32, e)
            put(at + 40, f)
        sync_block()
        return get(at), get(at + 8), get(at + 16), get(at + 24), get(at + 32), get(at + 40)

    announced = announced_in_warp if warps <= 1 else announced_in_block
    return SimpleNamespace(total=in_group(add), peak=in_group(larger), announced=announced)


def build_sums(ops, kind):
    """``thread_sums`` and ``group_sums`` of a strip."""
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, share_of = rowmath.build_terms(ops, real), build_shares(ops, kind)
    exp_parts, follow, rescale, tanh_parts = terms.exp_parts, terms.follow, terms.rescale, terms.tanh_parts
    fma, where, larger, weighted, lane = ops.fma, ops.where, ops.larger, ops.weighted, ops.lane
    numbered, peak_of_lanes, sum_lanes, to_float64 = ops.numbered, ops.peak_of_lanes, ops.sum_lanes, ops.to_float64
    load, decode, lanes_of, to_real = build_loads(ops, form), form.decode, form.lanes_of, form.to_real
    from_bits = form.from_bits
    first_half, second_half, less_the_base = ops.first_half, ops.second_half, ops.less_the_base
    no_lanes = ops.form(np.dtype(form.real).name).lanes_of
    function, int32, int64, group = ops.function, ops.int32, ops.int64, build_group(ops, kind.threads)
    group_peak, group_total = group.peak, group.total
    stage = ops.shared_store_word
    zero, nothing, start_exponent = real.type(0), real.type(-np.inf), real.type(rowmath.NO_EXPONENT)
    scale, minus_scale, magic_zero, bias = real.type(_SCALE), real.type(-_SCALE), real.magic, real.bias
    count, itemsize, threads = form.count, form.itemsize, kind.threads
    capped, largest, spread, even = kind.capped, kind.largest, kind.spread != "none", kind.spread == "even"
    one, all_of_word, of_lane = real.type(1), real.type(count), real.type(max(1 / 4, 1 / count))

    @function
    def rate_of(scaling):
        return from_bits(scaling.high), from_bits(scaling.low), from_bits(scaling.nats)

    @function
    def add_exactly(total, low, x):
        """The sum and what rounding has cost all of them so far."""
        s = total + x
        back = s - total
        return s, low + ((total - (s - back)) + (x - back))

    @function
    def lifted(mass, top, highest):
        """By how much a sum of differences grows when the largest logit does; 0 for an empty one."""
        return weighted(mass, fma(highest, scale, top * minus_scale))

    @function
    def first_equal(x, number):
        """The first lane that holds the number."""
        place = int32(count - 1)
        for k in range(count - 1):
            place = int32(count - 2 - k) if lane(x, count - 2 - k) == number else place
        return place

    @function
    def plus_four(lanes, x, rate, magic, floor):
        power, size = exp_parts(x, rate, magic, floor)
        return fma(power, size, lanes)

    @function
    def plus_eight(lanes, x, rate, magic, floor):
        lanes = plus_four(lanes, first_half(x), rate, magic, floor)
        return plus_four(lanes, second_half(x), rate, magic, floor)

    @function
    def plus_sixteen(lanes, x, rate, magic, floor):
        lanes = plus_eight(lanes, first_half(x), rate, magic, floor)
        return plus_eight(lanes, second_half(x), rate, magic, floor)

    @function
    def add_four(lanes, x):
        return lanes + x

    @function
    def add_eight(lanes, x):
        return (lanes + first_half(x)) + second_half(x)

    @function
    def add_sixteen(lanes, x):
        return add_eight(add_eight(lanes, first_half(x)), second_half(x))

    # four lanes at most run along a row: eight would be four registers more, and a block less on a multiprocessor
    plus_exp = {2: plus_four, 4: plus_four, 8: plus_eight, 16: plus_sixteen}[count]
    plus_all = {2: add_four, 4: add_four, 8: add_eight, 16: add_sixteen}[count]

    @function
    def raise_reference(x, first, highest, sums, best, rate):
        """A thread's sums when a word has a larger logit than all before: the reference follows."""
        lanes, total, low, base, magic, _, top, gaps, masses = sums
        base, _, magic, floor, factor = follow(base, magic_zero - magic, highest, rate)
        lanes, total, low = lanes * factor, total * factor, low * factor
        if spread:
            # a whole power of two of it in each lane
            gaps = gaps + no_lanes(lifted(masses, top, highest) * of_lane)
        index, others = best
        if largest:
            power, size = exp_parts(top - base, rate, magic, floor)
            total, low = add_exactly(total, low, power * size)
            place = first_equal(x, highest)
            x = where(numbered(x) == place, nothing, x)
            others = larger(larger(others, top), peak_of_lanes(x))
            index = int32(first + place)
        return x, (lanes, total, low, base, magic, floor, highest, gaps, masses), (index, others)

    @function
    def absorb(x, first, gone, share, mass, sums, best, rate):
        """One word of logits, the first of them class ``first`` of the strip, and ``mass`` of them of the row."""
        place = int32(gone - first)
        if place >= 0 and place < count:
            x = where(numbered(x) == place, nothing, x)
            share, mass = where(numbered(x) == place, zero, share), mass - one
        whole, highest = x, peak_of_lanes(x)
        if highest > sums[6]:
            x, sums, best = raise_reference(x, first, highest, sums, best, rate)
        elif largest:
            best = best[0], larger(best[1], highest)
        lanes, total, low, base, magic, floor, top, gaps, masses = sums
        if spread:
            anchor = top if top > nothing else zero
            gaps = plus_all(gaps, weighted(share, fma(whole, minus_scale, lanes_of(anchor * scale))))
            masses += mass if even else sum_lanes(share)
        if base != zero:
            x = less_the_base(x, base)
        lanes = plus_exp(lanes, x, rate, magic, floor)
        return (lanes, total, low, base, magic, floor, top, gaps, masses), best

    @function
    def flush(sums):
        """The lanes' sum added to the thread's."""
        lanes, total, low, base, magic, floor, top, gaps, masses = sums
        total, low = add_exactly(total, low, sum_lanes(lanes))
        return no_lanes(zero), total, low, base, magic, floor, top, gaps, masses

    @function
    def logits_of(word, cap):
        x = decode(word)
        if capped:
            return tanh_parts(x * cap)[0]
        return x

    @function
    def take(word, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """Word ``j`` of the strip from class ``start`` on."""
        every = lanes_of(zero)
        if spread:
            every = share_of(shares, row, start + j * count, start + classes)
        return absorb(logits_of(word, cap), int32(j * count), gone, every, all_of_word, sums, best, rate)

    @function
    def take_last(word, j, row, start, classes, gone, shares, cap, sums, best, rate):
        """The same of a word that may reach beyond the row."""
        first, x, every = int32(j * count), logits_of(word, cap), lanes_of(zero)
        if spread:
            every = share_of(shares, row, start + first, start + classes)
        left = min(int32(classes - first), int32(count))
        inside = numbered(x) < left
        x, every = where(inside, x, nothing), where(inside, every, zero)
        return absorb(x, first, gone, every, to_real(left), sums, best, rate)

    @function
    def thread_sums(t, row, first, last, start, classes, gone, shares, scaling, slots):
        """Of a strip from class ``start`` on with ``classes`` classes, without class ``gone`` of it.

        The row lies from ``first`` to ``last`` in memory. Its words are left in shared memory from ``slots`` on unless
        that is negative.
        """
        rate, cap = rate_of(scaling), from_bits(scaling.cap)
        none = no_lanes(zero)
        floor = (start_exponent - bias) / rate[0]
        sums = (no_lanes(zero), zero, zero, zero, magic_zero - start_exponent, floor, nothing, none, zero)
        best = int32(classes), nothing
        place, whole = first + start * itemsize, classes // count
        misplaced = int32(place & 15)
        j = int32(t)
        while j < whole - (AHEAD - 1) * threads:
            at = place + int64(j) * 16
            a = load(at, misplaced, first, last)
            b = load(at + threads * 16, misplaced, first, last)
            c = load(at + 2 * threads * 16, misplaced, first, last)
            d = load(at + 3 * threads * 16, misplaced, first, last)
            if slots >= 0:
                stage(slots + j * 16, a)
                stage(slots + (j + threads) * 16, b)
                stage(slots + (j + 2 * threads) * 16, c)
                stage(slots + (j + 3 * threads) * 16, d)
            sums, best = take(a, j, row, start, classes, gone, shares, cap, sums, best, rate)
            sums, best = take(b, j + threads, row, start, classes, gone, shares, cap, sums, best, rate)
            sums, best = take(c, j + 2 * threads, row, start, classes, gone, shares, cap, sums, best, rate)
            sums, best = take(d, j + 3 * threads, row, start, classes, gone, shares, cap, sums, best, rate)
            sums = flush(sums)
            j = int32(j + 4 * threads)
        while j * count < classes:
            word = load(place + int64(j) * 16, misplaced, first, last)
            if slots >= 0:
                stage(slots + j * 16, word)
            sums, best = take_last(word, j, row, start, classes, gone, shares, cap, sums, best, rate)
            sums = flush(sums)
            j = int32(j + threads)
        return sums, best

    @function
    def group_sums(sums, best, start, rate):
        """All the group knows of a strip, float64: base, exponent, total, peak of the others, gap, mass, and the
        largest logit with its class where that is left out.
        """
        _, total, low, base, magic, floor, top, gaps, masses = sums
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
            own = to_float64(sum_lanes(gaps)) + to_float64(lifted(masses, top, to_real(highest)))
            gap = group_total(own, 5) / _SCALE
        return to_float64(new_base), to_float64(new_exponent), whole, peak, gap, mass, highest, winner

    return SimpleNamespace(thread_sums=thread_sums, group_sums=group_sums, rate_of=rate_of)
