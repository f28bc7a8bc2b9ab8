"""Everything a scorer wants of a row from one read of it.

The sum of the other classes is that of `rows`, lane for lane, so a score's log-probability is minus the loss to the
last bit; for few classes, which `columns` sums in another order, the losses are there already. Beside it run the
moments of the row: sum exp(z) (peak - z) for the entropy, sum exp(2 z), and how many logits are above and level with
the target's. What is found by position is looked for afterwards, in the cache: the largest logit in the strip whose
maximum it is, the k largest in the strips whose maxima are among the k largest.
"""

import numpy as np
from numba import prange

from fastxent.backends.cpu.columns import FEW
from fastxent.backends.cpu.formats import as_real, rounding
from fastxent.backends.cpu.formulas import (
    compiled,
    entropy,
    excess,
    exp_parts,
    inlined,
    lse_of,
    nll_of,
    power_of_two,
    reference,
    with_target,
)
from fastxent.backends.cpu.memory import load, load_some, read_only, row_of
from fastxent.backends.cpu.rows import (
    BLOCK,
    FOUR,
    PREFETCH,
    add_strips,
    block_peak,
    cap_strip,
    capped_one,
    factor_of_strip,
    first_of,
    load_masked,
    load_one,
    peak_of,
    prefetch_block,
    strip_on_stack,
    whole,
)
from fastxent.backends.cpu.vector import (
    LANES,
    at_least,
    bits_of_lanes,
    fma,
    lanes_of,
    larger,
    lowest_bit,
    peak_of_lanes,
    sum_lanes,
    to_float64,
    where,
    widest_registers,
)
from fastxent.state import IGNORED, STRIP

# below this, lse minus the largest logit has lost digits to the subtraction of that logit's own term from the sum
_CONFIDENT = 0.2


@inlined
def _plus_moments(x, own, base, top, rate, magic, floor, lanes, drop, square, above, level):
    """Each of the last five plus what the logits ``x`` add to it; ``top`` is the strip's maximum above ``base``."""
    z = x if base is None else x - base
    power, scale = exp_parts(z, rate, magic, floor)
    term = power * scale
    drop = fma(term, top - at_least(z, floor), drop)
    above, level = where(x > own, above + 1.0, above), where(x == own, level + 1.0, level)
    return lanes + term, drop, fma(term, term, square), above, level


@inlined
def _moments_of_four(row, j, own, base, top, rate, magic, floor, a, b, c, d, drop, square, above, level):
    a, drop, square, above, level = _plus_moments(
        load(row, j), own, base, top, rate, magic, floor, a, drop, square, above, level
    )
    b, drop, square, above, level = _plus_moments(
        load(row, j + LANES), own, base, top, rate, magic, floor, b, drop, square, above, level
    )
    c, drop, square, above, level = _plus_moments(
        load(row, j + 2 * LANES), own, base, top, rate, magic, floor, c, drop, square, above, level
    )
    d, drop, square, above, level = _plus_moments(
        load(row, j + 3 * LANES), own, base, top, rate, magic, floor, d, drop, square, above, level
    )
    return a, b, c, d, drop, square, above, level


@inlined
def _moments_of_block(row, start, stop, but, own, base, top, rate, magic, floor, above, level):
    """Lanes of the moments of row[start:stop] without ``but``, a block at most; the sum in the order of `rows`."""
    a = lanes_of(as_real(row, 0.0))
    b, c, d, drop, square = a, a, a, a, a
    if whole(start, BLOCK, stop, but):
        for j in range(start, start + BLOCK, FOUR):
            a, b, c, d, drop, square, above, level = _moments_of_four(
                row, j, own, base, top, rate, magic, floor, a, b, c, d, drop, square, above, level
            )
    else:
        for j in range(start, min(stop, start + BLOCK), FOUR):
            if whole(j, FOUR, stop, but):
                a, b, c, d, drop, square, above, level = _moments_of_four(
                    row, j, own, base, top, rate, magic, floor, a, b, c, d, drop, square, above, level
                )
            else:
                for k in range(j, min(stop, j + FOUR), LANES):
                    a, drop, square, above, level = _plus_moments(
                        load_masked(row, k, stop, but),
                        own, base, top, rate, magic, floor, a, drop, square, above, level,
                    )  # fmt: skip
    return (a + b) + (c + d), drop, square, above, level


@inlined
def _moments_of_blocks(row, start, stop, ahead, but, own, base, top, rate, magic, floor, strip):
    """A strip's total and moments to ``strip``, block by block; the maximum from ``stop`` to ``ahead``."""
    widest_registers()
    total, drop, square = lanes_of(0.0), lanes_of(0.0), lanes_of(0.0)
    above = lanes_of(as_real(row, 0.0))
    level, next_peak = above, lanes_of(as_real(row, -np.inf))
    for j in range(start, stop, BLOCK):
        prefetch_block(row, j + PREFETCH)
        lanes, of_drop, of_square, above, level = _moments_of_block(
            row, j, stop, but, own, base, top, rate, magic, floor, above, level
        )
        total, drop, square = total + to_float64(lanes), drop + to_float64(of_drop), square + to_float64(of_square)
        if j + STRIP < ahead:
            next_peak = block_peak(row, j + STRIP, ahead, but, next_peak)
    strip[2] = sum_lanes(total)
    strip[4] = sum_lanes(drop) if strip[2] != 0.0 else 0.0
    strip[5], strip[6], strip[7] = sum_lanes(square), sum_lanes(to_float64(above)), sum_lanes(to_float64(level))
    return peak_of_lanes(next_peak)


@compiled
def _moments_of_strip(row, start, stop, ahead, but, own, peak, rate, strip):
    """What `sum_moments` leaves of one strip; the maximum from ``stop`` to ``ahead``."""
    base, exponent, magic, floor = reference(peak, rate)
    top = peak - base
    if base == 0.0:
        next_peak = _moments_of_blocks(row, start, stop, ahead, but, own, None, top, rate, magic, floor, strip)
    else:
        next_peak = _moments_of_blocks(row, start, stop, ahead, but, own, base, top, rate, magic, floor, strip)
    strip[0], strip[1], strip[3] = np.float64(base), np.float64(exponent), np.float64(peak)
    if strip[2] == 0.0:
        strip[1] = -np.inf
    return next_peak


@compiled
def _count(row, start, stop, but, own, strip):
    above = lanes_of(as_real(row, 0.0))
    level = above
    for j in range(start, stop, LANES):
        x = load_masked(row, j, stop, but)
        above, level = where(x > own, above + 1.0, above), where(x == own, level + 1.0, level)
    strip[6], strip[7] = sum_lanes(to_float64(above)), sum_lanes(to_float64(level))


@compiled
def sum_moments(row, but, strips, first, last, scaling):
    """Sum strips ``first`` to ``last`` of a row without class ``but``, each into its place in ``strips`` (n, 8): base,
    exponent (-inf for an empty sum), total, peak, sum exp(z) (peak - z), sum exp(2 z), and how many logits are above
    and level with that of class ``but``.
    """
    classes, rate = row.shape[0], (scaling.high, scaling.low, scaling.nats)
    own, peak = as_real(row, load_one(row, but)), as_real(row, -np.inf)
    if scaling.cap == 0.0:
        peak = peak_of(row, first * STRIP, min(classes, (first + 1) * STRIP), but)
    for s in range(first, last):
        start, stop = s * STRIP, min(classes, (s + 1) * STRIP)
        if scaling.cap == 0.0:
            ahead = min(classes, stop + STRIP) if s + 1 < last else stop
            peak = _moments_of_strip(row, start, stop, ahead, but, own, peak, rate, strips[s])
        else:
            capped, size = strip_on_stack(row), stop - start
            cap_strip(row, start, stop, scaling.cap, capped)
            logits = read_only(capped)
            top = peak_of(logits, np.int64(0), size, but - start)
            _moments_of_strip(logits, np.int64(0), size, size, but - start, own, top, rate, strips[s])
            _count(row, start, stop, but, own, strips[s])


@compiled
def _add_moments(strips, base, exponent, top, rate):
    """Of a row, under its own reference and below its own top: sum exp(z) (top - z), sum exp(2 z); above, level."""
    drop, square, above, level = 0.0, 0.0, 0.0, 0.0
    for s in range(strips.shape[0]):
        above, level = above + strips[s, 6], level + strips[s, 7]
        factor = factor_of_strip(strips[s], base, exponent, rate)
        if strips[s, 2] != 0.0 and factor != 0.0:
            drop += factor * (strips[s, 4] + (top - strips[s, 3]) * strips[s, 2])
            square += factor * (factor * strips[s, 5])
    return drop, square, above, level


@inlined
def _comes_before(value, index, other, other_index):
    """Whether a logit is one to be kept sooner than another: larger, or as large with a lower id."""
    return value > other or (value == other and index < other_index)


@inlined
def _offer(values, ids, value, index):
    """Put one into a list in order, instead of its last, if it comes before that."""
    place = values.shape[0] - 1
    if _comes_before(value, index, values[place], ids[place]):
        while place > 0 and _comes_before(value, index, values[place - 1], ids[place - 1]):
            values[place], ids[place] = values[place - 1], ids[place - 1]
            place -= 1
        values[place], ids[place] = value, index


@compiled
def _bound(row, strips, values, ids):
    """A number that k logits of the row reach, k = len(values): the k-th largest of the strips' maxima, or where they
    are fewer than k of those of sixteen lanes; the two arrays are scratch.
    """
    if strips.shape[0] >= values.shape[0]:
        values[:], ids[:] = -np.inf, row.shape[0]
        for s in range(strips.shape[0]):
            _offer(values, ids, strips[s, 3], s)
        return values[values.shape[0] - 1]
    if values.shape[0] > LANES:
        return -np.inf
    peaks = lanes_of(as_real(row, -np.inf))
    for j in range(0, min(row.shape[0], STRIP), LANES):
        peaks = larger(load_masked(row, j, row.shape[0], np.int64(-1)), peaks)
    for _ in range(values.shape[0] - 1):
        peaks = where(peaks == peak_of_lanes(peaks), as_real(row, -np.inf), peaks)
    return np.float64(peak_of_lanes(peaks))


@compiled
def _offer_logits(row, start, stop, values, ids):
    """Offer row[start:stop] to the list, in order."""
    for j in range(start, stop, FOUR):
        if j + FOUR <= stop:
            a, b, c, d = load(row, j), load(row, j + LANES), load(row, j + 2 * LANES), load(row, j + 3 * LANES)
            if bits_of_lanes(larger(larger(a, b), larger(c, d)) >= as_real(row, values[values.shape[0] - 1])) == 0:
                continue
        for k in range(j, min(stop, j + FOUR), LANES):
            found = bits_of_lanes(load_masked(row, k, stop, np.int64(-1)) >= as_real(row, values[values.shape[0] - 1]))
            while found != 0:
                index = k + lowest_bit(found)
                if index < stop:
                    _offer(values, ids, load_one(row, index), index)
                found &= found - 1


@compiled
def _take_largest(row, target, strips, capped, values, ids):
    """The k largest logits of a row and their classes, the lower class first among equals."""
    bound = -np.inf if capped else _bound(row, strips, values, ids)
    values[:], ids[:] = bound, row.shape[0]
    for s in range(strips.shape[0]):
        start, stop = s * STRIP, min(row.shape[0], (s + 1) * STRIP)
        if capped or strips[s, 3] >= bound or start <= target < stop:
            _offer_logits(row, start, stop, values, ids)


@compiled
def _largest(row, target, top, strips, scaling):
    """The first index of a row's largest logit, ``top`` being that of the strips."""
    own, capped = load_one(row, target), scaling.cap != 0.0
    if capped:
        top = np.float64(peak_of(row, np.int64(0), row.shape[0], target))
    if own > top:
        return target
    for s in range(strips.shape[0]):
        if capped or strips[s, 3] == top:
            first = first_of(row, top, s * STRIP, min(row.shape[0], (s + 1) * STRIP))
            if first >= 0:
                return min(first, target) if own == top else first
    return target


@inlined
def _no_score(i, nll, results):
    """A row that is not read, or whose loss is no number."""
    results.nll[i], results.lse[i], results.entropy[i], results.sum_p2[i] = nll, np.nan, np.nan, np.nan
    results.rank[i], results.rank_hi[i], results.argmax[i] = 0, 0, -1
    results.top_ids[i] = -1
    results.top_log_probs[i] = np.nan
    results.id_log_probs[i] = np.nan


@inlined
def _beyond(row, target, largest, sums, logit, top, nll, scaling, strips):
    """lse minus the largest logit, in nats: from the target's, from the sum of all the others, or where its own term
    has cost that sum its digits, from a sum without it, which the strips are overwritten with.
    """
    if largest == target:
        return nll
    distance, rate = (top - logit) * scaling.row_nats, (scaling.row_high, scaling.row_low, scaling.row_nats)
    if nll - distance >= max(_CONFIDENT, distance * 2.0**-52 / rounding(row)):
        return nll - distance
    beyond = excess(sums[0], sums[1], sums[2], top, logit, nll, rate)
    if beyond >= _CONFIDENT:
        return beyond
    sum_moments(row, largest, strips, np.int64(0), strips.shape[0], scaling)
    own = add_strips(strips, rate)
    return nll_of(own[0], own[1], own[2], capped_one(row, largest, scaling.cap)[0], rate)


@inlined
def _score_from_strips(row, target, ids, scaling, strips, i, results):
    rate = scaling.row_high, scaling.row_low, scaling.row_nats
    base, exponent, total, _, top, _, _ = add_strips(strips, rate)
    logit = capped_one(row, target, scaling.cap)[0]
    nll = results.nll[i] if row.shape[0] <= FEW else nll_of(base, exponent, total, logit, rate)
    if np.isnan(nll):
        _no_score(i, nll, results)
        return
    over, whole, _, own = with_target(base, exponent, total, logit, rate)
    drop, square, above, level = _add_moments(strips, base, exponent, top, rate)
    if load_one(row, target) == -np.inf:  # lanes beyond the row's end are level with it too
        level = row.shape[0] - 1.0 - above
    results.nll[i], results.lse[i] = nll, lse_of(base, over, whole, logit, nll, rate)
    results.rank[i], results.rank_hi[i] = np.int64(above) + 1, np.int64(above + level) + 1
    largest = _largest(row, target, top, strips, scaling)
    results.argmax[i] = largest
    if results.top_ids.shape[1] > 0:
        _take_largest(row, target, strips, scaling.cap != 0.0, results.top_log_probs[i], results.top_ids[i])
    share = power_of_two(exponent - over) / whole
    results.sum_p2[i] = square * share * share + own * own
    if logit > top and total != 0.0:
        drop += (logit - top) * total
    sums, peak = (base, exponent, total), max(logit, top)
    beyond = _beyond(row, target, largest, sums, logit, top, nll, scaling, strips)
    results.entropy[i] = entropy(beyond, drop * share if share != 0.0 else 0.0, own, peak - logit, rate)
    for m in range(results.top_ids.shape[1]):
        k = results.top_ids[i, m]
        results.top_log_probs[i, m] = _log_prob(row, k, target, peak, beyond, nll, scaling)
    for m in range(ids.shape[0]):
        results.id_log_probs[i, m] = _log_prob(row, ids[m], target, peak, beyond, nll, scaling)


@inlined
def _log_prob(row, k, target, peak, beyond, nll, scaling):
    """Of class ``k``: minus two positive numbers, the logit's distance from the peak and the peak's nll."""
    if k == target:
        return 0.0 - nll
    return 0.0 - (beyond + (peak - capped_one(row, k, scaling.cap)[0]) * scaling.row_nats)


@compiled
def _sum_segment(logits, classes, targets, scaling, strips, segments, task):
    i, part = task // segments, task % segments
    if targets[i] != IGNORED:
        first, last = strips.shape[1] * part // segments, strips.shape[1] * (part + 1) // segments
        sum_moments(row_of(logits, i, classes), targets[i], strips[i], first, last, scaling)


def score(logits, classes, targets, ids, scaling, segments, strips, results):
    """(N, V) logits, the first ``classes`` columns of a matrix, read once -> `fastxent.state.RowScores`.

    ids (N, K) are classes whose log-probability is wanted; strips (N, n, 8) is scratch. The nll of
    rows of at most `FEW` classes must be there. A row is cut into ``segments`` runs of strips, summed in parallel; 1
    for many rows.
    """
    if segments > 1:
        for task in prange(logits.shape[0] * segments):
            _sum_segment(logits, classes, targets, scaling, strips, segments, task)
    for i in prange(logits.shape[0]):
        if targets[i] == IGNORED:
            _no_score(i, 0.0, results)
        else:
            if segments == 1:
                sum_moments(row_of(logits, i, classes), targets[i], strips[i], np.int64(0), strips.shape[1], scaling)
            _score_from_strips(row_of(logits, i, classes), targets[i], ids[i], scaling, strips[i], i, results)


def count(logits, classes, levels, counts):
    """How many logits of a row (N, V) are above and level with its number in ``levels`` (N,): counts (N, 2)."""
    for i in prange(logits.shape[0]):
        _count_row(row_of(logits, i, classes), levels[i], counts[i])


@compiled
def _count_row(row, level, counts):
    widest_registers()
    own = as_real(row, level)
    above, equal = lanes_of(0.0), lanes_of(0.0)
    for start in range(0, row.shape[0], STRIP):
        of_strip = lanes_of(as_real(row, 0.0))
        level_of_strip = of_strip
        for j in range(start, min(row.shape[0], start + STRIP), LANES):
            x = load_some(row, j, row.shape[0] - j, -1, np.nan)
            of_strip = where(x > own, of_strip + 1.0, of_strip)
            level_of_strip = where(x == own, level_of_strip + 1.0, level_of_strip)
        above, equal = above + to_float64(of_strip), equal + to_float64(level_of_strip)
    counts[0], counts[1] = np.int64(sum_lanes(above)), np.int64(sum_lanes(equal))
