"""The second half of a gradient: a strip's entries from its logits and its row's plan."""

from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.words import build_loads, build_shares


class Written(NamedTuple):
    """Address and stride of the output."""

    out: int
    stride: int


@of_kind
def build_write(ops, kind, written, staged, entries):
    """``write`` and ``clear`` a strip of the output, which has the format ``written``.

    ``entries`` is "gradient" or "log_softmax". The logits come from shared memory where `sums` left them (``staged``),
    else from where they are. Words of the output are whole wherever it begins, but for the two at the ends.
    """
    form, out = ops.form(kind.form), ops.form(written)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, share_of = rowmath.build_terms(ops, real), build_shares(ops, kind)
    exp_parts, tanh_parts, less_the_base = terms.exp_parts, terms.tanh_parts, ops.less_the_base
    exp_of_fraction, floor_of = terms.exp_of_fraction, terms.floor_of
    shifted_onto, flushed_product = ops.shifted_onto, ops.flushed_product
    fma, where, numbered, leading, bits = ops.fma, ops.where, ops.numbered, ops.leading, ops.bits
    load, staged_word, realigned = build_loads(ops, form), ops.shared_load_word, form.realigned
    store_word, store_some, encode, decode = ops.store_word, out.store_some, out.encode, form.decode
    lanes_of, to_real, from_bits, function = out.lanes_of, form.to_real, form.from_bits, ops.function
    int32, int64 = ops.int32, ops.int64
    zero, one, magic_zero, places = real.type(0), real.type(1), real.magic, real.shift
    itemsize, out_size, count, threads = form.itemsize, out.itemsize, out.count, kind.threads
    capped, spread = kind.capped, kind.spread != "none"
    foldable = entries == "gradient" and real.type is np.float32

    @function
    def from_stage(slots, e, misplaced, first, last, start):
        low = slots + e * itemsize - misplaced
        if misplaced == 0:
            return staged_word(low)
        return realigned(staged_word(low), staged_word(low + 16), misplaced)

    @function
    def from_memory(slots, e, misplaced, first, last, start):
        return load(first + (start + e) * itemsize, misplaced, first, last)

    word_at = from_stage if staged else from_memory

    @function
    def folded(plan):
        """The row's exponent and the factor's remaining bits, the power of two of the factor moved from one to the
        other; and whether there is such a power, and no base.
        """
        base, exponent, factor, _, _, _ = plan
        if foldable:
            of_factor = bits(factor)
            power = int32(int32(of_factor >> 23) & 255)
            whole = power > 0 and power < 255 and base == zero
            return whole, exponent - to_real(power - 127), int32(of_factor & int32(-2139095041))
        return False, exponent, int32(0)

    @function
    def with_shares(value, x, i, k, classes, shares, shift):
        if spread:
            return fma(leading(share_of(shares, i, k, classes), x), lanes_of(shift), value)
        return value

    @function
    def folded_gradient_of(x, i, k, classes, shares, plan, cap, rate, scale):
        """`gradient_of` in fewer instructions, where the factor is `folded` into the exponent: what is below the
        smallest normal number is 0.
        """
        slope = lanes_of(one)
        if capped:
            x, slope = tanh_parts(x * cap)
        exponent, low = scale
        power, n = exp_of_fraction(x, rate, magic_zero - exponent, floor_of(exponent, rate))
        value = flushed_product(power, shifted_onto(n, places, low))
        return with_shares(value, x, i, k, classes, shares, plan[3]) * slope

    @function
    def gradient_of(x, i, k, classes, shares, plan, cap, rate, scale):
        base, exponent, factor, shift, _, _ = plan
        slope = lanes_of(one)
        if capped:
            x, slope = tanh_parts(x * cap)
        if base != zero:
            x = less_the_base(x, base)
        power, size = exp_parts(x, rate, magic_zero - exponent, floor_of(exponent, rate))
        return with_shares(power * size * factor, x, i, k, classes, shares, shift) * slope

    @function
    def log_softmax_of(x, i, k, classes, shares, plan, cap, rate, scale):
        return (x - plan[0]) * rate[2] - plan[1]

    @function
    def put(place, e, classes, word):
        """A word of entries from ``e`` on, those of them that lie in the strip."""
        if e >= 0 and int32(e + count) <= classes:
            store_word(place + e * out_size, word)
        else:
            store_some(place + e * out_size, word, 0 - e, classes - e)

    @function
    def first_word(place):
        """Where the first word of the output begins that holds a number of the strip, from -count + 1 to 0."""
        return int32(0 - (place & 15) // out_size)

    def each_word(value_of):
        @function
        def write_words(t, i, first, last, start, classes, slots, out_place, shares, plan, target, cap, rate, scale):
            e = int32(first_word(out_place) + t * count)
            # the same for all words: they are a whole number of 16 bytes apart
            at = slots + e * itemsize if staged else first + (start + e) * itemsize
            misplaced = int32(at & 15)
            while e < classes:
                x = leading(decode(word_at(slots, e, misplaced, first, last, start)), lanes_of(zero))
                value = value_of(x, i, start + e, start + classes, shares, plan, cap, rate, scale)
                beyond = int32(target - e)
                if beyond >= 0 and beyond < count:
                    value = where(numbered(value) == beyond, plan[4], value)
                put(out_place, e, classes, encode(value))
                e = int32(e + threads * count)

        return write_words

    write_plainly = each_word({"gradient": gradient_of, "log_softmax": log_softmax_of}[entries])
    write_folded = each_word(folded_gradient_of) if foldable else write_plainly

    @function
    def write(t, i, first, last, start, classes, slots, out_place, shares, plan, scaling):
        """Entries of row ``i`` from class ``start`` on, ``classes`` of them, to ``out_place``."""
        rate, cap = (from_bits(scaling.high), from_bits(scaling.low), from_bits(scaling.nats)), from_bits(scaling.cap)
        own = int64(plan[5]) - start
        target = int32(own) if own >= 0 and own < classes else int32(-16)
        plan = to_real(plan[0]), to_real(plan[1]), to_real(plan[2]), to_real(plan[3]), to_real(plan[4]), zero
        whole, exponent, low = folded(plan)
        if whole:
            write_folded(
                t, i, first, last, start, classes, slots, out_place, shares, plan, target, cap, rate, (exponent, low)
            )
        else:
            write_plainly(
                t, i, first, last, start, classes, slots, out_place, shares, plan, target, cap, rate, (exponent, low)
            )

    @function
    def clear(t, out_place, classes, number):
        """The same number everywhere."""
        e = first_word(out_place) + t * count
        word = encode(lanes_of(number))
        while e < classes:
            put(out_place, e, classes, word)
            e += threads * count

    return write, clear
