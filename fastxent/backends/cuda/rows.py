"""Kernels of what is known of rows: of those that are one strip in one kernel, of longer ones in two."""

import numpy as np

from fastxent.backends.cuda.ends import build_ends
from fastxent.backends.cuda.finish import build_finish, build_fold
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.group import build_group
from fastxent.backends.cuda.places import RECORD, build_notes, build_places
from fastxent.backends.cuda.turns import build_turns
from fastxent.backends.cuda.words import build_point
from fastxent.rowmath import Table

KERNELS = ("statistics", "strip_sums", "finish_statistics", "settle_lse")


@of_kind
def build(ops, kind, ends):
    """The kernels of a kind, by name; for ``ends`` see `fastxent.backends.cuda.ends`."""
    of_ends, turns, at = build_ends(ops, kind, ends), build_turns(ops, kind, ends), build_places(ops, kind)
    target_of, close, plain = of_ends.target_of, of_ends.close, build_finish(ops, kind, ends).plain
    skip, is_read, sum_strip, sum_in_turn = turns.skip, turns.is_read, turns.sum_strip, turns.sum_in_turn
    place_of, row_rate, notes_of, fold = at.place_of, at.row_rate, at.notes_of, build_fold(ops, kind)
    put_record = build_notes(ops.function, ops.load_float64, ops.store_float64).put_record
    noted_row = build_notes(ops.function, ops.shared_load_float64, ops.shared_store_float64).row_of
    form, stored, of_warp = ops.form(kind.form), build_point(ops, kind).stored, build_group(ops, 32)
    load_one, store_one, to_real, to_float64 = form.load_one, form.store_one, form.to_real, ops.to_float64
    lowest, real_size, total_of, peak_of = form.real(-np.inf), np.dtype(form.real).itemsize, of_warp.total, of_warp.peak
    thread, block, function, int64 = ops.thread, ops.block, ops.function, ops.int64
    threads, per_block, strip_size = kind.threads, kind.rows, kind.strip

    def statistics(rows, shares, scaling, results, each):
        """(N, V) logits read once -> statistics; ``each`` rows a group. A row has no more classes than a strip."""
        of_block = sum_in_turn(rows, shares, scaling, results, each, False)
        i = of_block + thread()
        if thread() < per_block * each and i < rows.rows:
            target = target_of(i, rows, results)
            if is_read(target, rows):
                first, last = place_of(rows, i)
                plain(i, first, last, noted_row(notes_of(thread())), target, shares, scaling, rows, results)
            else:
                skip(0, i, target, rows, results)
        close(of_block, per_block * each, rows, results)

    def strip_sums(rows, shares, scaling, results, records):
        """(N, V) logits read once -> records (N, strips); a block for a strip."""
        i = int64(block() // rows.strips)
        s = int64(block() - i * rows.strips)
        target = target_of(i, rows, results)
        if is_read(target, rows):
            record = sum_strip(thread(), i, s * strip_size, -1, target, rows, shares, scaling)
            if thread() == 0:
                put_record(records + (i * rows.strips + s) * RECORD, record)

    def finish_statistics(rows, shares, scaling, results, records):
        """Records (N, strips) -> statistics; a thread for a row."""
        i = int64(block()) * threads + thread()
        if i < rows.rows:
            target = target_of(i, rows, results)
            if is_read(target, rows):
                first, last = place_of(rows, i)
                found = fold(records + i * rows.strips * RECORD, rows.strips, row_rate(scaling))
                plain(i, first, last, found, target, shares, scaling, rows, results)
            else:
                skip(0, i, target, rows, results)
        close(int64(block()) * threads, threads, rows, results)

    @function
    def settle_row(t, i, rows, lse):
        """Thread ``t`` of a warp, which looks through a row together."""
        first, last = place_of(rows, i)
        highest, k = lowest, int64(t)
        while k < rows.classes and highest == highest:
            x = stored(first, last, k)
            highest, k = (highest if x <= highest else x), k + 32
        is_number = total_of(0.0 if highest == highest else 1.0, 0) == 0.0
        peak = peak_of(to_float64(highest), 1)
        if t == 0 and is_number and peak - peak != 0.0:
            store_one(lse + i * real_size, to_real(peak))

    def settle_lse(rows, lse):
        """Logsumexps (N,) that are NaN -> the largest logit, an infinity, where none of the row is NaN; a warp for 32
        rows.
        """
        t = thread() & 31
        row = int64(block()) * threads * per_block + thread() - t
        for i in range(row, min(row + 32, rows.rows)):
            found = load_one(lse + i * real_size)
            if found != found:
                settle_row(t, i, rows, lse)

    return Table(
        statistics=statistics, strip_sums=strip_sums, finish_statistics=finish_statistics, settle_lse=settle_lse
    )
