"""The second half of a gradient: a strip's entries from its logits and its row's plan."""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.words import build_loads, build_shares


def build_write(ops, kind, written, staged, entries):
    """``write`` and ``clear`` a strip of the output, which has the format ``written``.

    ``entries`` is "gradient" or "log_softmax". The logits come from shared memory where `sums` left them (``staged``),
    else from where they are. Words of the output are whole wherever it begins, but for the two at the ends.
    """
    form, out = ops.form(kind.form), ops.form(written)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, share_of = rowmath.build_terms(ops, real), build_shares(ops, kind)
    exp_parts, tanh_parts, less_the_base = terms.exp_parts, terms.tanh_parts, ops.less_the_base
    fma, where, numbered, leading = ops.fma, ops.where, ops.numbered, ops.leading
    load, staged_word, realigned = build_loads(ops, form), ops.shared_load_word, form.realigned
    store_word, store_some, encode, decode = ops.store_word, out.store_some, out.encode, form.decode
    lanes_of, to_real, from_bits, function = out.lanes_of, form.to_real, form.from_bits, ops.function
    int32, int64 = ops.int32, ops.int64
    zero, one, magic_zero, bias = real.type(0), real.type(1), real.magic, real.bias
    itemsize, out_size, count, threads = form.itemsize, out.itemsize, out.count, kind.threads
    capped, spread = kind.capped, kind.spread != "none"

    @function
    def from_stage(slots, e, first, last, start):
        at = e * itemsize
        misplaced = at & 15
        low = slots + at - misplaced
        if misplaced == 0:
            return staged_word(low)
        return realigned(staged_word(low), staged_word(low + 16), misplaced)

    @function
    def from_memory(slots, e, first, last, start):
        at = first + (start + e) * itemsize
        return load(at, at & 15, first, last)

    word_at = from_stage if staged else from_memory

    @function
    def gradient_of(x, i, k, classes, shares, plan, cap, rate):
        base, exponent, factor, shift, _, _ = plan
        slope = lanes_of(one)
        if capped:
            x, slope = tanh_parts(x * cap)
        if base != zero:
            x = less_the_base(x, base)
        power, size = exp_parts(x, rate, magic_zero - exponent, (exponent - bias) / rate[0])
        value = power * size * factor
        if spread:
            value = fma(leading(share_of(shares, i, k, classes), x), lanes_of(shift), value)
        return value * slope

    @function
    def log_softmax_of(x, i, k, classes, shares, plan, cap, rate):
        return (x - plan[0]) * rate[2] - plan[1]

    value_of = {"gradient": gradient_of, "log_softmax": log_softmax_of}[entries]

    @function
    def put(place, e, classes, word):
        """A word of entries from ``e`` on, those of them that lie in the strip."""
        if e >= 0 and e + count <= classes:
            store_word(place + e * out_size, word)
        else:
            store_some(place + e * out_size, word, 0 - e, classes - e)

    @function
    def first_word(place):
        """Where the first word of the output begins that holds a number of the strip, from -count + 1 to 0."""
        return 0 - ((place & 15) // out_size)

    @function
    def write(t, i, first, last, start, classes, slots, out_place, shares, plan, scaling):
        """Entries of row ``i`` from class ``start`` on, ``classes`` of them, to ``out_place``."""
        rate, cap = (from_bits(scaling.high), from_bits(scaling.low), from_bits(scaling.nats)), from_bits(scaling.cap)
        own, target = to_real(plan[4]), int64(plan[5]) - start
        plan = to_real(plan[0]), to_real(plan[1]), to_real(plan[2]), to_real(plan[3]), own, zero
        e = first_word(out_place) + t * count
        while e < classes:
            x = leading(decode(word_at(slots, e, first, last, start)), lanes_of(zero))
            value = value_of(x, i, start + e, start + classes, shares, plan, cap, rate)
            if target >= e and target < e + count:
                value = where(numbered(value) == int32(target - e), own, value)
            put(out_place, e, classes, encode(value))
            e += threads * count

    @function
    def clear(t, out_place, classes, number):
        """The same number everywhere."""
        e = first_word(out_place) + t * count
        word = encode(lanes_of(number))
        while e < classes:
            put(out_place, e, classes, word)
            e += threads * count

    return write, clear
