"""Kernels of gradients and log-softmaxes: one read of the logits and one write, or where blocks cannot wait, two reads.

A row of no more than a strip is one group's business from the first logit to the last entry. Of a longer row
`shared_gradient` has a block for each strip, which wait for each other; or `finish_gradient` makes a row's plan of the
records that strip_sums has left, and `strip_entries` writes each strip by it.
"""

import numpy as np

from fastxent.backends.cuda.ends import build_ends
from fastxent.backends.cuda.finish import build_finish, build_fold
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.places import RECORD, SLOTS, build_notes, build_places
from fastxent.backends.cuda.turns import build_turns
from fastxent.backends.cuda.write import build_write
from fastxent.rowmath import Table

KERNELS = ("gradient", "shared_gradient", "finish_gradient", "strip_entries")


@of_kind
def build(ops, kind, ends, written, entries):
    """The kernels of a kind, by name, for an output in the format ``written``; ``entries`` is "gradient" or
    "log_softmax"; for ``ends`` see `fastxent.backends.cuda.ends`.
    """
    of_ends, turns, at = build_ends(ops, kind, ends), build_turns(ops, kind, ends), build_places(ops, kind)
    target_of, close, finish = of_ends.target_of, of_ends.close, build_finish(ops, kind, ends)
    known_of, of_row, fold = finish.known_of, getattr(finish, entries), build_fold(ops, kind)
    skip, is_read, sum_strip, sum_in_turn = turns.skip, turns.is_read, turns.sum_strip, turns.sum_in_turn
    first_row, goes_on = turns.first_row, turns.goes_on
    is_bad, place_of, strip_of, slots_of = at.is_bad, at.place_of, at.strip_of, at.slots_of
    in_memory = build_notes(ops.function, ops.load_float64, ops.store_float64)
    in_shared = build_notes(ops.function, ops.shared_load_float64, ops.shared_store_float64)
    row_rate, notes_of, put_record, put_plan, plan_of = (
        at.row_rate, at.notes_of, in_memory.put_record, in_memory.put_plan, in_memory.plan_of
    )  # fmt: skip
    noted_row, note_plan, noted_plan = in_shared.row_of, in_shared.put_plan, in_shared.plan_of
    write_staged, clear = build_write(ops, kind, written, True, entries)
    write_again, _ = build_write(ops, kind, written, False, entries)
    thread, block, function, int32, int64 = ops.thread, ops.block, ops.function, ops.int32, ops.int64
    fetch_add, publish, wait_for, sync_block = ops.fetch_add, ops.publish, ops.wait_for, ops.sync_block
    shared_put, shared_get, to_float64 = ops.shared_store_float64, ops.shared_load_float64, ops.to_float64
    threads, per_block, strip_size, out_size = kind.threads, kind.rows, kind.strip, ops.form(written).itemsize
    ticket_at = (SLOTS - 1) * 8 * max(1, threads // 32)

    def gradient(rows, shares, coefficients, scaling, results, written, each):
        """(N, V) logits read once -> statistics, and as many entries written once, in place or not; ``each`` rows a
        group. A row has no more classes than a strip, and waits in shared memory.
        """
        of_block = sum_in_turn(rows, shares, scaling, results, each, True)
        i = of_block + thread()
        if thread() < per_block * each and i < rows.rows:
            target = target_of(i, rows, results)
            if is_read(target, rows):
                (first, last), note = place_of(rows, i), notes_of(thread())
                found, known = noted_row(note), known_of(first, last, target, scaling)
                plan = of_row(i, first, last, known, found, target, shares, coefficients, scaling, rows, results)
                note_plan(note, plan)
            else:
                skip(0, i, target, rows, results)
        sync_block()
        t, (k, of_block) = thread() % threads, first_row(each)
        left = of_block + k < rows.rows
        while left:
            i = of_block + k
            target, place = target_of(i, rows, results), written.out + i * written.stride * out_size
            if is_read(target, rows):
                (first, last), plan = place_of(rows, i), noted_plan(notes_of(k))
                slots, size = slots_of(k, each, rows.classes), int32(rows.classes)
                write_staged(t, i, first, last, int64(0), size, slots, place, shares, plan, scaling)
            else:
                clear(t, place, rows.classes, np.nan if is_bad(target, rows.classes) else 0.0)
            k = int32(k + 1)
            left = goes_on(k, each, of_block, rows)
        close(of_block, per_block * each, rows, results)

    @function
    def next_number(tickets):
        """The block's place in the order in which blocks have begun, which is not that of their numbers."""
        if thread() == 0:
            shared_put(ticket_at, to_float64(fetch_add(tickets, 1)))
        sync_block()
        return int64(shared_get(ticket_at))

    @function
    def meet_row(t, records, flags, strips, s, record):
        """Leave a record for the other blocks of the row, and wait for theirs."""
        if t == 0:
            put_record(records + s * RECORD, record)
            publish(flags + s * 8, 1)
        for other in range(t, strips, threads):
            wait_for(flags + other * 8, 1)
        sync_block()

    def shared_gradient(rows, shares, coefficients, scaling, results, records, tickets, written):
        """As `gradient` for rows of several strips, each with a block that waits for the others of its row.

        tickets: 1 + N strips int64, all 0. At most one row has begun without all of its blocks, so a GPU that can hold
        the blocks of a row, of every kernel of this kind it runs at once, comes to an end. In place unless the largest
        logit is left out: which that is, is known when another block may already write.
        """
        number, t = next_number(tickets), thread()
        i = number // rows.strips
        s = number - i * rows.strips
        start = s * strip_size
        size = strip_of(start, rows.classes)
        target = target_of(i, rows, results)
        place = written.out + (i * written.stride + start) * out_size
        if is_read(target, rows):
            slots = slots_of(0, 1, rows.classes)
            record = sum_strip(t, i, start, slots, target, rows, shares, scaling)
            row_records = records + i * rows.strips * RECORD
            first, last = place_of(rows, i)
            # before any block of the row may write
            known = known_of(first, last, target, scaling)
            meet_row(t, row_records, tickets + 8 + i * rows.strips * 8, rows.strips, s, record)
            if t == 0:
                found = fold(row_records, rows.strips, row_rate(scaling))
                plan = of_row(i, first, last, known, found, target, shares, coefficients, scaling, rows, results)
                note_plan(notes_of(0), plan)
            sync_block()
            write_staged(t, i, first, last, start, size, slots, place, shares, noted_plan(notes_of(0)), scaling)
        else:
            skip(t + s, i, target, rows, results)
            clear(t, place, size, np.nan if is_bad(target, rows.classes) else 0.0)
        if s == 0:
            close(i, 1, rows, results)

    def finish_gradient(rows, shares, coefficients, scaling, results, records, plans):
        """Records (N, strips) -> statistics and plans (N,); a thread for a row."""
        i = int64(block()) * threads + thread()
        if i < rows.rows:
            target = target_of(i, rows, results)
            if is_read(target, rows):
                first, last = place_of(rows, i)
                found = fold(records + i * rows.strips * RECORD, rows.strips, row_rate(scaling))
                known = known_of(first, last, target, scaling)
                plan = of_row(i, first, last, known, found, target, shares, coefficients, scaling, rows, results)
                put_plan(plans + i * RECORD, plan)
            else:
                skip(0, i, target, rows, results)
        close(int64(block()) * threads, threads, rows, results)

    def strip_entries(rows, shares, scaling, results, plans, written):
        """(N, V) logits read again and plans (N,) -> entries; a block for a strip."""
        i = int64(block() // rows.strips)
        start = int64(block() - i * rows.strips) * strip_size
        size = strip_of(start, rows.classes)
        target = target_of(i, rows, results)
        place = written.out + (i * written.stride + start) * out_size
        if is_read(target, rows):
            first, last = place_of(rows, i)
            plan = plan_of(plans + i * RECORD)
            write_again(thread(), i, first, last, start, size, 0, place, shares, plan, scaling)
        else:
            clear(thread(), place, size, np.nan if is_bad(target, rows.classes) else 0.0)

    return Table(
        gradient=gradient, shared_gradient=shared_gradient, finish_gradient=finish_gradient, strip_entries=strip_entries
    )
