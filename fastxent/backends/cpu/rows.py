"""The sums of one row: what is read when, and in which order it is added.

Goals: read the logits once from memory, at that speed; the same bits for any threads, batch split, row order, or
twin; no digit lost in a row's sum. How:

- A row is cut into strips of 4,096 classes (16 KB of float32). While a strip is summed the next strip's maximum is
  taken, so each strip has its own largest logit as reference before its first exponential, whatever stands in other
  strips: nothing is summed twice and no running maximum is rescaled.
- Four strips ahead, in the next rows too, the data are asked for, into the second-level cache: without that the
  arithmetic and the waiting for memory add up (1.8 x the time of reading), with it they overlap (1.0 x).
- A strip is cut into blocks of 256: float32 lanes run over a block, float64 lanes over a strip, a float64 pair over
  the row, strip after strip. The order is spelled out in lanes, so no compiler can change it.
- One class, the target, is left out of its row's sum: log1p(others / target) then has every digit however confident
  the row. The block that holds it and the block at the ragged end are read under a mask; -inf stands for what is left
  out, and costs nothing elsewhere.
"""

import numpy as np

from fastxent.backends.cpu.formats import as_real
from fastxent.backends.cpu.formulas import (
    add,
    add_gap,
    compiled,
    exp_parts,
    exp_split,
    inlined,
    power_of_two,
    rebase,
    reference,
    tanh_parts,
)
from fastxent.backends.cpu.memory import load, load_some, on_stack, prefetch, read_only, some_lanes, store, store_some
from fastxent.backends.cpu.vector import (
    LANES,
    bits_of_lanes,
    first_lane,
    fma,
    lanes_of,
    larger,
    lowest_bit,
    peak_of_lanes,
    sum_lanes,
    to_float64,
    weighted,
    widest_registers,
)
from fastxent.state import STRIP

BLOCK = 256
FOUR = 4 * LANES
PREFETCH = 4 * STRIP

strip_on_stack = on_stack(STRIP)


@inlined
def whole(start, size, stop, but):
    """Whether ``size`` classes from ``start`` on end before ``stop`` and are without class ``but``."""
    return start + size <= stop and not start <= but < start + size


@inlined
def load_masked(row, j, stop, but):
    """row[j:] with -inf from ``stop`` on and on class ``but``."""
    return load_some(row, j, stop - j, max(but - j, -1), -np.inf)


@inlined
def _peak_of_four(row, j, a, b, c, d):
    a, b = larger(load(row, j), a), larger(load(row, j + LANES), b)
    return a, b, larger(load(row, j + 2 * LANES), c), larger(load(row, j + 3 * LANES), d)


@inlined
def block_peak(row, start, stop, but, peak):
    """The maximum of ``peak`` and row[start:stop] without class ``but``, a block at most."""
    a, b, c, d = peak, peak, peak, peak
    if whole(start, BLOCK, stop, but):
        for j in range(start, start + BLOCK, FOUR):
            a, b, c, d = _peak_of_four(row, j, a, b, c, d)
    else:
        for j in range(start, min(stop, start + BLOCK), FOUR):
            if whole(j, FOUR, stop, but):
                a, b, c, d = _peak_of_four(row, j, a, b, c, d)
            else:
                for k in range(j, min(stop, j + FOUR), LANES):
                    a = larger(load_masked(row, k, stop, but), a)
    return larger(larger(a, b), larger(c, d))


@compiled
def peak_of(row, start, stop, but):
    """The maximum of row[start:stop] without class ``but``; -inf when nothing is there."""
    peak = lanes_of(as_real(row, -np.inf))
    for j in range(start, stop, BLOCK):
        peak = block_peak(row, j, stop, but, peak)
    return peak_of_lanes(peak)


@compiled
def first_of(row, value, start, stop):
    """The first index in row[start:stop] that holds ``value``, -1 where none does."""
    for j in range(start, stop, LANES):
        found = bits_of_lanes(load_masked(row, j, stop, np.int64(-1)) == as_real(row, value))
        if found != 0 and j + lowest_bit(found) < stop:
            return j + lowest_bit(found)
    return -1


@inlined
def load_one(array, index):
    """``array[index]`` as a float64."""
    return np.float64(first_lane(load_some(array, index, 1, -1, 0.0)))


@inlined
def capped_one(row, index, cap):
    """The logit ``index`` and its slope: row[index] and 1, or tanh(cap row[index]) and its derivative over cap."""
    x = load_some(row, index, 1, -1, 0.0)
    if cap == 0.0:
        return np.float64(first_lane(x)), 1.0
    capped, slope = tanh_parts(x * cap)
    return np.float64(first_lane(capped)), np.float64(first_lane(slope))


@inlined
def _plus_exp(x, terms, j, count, base, rate, magic, floor, lanes):
    """``lanes`` plus exp(x - base) 2**-exponent; the term goes to terms[j:], only ``count`` lanes unless it is None."""
    power, scale = exp_parts(x if base is None else x - base, rate, magic, floor)
    if terms is None:
        return fma(power, scale, lanes)
    term = power * scale
    if count is None:
        store(terms, j, term)
    else:
        store_some(terms, j, count, term)
    return lanes + term


@inlined
def _sum_of_four(row, terms, j, base, rate, magic, floor, a, b, c, d):
    a = _plus_exp(load(row, j), terms, j, None, base, rate, magic, floor, a)
    b = _plus_exp(load(row, j + LANES), terms, j + LANES, None, base, rate, magic, floor, b)
    c = _plus_exp(load(row, j + 2 * LANES), terms, j + 2 * LANES, None, base, rate, magic, floor, c)
    d = _plus_exp(load(row, j + 3 * LANES), terms, j + 3 * LANES, None, base, rate, magic, floor, d)
    return a, b, c, d


@inlined
def _sum_block(row, terms, start, stop, but, base, rate, magic, floor):
    """Lanes of sum exp(row - base) over row[start:stop] without ``but``, a block at most; the terms go to ``terms``."""
    a = lanes_of(as_real(row, 0.0))
    b, c, d = a, a, a
    if whole(start, BLOCK, stop, but):
        for j in range(start, start + BLOCK, FOUR):
            a, b, c, d = _sum_of_four(row, terms, j, base, rate, magic, floor, a, b, c, d)
    else:
        for j in range(start, min(stop, start + BLOCK), FOUR):
            if whole(j, FOUR, stop, but):
                a, b, c, d = _sum_of_four(row, terms, j, base, rate, magic, floor, a, b, c, d)
            else:
                for k in range(j, min(stop, j + FOUR), LANES):
                    a = _plus_exp(load_masked(row, k, stop, but), terms, k, stop - k, base, rate, magic, floor, a)
    return (a + b) + (c + d)


@inlined
def prefetch_block(row, start):
    """Ask for the cache lines of the block from ``start`` on."""
    for j in range(start, start + BLOCK, 64 // row.itemsize):
        prefetch(row, j)


@inlined
def _sum_blocks(row, terms, start, stop, ahead, but, base, rate, magic, floor):
    """The sum of a strip, block by block, and the maximum from ``stop`` to ``ahead``, a block at a time beside it."""
    widest_registers()
    total = lanes_of(0.0)
    next_peak = lanes_of(as_real(row, -np.inf))
    for j in range(start, stop, BLOCK):
        if ahead >= stop:
            prefetch_block(row, j + PREFETCH)
        if terms is not None:
            prefetch_block(terms, j + PREFETCH)
        total = total + to_float64(_sum_block(row, terms, j, stop, but, base, rate, magic, floor))
        if j + STRIP < ahead:
            next_peak = block_peak(row, j + STRIP, ahead, but, next_peak)
    return sum_lanes(total), peak_of_lanes(next_peak)


@compiled
def _sum_strip(row, terms, start, stop, ahead, but, peak, rate):
    """A strip's sum under the reference of its maximum ``peak``, and the maximum from ``stop`` to ``ahead``; without
    ``ahead`` nothing beyond the strip is asked for.
    """
    base, exponent, magic, floor = reference(peak, rate)
    if base == 0.0:
        # a subtraction an element is 12% of the time, and nearly no row needs it
        total, next_peak = _sum_blocks(row, terms, start, stop, ahead, but, None, rate, magic, floor)
    else:
        total, next_peak = _sum_blocks(row, terms, start, stop, ahead, but, base, rate, magic, floor)
    return np.float64(base), np.float64(exponent), total, next_peak


@compiled
def _add_strip(base, exponent, total, low, strip_base, strip_exponent, strip_total, rate):
    """A row's sum and a strip's; where huge logits gave them different bases, the larger base stays."""
    if strip_base != base and strip_total != 0.0:
        if total == 0.0:
            base = strip_base
        elif strip_base > base:
            exponent, total = rebase(base, exponent, total, strip_base, rate)
            base = strip_base
        else:
            strip_exponent, strip_total = rebase(strip_base, strip_exponent, strip_total, base, rate)
    exponent, total, low = add(exponent, total, low, strip_exponent, strip_total, 0.0)
    return base, exponent, total, low


@inlined
def _share(shares, j, i, count, but):
    """weight_k (keep q_k + even) of classes ``j`` on in row ``i``; 0 from ``count`` on and in lane ``but``."""
    if shares.weight.size == 1:
        share = some_lanes(shares.weight[0], count, but)
    else:
        share = load_some(shares.weight, j, count, but, 0.0)
    if shares.keep != 0.0:
        q = to_float64(load_some(shares.probabilities[i], j, count, but, 0.0))
        share = share * fma(q, shares.keep, shares.even)
    return share


@inlined
def _is_even(shares):
    """Whether every class has the same share, weight[0]."""
    return shares.weight.size == 1 and shares.keep == 0.0


@compiled
def _even_gap_strip(row, origin, start, stop, but, anchor):
    """sum of anchor - z over a strip without class ``but``, in float64: finite masks may overflow float32."""
    widest_registers()
    gap = lanes_of(0.0)
    for j in range(start, stop, LANES):
        if whole(j, LANES, stop, but):
            gap = gap + (anchor - to_float64(load(row, j - origin)))
        else:
            gap = gap + (anchor - to_float64(load_some(row, j - origin, stop - j, max(but - j, -1), anchor)))
    return sum_lanes(gap)


@compiled
def _gap_strip(row, origin, shares, i, start, stop, but, peak):
    """``gap, mass`` of a strip, class k of it row[k - origin], without ``but``: sum r (peak - z) and sum r, float64."""
    widest_registers()
    anchor = np.float64(peak) if peak > -np.inf else 0.0
    if _is_even(shares):
        count = stop - start - (1 if start <= but < stop else 0)
        gap = _even_gap_strip(row, origin, start, stop, but, anchor)
        return shares.weight[0] * gap, shares.weight[0] * count
    gap, mass = lanes_of(0.0), lanes_of(0.0)
    for j in range(start, stop, LANES):
        count, left_out = stop - j, max(but - j, -1)
        share = _share(shares, j, i, count, left_out)
        gap = gap + weighted(share, anchor - to_float64(load_some(row, j - origin, count, left_out, 0.0)))
        mass = mass + share
    return sum_lanes(gap), sum_lanes(mass)


@compiled
def sum_strips(row, but, shares, i, terms, strips, first, last, scaling):
    """Sum strips ``first`` to ``last`` of row ``i`` without class ``but``, each into its place in ``strips`` (n, 8):
    base, exponent (-inf for an empty sum), total, peak, and with ``shares`` the gap and mass of theirs.

    With ``terms``, exp(row - base) 2**-exponent is left there, under each strip's own reference.
    """
    classes = row.shape[0]
    peak = as_real(row, -np.inf)
    if scaling.cap == 0.0:
        peak = peak_of(row, first * STRIP, min(classes, (first + 1) * STRIP), but)
    for s in range(first, last):
        start, stop = s * STRIP, min(classes, (s + 1) * STRIP)
        if scaling.cap == 0.0:
            ahead = min(classes, stop + STRIP) if s + 1 < last else stop
            peak = _fill_strip(row, np.int64(0), shares, i, terms, strips[s], start, stop, ahead, but, peak, scaling)
        else:
            _sum_capped_strip(row, shares, i, strips[s], start, stop, but, scaling)


@inlined
def _fill_strip(row, origin, shares, i, terms, strip, start, stop, ahead, but, peak, scaling):
    """What `sum_strips` leaves of one strip, whose class k is row[k - origin]; the maximum up to ``ahead``."""
    strip[3], strip[4], strip[5] = np.float64(peak), 0.0, 0.0
    if shares.weight.size > 0:
        strip[4], strip[5] = _gap_strip(row, origin, shares, i, start, stop, but, peak)
    rate = scaling.high, scaling.low, scaling.nats
    base, exponent, total, next_peak = _sum_strip(
        row, terms, start - origin, stop - origin, ahead - origin, but - origin, peak, rate
    )
    strip[0], strip[1], strip[2] = base, exponent if total != 0.0 else -np.inf, total
    return next_peak


@inlined
def cap_strip(row, start, stop, cap, capped):
    """tanh(cap row[start:stop]) to ``capped``."""
    widest_registers()
    for j in range(start, stop, LANES):
        if j % BLOCK == 0:
            prefetch_block(row, j + PREFETCH)
        store(capped, j - start, tanh_parts(load_some(row, j, stop - j, -1, 0.0) * cap)[0])


@compiled
def _sum_capped_strip(row, shares, i, strip, start, stop, but, scaling):
    """A strip of the logits tanh(cap row): they are made in scratch that stays in the first-level cache."""
    capped = strip_on_stack(row)
    cap_strip(row, start, stop, scaling.cap, capped)
    logits = read_only(capped)
    peak = peak_of(logits, np.int64(0), stop - start, but - start)
    _fill_strip(logits, start, shares, i, None, strip, start, stop, start, but, peak, scaling)


@compiled
def add_strips(strips, rate, before=(0.0, 0.0, 0.0, 0.0)):
    """A row's ``base, exponent, total, low, peak, gap, mass`` from its strips, added in order.

    ``before`` holds the first four of the classes already counted.
    """
    base, exponent, total, low = before
    top, gap, mass = -np.inf, 0.0, 0.0
    for s in range(strips.shape[0]):
        base, exponent, total, low = _add_strip(
            base, exponent, total, low, strips[s, 0], strips[s, 1], strips[s, 2], rate
        )
        top, gap, mass = add_gap(top, gap, mass, strips[s, 3], strips[s, 4], strips[s, 5])
    return base, exponent, total, low, top, gap, mass


@inlined
def factor_of_strip(strip, base, exponent, rate):
    """What brings a strip's terms to another reference."""
    power, n = exp_split(strip[0] - base, rate)
    return power * power_of_two(strip[1] + n - exponent)


@compiled
def factors_of_strips(strips, base, exponent, amount, rate):
    """What each strip's terms are to be multiplied by for one reference of the row, times ``amount``: strips[s, 0]."""
    for s in range(strips.shape[0]):
        strips[s, 0] = amount * factor_of_strip(strips[s], base, exponent, rate)


@inlined
def _term(source, j, count, base, rate, magic, floor):
    """The term of source[j:], which waits there or, where ``magic`` is given, is that of its logits."""
    x = load(source, j) if count is None else load_some(source, j, count, -1, 0.0)
    if magic is None:
        return x
    power, scale = exp_parts(x - base, rate, magic, floor)
    return power * scale


@inlined
def _write_terms(source, out, shares, i, start, stop, base, rate, magic, floor, factor, shift):
    """out = term * factor + shift, or + shift * share in float64 before the first rounding."""
    widest_registers()
    for j in range(start, stop, LANES):
        if magic is not None and j % BLOCK == 0:
            prefetch_block(out, j + PREFETCH)
        count = stop - j
        if shares is not None:
            x = to_float64(_term(source, j, count, base, rate, magic, floor)) * factor
            store_some(out, j, count, as_real(source, fma(_share(shares, j, i, count, -1), shift, x)))
        elif count >= LANES:
            store(out, j, fma(_term(source, j, None, base, rate, magic, floor), factor, shift))
        else:
            store_some(out, j, count, fma(_term(source, j, count, base, rate, magic, floor), factor, shift))


@inlined
def _write_capped(row, out, shares, i, start, stop, base, rate, magic, floor, factor, shift, cap):
    """As `_write_terms` from the logits, each entry times its slope."""
    widest_registers()
    for j in range(start, stop, LANES):
        if j % BLOCK == 0:
            prefetch_block(row, j + PREFETCH)
            prefetch_block(out, j + PREFETCH)
        count = stop - j
        capped, slope = tanh_parts(load_some(row, j, count, -1, 0.0) * cap)
        power, scale = exp_parts(capped - base, rate, magic, floor)
        if shares.weight.size > 0:
            spread = fma(_share(shares, j, i, count, -1), shift, to_float64(power * scale) * factor)
            store_some(out, j, count, as_real(row, spread * to_float64(slope)))
        else:
            store_some(out, j, count, power * scale * as_real(row, factor) * slope)


@compiled
def write_strip(row, terms, out, shares, i, start, stop, strip, scaling, shift):
    """The gradient of a strip: its terms, waiting in ``terms`` or taken again from the logits, times strip[0]."""
    rate = scaling.high, scaling.low, scaling.nats
    factor = as_real(row, strip[0])
    shift_real = as_real(row, shift * shares.weight[0] if shares.weight.size > 0 else 0.0)
    base, _, magic, floor = reference(as_real(row, strip[3]), rate)
    if scaling.cap != 0.0:
        cap = scaling.cap
        _write_capped(row, out, shares, i, start, stop, base, rate, magic, floor, strip[0], shift, cap)
    elif terms is not None:
        if shares.weight.size > 0 and not _is_even(shares):
            _write_terms(terms, out, shares, i, start, stop, None, None, None, None, strip[0], shift)
        else:
            _write_terms(terms, out, None, i, start, stop, None, None, None, None, factor, shift_real)
    elif shares.weight.size > 0 and not _is_even(shares):
        _write_terms(row, out, shares, i, start, stop, base, rate, magic, floor, strip[0], shift)
    else:
        _write_terms(row, out, None, i, start, stop, base, rate, magic, floor, factor, shift_real)
