"""The kernels. Each is built for one `Kind` over the functions of a GPU, real (`primitives`) or not (`simulated`).

A row of no more than a strip is one group's business from the first logit to the last entry of the gradient. A group
takes some rows one after the other, and then each thread of the block ends one of them: what is made of a row's sums is
a long way for a single thread, and no longer for many side by side. A longer row is cut into strips, each a block's:
`sums` leaves a record of each, `finish` joins a row's records in order, `write` writes the gradient strip by strip;
`shared_gradient` does all three at once, its blocks waiting for each other.
How a row is cut depends on its length alone, and so do the bits of its results.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda import ends as verbs
from fastxent.backends.cuda import losses
from fastxent.backends.cuda.finish import build_finish, build_fold
from fastxent.backends.cuda.places import RECORD, SLOTS, build_notes, build_places
from fastxent.backends.cuda.registers import build_record, fits
from fastxent.backends.cuda.sums import build_sums
from fastxent.backends.cuda.words import build_point
from fastxent.backends.cuda.write import build_write
from fastxent.state import IGNORED

ENDS = {"verb": verbs.build, "loss": losses.build_ends}


class Written(NamedTuple):
    """Address and stride of the output."""

    out: int
    stride: int


def build(ops, kind, written=None, entries="gradient", ends="verb"):
    """The kernels of a kind, by name; ``written`` is the format of the output, None where nothing is written.

    ``ends``: whose rows they are, a "verb"'s with `Results` and `Coefficients` or those of a "loss" with `Loss` and
    `Upstream`.
    """
    of_ends = ENDS[ends](ops, kind)
    target_of, note_bad, ignore, close = of_ends.target_of, of_ends.note_bad, of_ends.ignore, of_ends.close
    sums, row_algebra, point = build_sums(ops, kind), rowmath.build_rows(ops), build_point(ops, kind)
    stored, logit_of, form = point.stored, point.logit, ops.form(kind.form)
    load_one, store_one, lowest, real_size = (
        form.load_one, form.store_one, form.real(-np.inf), np.dtype(form.real).itemsize
    )  # fmt: skip
    join, add_gap, to_float64 = row_algebra.join, row_algebra.add_gap, ops.to_float64
    at, finish, fold = build_places(ops, kind), build_finish(ops, kind, of_ends), build_fold(ops, kind)
    record_of = build_record(ops, kind, sums) if sums.plain and fits(ops, kind) else sums.record_of
    is_bad, place_of, strip_of, slots_of = at.is_bad, at.place_of, at.strip_of, at.slots_of
    in_memory = build_notes(ops.function, ops.load_float64, ops.store_float64)
    in_shared = build_notes(ops.function, ops.shared_load_float64, ops.shared_store_float64)
    row_rate, notes_of, put_seven, put_record = at.row_rate, at.notes_of, in_memory.put_seven, in_memory.put_record
    note_record, noted_row, note_plan, noted_plan = (
        in_shared.put_record, in_shared.row_of, in_shared.put_plan, in_shared.plan_of
    )  # fmt: skip
    put_plan, plan_of = in_memory.put_plan, in_memory.plan_of
    plain, known_of, of_row = finish.plain, finish.known_of, getattr(finish, entries)
    load_int64, load_float64, store_float64 = ops.load_int64, ops.load_float64, ops.store_float64
    thread, block, anew = ops.thread, ops.block, ops.anew
    threads, per_block, strip_size = kind.threads, kind.rows, kind.strip
    largest, function, int32, int64 = kind.largest, ops.function, ops.int32, ops.int64
    fetch_add, publish, wait_for, sync_block = ops.fetch_add, ops.publish, ops.wait_for, ops.sync_block
    shared_put, shared_get = ops.shared_store_float64, ops.shared_load_float64
    ticket_at = (SLOTS - 1) * 8 * max(1, threads // 32)
    if written is not None:
        out_size = ops.form(written).itemsize
        write_staged, clear = build_write(ops, kind, written, True, entries)
        write_again, _ = build_write(ops, kind, written, False, entries)

    @function
    def skip(t, i, target, rows, results):
        """The results of a row that is not read."""
        if t == 0:
            bad = is_bad(target, rows.classes)
            ignore(i, np.nan if bad else 0.0, rows, results)
            if bad:
                note_bad(i, rows, results)

    @function
    def sum_strip(t, i, start, slots, target, rows, shares, scaling):
        """A group's sums of the strip of row ``i`` from class ``start`` on."""
        first, last = place_of(rows, i)
        size = strip_of(start, rows.classes)
        gone = int32(-1)
        if not largest and target >= start and target < start + size:
            gone = int32(target - start)
        return record_of(t, i, first, last, start, size, gone, shares, scaling, slots)

    @function
    def is_read(target, rows):
        return target != IGNORED and not is_bad(target, rows.classes)

    @function
    def first_row(each):
        """Of a group among those of its block, which have ``each`` rows, and of the block."""
        return int32(thread() // threads * int32(each)), int64(block()) * per_block * each

    @function
    def goes_on(k, each, of_block, rows):
        """Whether row ``k`` of the block is one more of the group before; ``each`` is a power of two."""
        return k & int32(anew(each) - 1) != 0 and of_block + k < rows.rows

    @function
    def sum_in_turn(rows, shares, scaling, results, each, is_staged):
        """The records of a block's rows, a group's one after the other, and their words where these are staged."""
        t, (k, of_block) = thread() % threads, first_row(each)
        left = of_block + k < rows.rows
        while left:
            i = of_block + k
            target = target_of(i, rows, results)
            if is_read(target, rows):
                slots = slots_of(k, each, rows.classes) if is_staged else int32(-1)
                record = sum_strip(t, i, int64(0), slots, target, rows, shares, scaling)
                if t == 0:
                    note_record(notes_of(k), record)
            k = int32(k + 1)
            left = goes_on(k, each, of_block, rows)
        sync_block()
        return of_block

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

    def strip_sums(rows, shares, scaling, results, records):
        """(N, V) logits read once -> records (N, strips); a block for a strip."""
        i = int64(block() // rows.strips)
        s = int64(block() - i * rows.strips)
        target = target_of(i, rows, results)
        if is_read(target, rows):
            record = sum_strip(thread(), i, s * strip_size, -1, target, rows, shares, scaling)
            if thread() == 0:
                put_record(records + (i * rows.strips + s) * RECORD, record)

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

    def settle_lse(rows, lse):
        """Logsumexps (N,) that are NaN -> the largest logit, an infinity, where none of the row is NaN; a thread for a
        row.
        """
        i = int64(block()) * threads * per_block + thread()
        if i < rows.rows:
            highest = load_one(lse + i * real_size)
            if highest != highest:
                first, last = place_of(rows, i)
                highest, k = lowest, int64(0)
                while k < rows.classes and highest == highest:
                    x = stored(first, last, k)
                    highest, k = (highest if x <= highest else x), k + 1
                if highest - highest != 0.0:
                    store_one(lse + i * real_size, highest)

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

    @function
    def add_to_state(i, target, rows, shares, scaling, records, at):
        """A row's records joined to its state at ``at``, the target's own logit beside them."""
        base, exponent = load_float64(at), load_float64(at + 8)
        total, low = load_float64(at + 16), load_float64(at + 24)
        top, gap, mass, rate = -np.inf, 0.0, 0.0, row_rate(scaling)
        for s in range(rows.strips):
            record = records + s * RECORD
            base, exponent, total, low = join(
                base, exponent, total, low,
                load_float64(record), load_float64(record + 8), load_float64(record + 16), 0.0, rate,
            )  # fmt: skip
            top, gap, mass = add_gap(
                top, gap, mass, load_float64(record + 24), load_float64(record + 32), load_float64(record + 40)
            )
        top, gap, mass = add_gap(
            load_float64(at + 32), load_float64(at + 40), load_float64(at + 48),
            top, gap * shares.scale, mass * shares.scale,
        )  # fmt: skip
        put_seven(at, base, exponent, total, low, top, gap, mass)
        if target >= 0:
            first, last = place_of(rows, i)
            store_float64(at + 56, logit_of(first, last, target, scaling)[0])
            store_float64(at + 64, load_float64(at + 64) + 1.0)

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

    def slope_of_targets(rows, scaling, plans):
        """Plans (N,) made elsewhere: the entry of a target in these classes times its slope; a thread for a row."""
        i = int64(block()) * threads + thread()
        if i < rows.rows:
            target = load_int64(rows.targets + i * 8)
            if target >= 0 and not is_bad(target, rows.classes):
                first, last = place_of(rows, i)
                own = plans + i * RECORD + 32
                store_float64(own, load_float64(own) * logit_of(first, last, target, scaling)[1])

    def finish_state(rows, shares, scaling, records, columns):
        """Records (N, strips) added to columns (N, 9), in the order of `fastxent.state.FIELDS`; a thread for a row."""
        i = int64(block()) * threads + thread()
        if i < rows.rows:
            target = load_int64(rows.targets + i * 8)
            if target != IGNORED:
                add_to_state(i, target, rows, shares, scaling, records + i * rows.strips * RECORD, columns + i * 72)

    kernels = {
        "statistics": statistics,
        "strip_sums": strip_sums,
        "finish_statistics": finish_statistics,
        "finish_state": finish_state,
        "settle_lse": settle_lse,
        "slope_of_targets": slope_of_targets,
    }
    if written is not None:
        kernels |= {
            "gradient": gradient,
            "shared_gradient": shared_gradient,
            "finish_gradient": finish_gradient,
            "strip_entries": strip_entries,
        }
    return SimpleNamespace(**kernels)
