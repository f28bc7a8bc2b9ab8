"""What is counted and compared class by class: logits above a level, and divergences of two rows."""

from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.group import build_group
from fastxent.backends.cuda.places import build_places
from fastxent.backends.cuda.words import build_along, build_loads
from fastxent.rowmath import Table

KERNELS = ("strip_counts", "strip_divergences")


class Beside(NamedTuple):
    """Addresses of the logits q (N, V) beside those of rows, p, of one format, with ``stride`` logits from row to row;
    and of the logsumexps of both, float64 (N,).
    """

    logits: int
    stride: int
    lse_p: int
    lse_q: int


@of_kind
def build(ops, kind):
    """The kernels of a kind, by name."""
    form, at, group = ops.form(kind.form), build_places(ops, kind), build_group(ops, kind.threads)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    terms, algebra = rowmath.build_terms(ops, real), rowmath.build_rows(ops)
    exp_parts, reference, divergence_terms = terms.exp_parts, terms.reference, terms.divergence_terms
    exp_split, power_of_two = algebra.exp_split, algebra.power_of_two
    along, load, decode = build_along(ops, form), build_loads(ops, form), form.decode
    add, add_exactly, total_of = along.add, along.add_exactly, group.total
    where, numbered, sum_lanes = ops.where, ops.numbered, ops.sum_lanes
    first_half, second_half = ops.first_half, ops.second_half
    load_float64, store_float64, add_to, to_float64 = ops.load_float64, ops.store_float64, ops.add_to, ops.to_float64
    thread, block, function, int32, int64 = ops.thread, ops.block, ops.function, ops.int32, ops.int64
    lanes_of, no_lanes, to_real = form.lanes_of, ops.form(np.dtype(form.real).name).lanes_of, form.to_real
    from_bits, place_of, strip_of, row_rate = form.from_bits, at.place_of, at.strip_of, at.row_rate
    threads, per_block, strip_size, count, itemsize = kind.threads, kind.rows, kind.strip, form.count, form.itemsize
    zero, one, unknown = real.zero, real.type(1), real.type(np.nan)
    nothing, infinite = real.type(-np.inf), real.type(np.inf)

    @function
    def word_at(first, last, start, j):
        place = first + start * itemsize
        return decode(load(place + int64(j) * 16, int32(place & 15), first, last))

    def strip_counts(rows, levels, counts):
        """(N, V) logits read once, levels (N,) float64 -> how many are above and level with it, added to counts (N, 2)
        int64; a group for a strip.
        """
        t, number = thread() % threads, int64(block()) * per_block + thread() // threads
        i = number // rows.strips
        if i < rows.rows:
            start, own = (number - i * rows.strips) * strip_size, to_real(load_float64(levels + i * 8))
            size, (first, last) = strip_of(start, rows.classes), place_of(rows, i)
            above, level = no_lanes(zero), no_lanes(zero)
            j = int32(t)
            while j * count < size:
                x = word_at(first, last, start, j)
                x = where(numbered(x) < int32(size - j * count), x, unknown)
                above = add(above, where(x > own, lanes_of(one), lanes_of(zero)))
                level = add(level, where(x == own, lanes_of(one), lanes_of(zero)))
                j = int32(j + threads)
            higher, equal = total_of(to_float64(sum_lanes(above)), 3), total_of(to_float64(sum_lanes(level)), 4)
            if t == 0:
                add_to(counts + i * 16, int64(higher))
                add_to(counts + i * 16 + 8, int64(equal))

    @function
    def normaliser(lse, rate, rate_of_row):
        """What turns exp(z - base) 2**-exponent into probabilities: the reference, and the factor that is left."""
        base, exponent, magic, floor = reference(to_real(lse), rate)
        power, n = exp_split(to_float64(base) - lse, rate_of_row)
        return base, magic, floor, to_real(power * power_of_two(n + to_float64(exponent)))

    @function
    def of_four(z, y, p, q, apart, rest, rate):
        power_p, size_p = exp_parts(z - p[0], rate, p[1], p[2])
        power_q, size_q = exp_parts(y - q[0], rate, q[1], q[2])
        kl, js = divergence_terms(power_p * size_p * p[3], power_q * size_q * q[3], y - z - apart - rest)
        return sum_lanes(kl), sum_lanes(js)

    @function
    def of_eight(z, y, p, q, apart, rest, rate):
        kl, js = of_four(first_half(z), first_half(y), p, q, apart, rest, rate)
        more_kl, more_js = of_four(second_half(z), second_half(y), p, q, apart, rest, rate)
        return kl + more_kl, js + more_js

    @function
    def of_sixteen(z, y, p, q, apart, rest, rate):
        kl, js = of_eight(first_half(z), first_half(y), p, q, apart, rest, rate)
        more_kl, more_js = of_eight(second_half(z), second_half(y), p, q, apart, rest, rate)
        return kl + more_kl, js + more_js

    of_word = {2: of_four, 4: of_four, 8: of_eight, 16: of_sixteen}[count]

    def strip_divergences(rows, beside, scaling, parts):
        """(N, V) logits p and q read once -> what each strip adds to KL(p || q) and to JS(p, q), float64
        (N, strips, 2); a group for a strip.
        """
        t, number = thread() % threads, int64(block()) * per_block + thread() // threads
        i = number // rows.strips
        if i < rows.rows:
            start = (number - i * rows.strips) * strip_size
            size, (first, last) = strip_of(start, rows.classes), place_of(rows, i)
            first_q = beside.logits + i * beside.stride * itemsize
            last_q = first_q + rows.classes * itemsize
            rate = from_bits(scaling.high), from_bits(scaling.low), from_bits(scaling.nats)
            lse_p, lse_q = load_float64(beside.lse_p + i * 8), load_float64(beside.lse_q + i * 8)
            p, q = normaliser(lse_p, rate, row_rate(scaling)), normaliser(lse_q, rate, row_rate(scaling))
            apart = to_real(lse_q - lse_p)
            rest = to_real((lse_q - lse_p) - to_float64(apart))
            kl, kl_low, js, js_low = zero, zero, zero, zero
            j = int32(t)
            while j * count < size:
                z, y = word_at(first, last, start, j), word_at(first_q, last_q, start, j)
                inside = numbered(z) < int32(size - j * count)
                found = of_word(where(inside, z, nothing), where(inside, y, nothing), p, q, apart, rest, rate)
                kl, kl_low = add_exactly(kl, kl_low, found[0])
                js, js_low = add_exactly(js, js_low, found[1])
                j = int32(j + threads)
            # an infinite divergence has no rounding error
            kl_low = kl_low if kl < infinite else zero
            whole_kl = total_of(to_float64(kl) + to_float64(kl_low), 3)
            whole_js = total_of(to_float64(js) + to_float64(js_low), 4)
            if t == 0:
                store_float64(parts + number * 16, whole_kl)
                store_float64(parts + number * 16 + 8, whole_js)

    return Table(strip_counts=strip_counts, strip_divergences=strip_divergences)
