"""Scores: a strip's sums, moments and largest logits in one read of it, then a thread a row for what is made of them.

The sums are those of a loss, so a log-probability is minus the loss to the last bit. Where one logit has nearly all of
its strip and is not the target, its own log-probability has lost its digits in the sum: the strip is summed again
without it, from the cache.
"""

from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.absorb import build_absorb
from fastxent.backends.cuda.finish import build_fold
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.largest import ENTRY, build_largest
from fastxent.backends.cuda.moments import build_group_moments
from fastxent.backends.cuda.places import RECORD, build_notes, build_places
from fastxent.backends.cuda.sums import build_sums
from fastxent.backends.cuda.words import build_point
from fastxent.rowmath import Table
from fastxent.state import IGNORED

KERNELS = ("strip_scores", "finish_scores", "log_probs")
MOMENTS = 80  # bytes of a strip's moments: six, the sum without its largest logit, and how many of its list are taken
KNOWN = 32  # bytes of what log-probabilities of a row are made of
# below this, lse minus the largest logit has lost digits to the subtraction of that logit's own term from the sum
_CONFIDENT = 0.4


class Found(NamedTuple):
    """Addresses of `fastxent.state.RowScores`: float64 (N,), (N, k) int64 the largest classes, k of them."""

    nll: int
    lse: int
    entropy: int
    sum_p2: int
    rank: int
    rank_hi: int
    argmax: int
    top_ids: int
    kept: int


class Picked(NamedTuple):
    """Addresses of classes (N, each) int64 and of room for their log-probabilities, float64."""

    ids: int
    each: int
    log_probs: int


@of_kind
def build(ops, kind):
    """The kernels of a kind, whose targets are left out of sums, by name."""
    form, of_rows = ops.form(kind.form), build_places(ops, kind)
    scored, plain = build_sums(ops, kind, True), build_sums(ops, kind)
    group_moments, dominates = build_group_moments(ops, kind)
    keep_largest, point, fold = build_largest(ops, kind), build_point(ops, kind), build_fold(ops, kind)
    thread_sums, group_sums, rate_of, sums_again = (
        scored.thread_sums, scored.group_sums, build_absorb(ops, kind, True).rate_of, plain.thread_sums
    )  # fmt: skip
    notes = build_notes(ops.function, ops.load_float64, ops.store_float64)
    stored, logit, put_record, put_seven = point.stored, point.logit, notes.put_record, notes.put_seven
    is_bad, place_of, strip_of, slots_of = of_rows.is_bad, of_rows.place_of, of_rows.strip_of, of_rows.slots_of
    row_rate, raise_flag, algebra = of_rows.row_rate, ops.raise_flag, rowmath.build_rows(ops)
    join, exp_split, power_of_two, nll_of = algebra.join, algebra.exp_split, algebra.power_of_two, algebra.nll
    excess, with_target, lse_of, entropy = algebra.excess, algebra.with_target, algebra.lse, algebra.entropy
    load_float64, store_float64, load_int64, store_int64 = (
        ops.load_float64, ops.store_float64, ops.load_int64, ops.store_int64
    )  # fmt: skip
    to_float64, function, int32, int64 = ops.to_float64, ops.function, ops.int32, ops.int64
    thread, block, threads, per_block, strip_size = ops.thread, ops.block, kind.threads, kind.rows, kind.strip
    lift, lifted, least = rowmath.LIFT, 2.0**rowmath.LIFT, 2.0**-52 / float(np.finfo(form.real).eps)

    @function
    def put_moments(at, moments, again):
        put_seven(at, moments[0], moments[1], moments[2], moments[3], moments[4], moments[5], again[0])
        store_float64(at + 56, again[1])
        store_float64(at + 64, again[2])
        store_float64(at + 72, 0.0)

    def strip_scores(rows, shares, scaling, records, moments, largest, kept):
        """(N, V) logits read once -> records, moments (N, strips) and the ``kept`` largest (N, strips, kept)."""
        t, number = thread() % threads, int64(block()) * per_block + thread() // threads
        i = number // rows.strips
        if i < rows.rows:
            target = load_int64(rows.targets + i * 8)
            if target != IGNORED and not is_bad(target, rows.classes):
                start = (number - i * rows.strips) * strip_size
                size, (first, last), rate = strip_of(start, rows.classes), place_of(rows, i), rate_of(scaling)
                gone = int32(target - start) if target >= start and target < start + size else int32(-1)
                slots = slots_of(thread() // threads, 1, rows.classes) if kept > 0 else -1
                of_thread, best = thread_sums(
                    t, i, first, last, start, size, gone, shares, scaling, slots, stored(first, last, target)
                )
                record = group_sums(of_thread, best, start, rate)
                found = group_moments(of_thread, record, rate)
                again = 0.0, 0.0, -1.0
                if dominates(record, logit(first, last, target, scaling)[0], rate):
                    of_thread, best = sums_again(
                        t, i, first, last, start, size, int32(found[5]), shares, scaling, -1, 0
                    )
                    without = group_sums(of_thread, best, start, rate)
                    again = without[0], without[1], without[2]
                if t == 0:
                    put_record(records + number * RECORD, record)
                    put_moments(moments + number * MOMENTS, found, again)
                if kept > 0:
                    keep_largest(t, slots, start, size, kept, largest + number * kept * ENTRY)

    @function
    def first_largest(moments, strips):
        """The strip of a row's largest logit as it is stored; the first of equals."""
        strip = 0
        for s in range(1, strips):
            if load_float64(moments + s * MOMENTS + 32) > load_float64(moments + strip * MOMENTS + 32):
                strip = s
        return strip

    @function
    def add_moments(records, moments, strips, base, exponent, top, rate):
        """Of a row, under its own reference and below its own top: drop, square, above, level."""
        drop, square, above, level = 0.0, 0.0, 0.0, 0.0
        for s in range(strips):
            record, at = records + s * RECORD, moments + s * MOMENTS
            above, level = above + load_float64(at + 16), level + load_float64(at + 24)
            total = load_float64(record + 16)
            power, n = exp_split(load_float64(record) - base, rate)
            factor = power * power_of_two(n + load_float64(record + 8) - exponent)
            if total != 0.0 and factor != 0.0:
                drop += factor * (load_float64(at) + (top - load_float64(record + 48)) * total)
                square += factor * (factor * load_float64(at + 8))
        return drop, square, above, level

    @function
    def without_largest(records, moments, strips, but, target, own, peak, rate):
        """lse minus the row's largest logit, ``peak``, from the sum without it: that of strip ``but`` was taken anew,
        with the target if that is there.
        """
        base, exponent, total, low = 0.0, 0.0, 0.0, 0.0
        for s in range(strips):
            at = moments + s * MOMENTS + 48 if s == but else records + s * RECORD
            base, exponent, total, low = join(
                base, exponent, total, low,
                load_float64(at), load_float64(at + 8), load_float64(at + 16), 0.0, rate,
            )  # fmt: skip
        if target // strip_size != but and own > -np.inf:
            power, n = exp_split(own - base, rate)
            base, exponent, total, low = join(base, exponent, total, low, base, n - lift, power * lifted, 0.0, rate)
        return nll_of(base, exponent, total, peak, rate)

    @function
    def beyond_largest(records, moments, strips, but, target, sums, own, top, nll, rate):
        """lse minus the largest logit, ``top``, which is not the target's ``own``, in nats: from the target's, from the
        sum of all the others, or where its own term has cost that sum its digits, from a sum without it.
        """
        distance = (top - own) * rate[2]
        if nll - distance >= max(_CONFIDENT, distance * least):
            return nll - distance
        beyond = excess(sums[0], sums[1], sums[2], top, own, nll, rate)
        if beyond < _CONFIDENT and load_float64(moments + but * MOMENTS + 64) >= 0.0:
            return without_largest(records, moments, strips, but, target, own, top, rate)
        return beyond

    @function
    def merge_largest(i, strips, moments, largest, found):
        """The row's largest classes from those of its strips, each of which knows how many of its own are taken."""
        for m in range(found.kept):
            best, number, strip = -np.inf, np.inf, 0
            for s in range(strips):
                taken = int64(load_float64(moments + s * MOMENTS + 72))
                if taken < found.kept:
                    at = largest + (s * found.kept + taken) * ENTRY
                    value, k = load_float64(at), load_float64(at + 8)
                    if value > best or (value == best and k < number):
                        best, number, strip = value, k, s
            head = moments + strip * MOMENTS + 72
            store_float64(head, load_float64(head) + 1.0)
            store_int64(found.top_ids + (i * found.kept + m) * 8, int64(number) if number < np.inf else int64(-1))

    @function
    def put_row(i, found, nll, lse, spread, sum_p2, rank, rank_hi, argmax):
        store_float64(found.nll + i * 8, nll)
        store_float64(found.lse + i * 8, lse)
        store_float64(found.entropy + i * 8, spread)
        store_float64(found.sum_p2 + i * 8, sum_p2)
        store_float64(found.rank + i * 8, rank)
        store_float64(found.rank_hi + i * 8, rank_hi)
        store_float64(found.argmax + i * 8, argmax)

    @function
    def put_known(known, peak, beyond, nll, target):
        store_float64(known, peak)
        store_float64(known + 8, beyond)
        store_float64(known + 16, nll)
        store_float64(known + 24, to_float64(target))

    @function
    def no_score(i, nll, found, known):
        """A row that is not read, or whose loss is no number."""
        put_row(i, found, nll, np.nan, np.nan, np.nan, 0.0, 0.0, -1.0)
        put_known(known + i * KNOWN, np.nan, np.nan, np.nan, int64(-1))
        for m in range(found.kept):
            store_int64(found.top_ids + (i * found.kept + m) * 8, int64(-1))

    @function
    def score_row(i, target, rows, scaling, records, moments, largest, found, known):
        (first, last), rate, strips = place_of(rows, i), row_rate(scaling), rows.strips
        base, exponent, total, _, top, _, _, _, _ = fold(records, strips, rate)
        own, own_stored = logit(first, last, target, scaling)[0], to_float64(stored(first, last, target))
        nll = nll_of(base, exponent, total, own, rate)
        if nll != nll:
            no_score(i, nll, found, known)
        else:
            over, whole, _, p = with_target(base, exponent, total, own, rate)
            drop, square, above, level = add_moments(records, moments, strips, base, exponent, top, rate)
            if own_stored == -np.inf:  # lanes beyond the row's end are level with it too
                level = to_float64(rows.classes) - 1.0 - above
            strip = first_largest(moments, strips)
            at = moments + strip * MOMENTS
            top_stored, argmax, beyond = load_float64(at + 32), to_float64(target), nll
            others_first = load_float64(at + 40) + to_float64(strip * strip_size)
            if top_stored > own_stored or (top_stored == own_stored and others_first < argmax):
                argmax = others_first
                sums = base, exponent, total
                beyond = beyond_largest(records, moments, strips, strip, target, sums, own, top, nll, rate)
            share, peak = power_of_two(exponent - over) / whole, own if own > top else top
            if own > top and total != 0.0:
                drop += (own - top) * total
            spread = entropy(beyond, drop * share if share != 0.0 else 0.0, p, peak - own, rate)
            lse, sum_p2 = lse_of(base, over, whole, own, nll, rate), square * share * share + p * p
            put_row(i, found, nll, lse, spread, sum_p2, above + 1.0, above + level + 1.0, argmax)
            put_known(known + i * KNOWN, peak, beyond, nll, target)
            merge_largest(i, strips, moments, largest, found)

    def finish_scores(rows, scaling, records, moments, largest, found, known):
        """Records and moments (N, strips), lists of the largest (N, strips, kept) -> scores; a thread for a row."""
        i = (int64(block()) * per_block) * threads + thread()
        if i < rows.rows:
            target = load_int64(rows.targets + i * 8)
            if target == IGNORED or is_bad(target, rows.classes):
                no_score(i, np.nan if is_bad(target, rows.classes) else 0.0, found, known)
                if is_bad(target, rows.classes):
                    raise_flag(rows.flag, i + 1)
            else:
                score_row(
                    i, target, rows, scaling, records + i * rows.strips * RECORD, moments + i * rows.strips * MOMENTS,
                    largest + i * rows.strips * found.kept * ENTRY, found, known,
                )  # fmt: skip

    def log_probs(rows, scaling, known, picked):
        """Classes (N, k) -> their log-probabilities; a thread for one. Minus two positive numbers: how far the logit is
        below the largest, and that one's distance from the lse.
        """
        number = (int64(block()) * per_block) * threads + thread()
        i = number // picked.each
        if i < rows.rows:
            k, (first, last), at = load_int64(picked.ids + number * 8), place_of(rows, i), known + i * KNOWN
            peak, beyond, nll = load_float64(at), load_float64(at + 8), load_float64(at + 16)
            value = np.nan
            if nll == nll and k >= 0:
                value = 0.0 - nll
                if to_float64(k) != load_float64(at + 24):
                    value = 0.0 - (beyond + (peak - logit(first, last, k, scaling)[0]) * scaling.row_nats)
            store_float64(picked.log_probs + number * 8, value)

    return Table(strip_scores=strip_scores, finish_scores=finish_scores, log_probs=log_probs)
