"""How a block takes the rows that are its own: each summed by a group, one after the other, before any of them ends."""

import numpy as np

from fastxent.backends.cuda.ends import build_ends
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.places import build_notes, build_places
from fastxent.backends.cuda.registers import build_record, fits
from fastxent.backends.cuda.sums import build_sums, is_plain
from fastxent.rowmath import Table
from fastxent.state import IGNORED


@of_kind
def build_turns(ops, kind, ends):
    """``sum_in_turn`` the rows of a block, ``first_row`` and whether one more ``goes_on``; of one row, whether it
    ``is_read``, ``sum_strip`` of it, or ``skip``.
    """
    of_ends, at, sums = build_ends(ops, kind, ends), build_places(ops, kind), build_sums(ops, kind)
    record_of = build_record(ops, kind) if is_plain(ops, kind) and fits(ops, kind) else sums.record_of
    target_of, note_bad, ignore = of_ends.target_of, of_ends.note_bad, of_ends.ignore
    is_bad, place_of, strip_of, slots_of, notes_of = at.is_bad, at.place_of, at.strip_of, at.slots_of, at.notes_of
    note_record = build_notes(ops.function, ops.shared_load_float64, ops.shared_store_float64).put_record
    thread, block, anew, sync_block = ops.thread, ops.block, ops.anew, ops.sync_block
    threads, per_block, largest = kind.threads, kind.rows, kind.largest
    function, int32, int64 = ops.function, ops.int32, ops.int64

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

    return Table(
        skip=skip, sum_strip=sum_strip, is_read=is_read, first_row=first_row, goes_on=goes_on, sum_in_turn=sum_in_turn
    )
