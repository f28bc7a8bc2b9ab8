"""Kernels that add blocks of classes to states, and of a gradient by a state what a row's own class needs."""

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.places import RECORD, build_notes, build_places
from fastxent.backends.cuda.words import build_point
from fastxent.rowmath import Table
from fastxent.state import IGNORED

KERNELS = ("finish_state", "slope_of_targets")


@of_kind
def build(ops, kind):
    """The kernels of a kind, by name."""
    algebra, at, logit_of = rowmath.build_rows(ops), build_places(ops, kind), build_point(ops, kind).logit
    join, add_gap, row_rate, place_of, is_bad = algebra.join, algebra.add_gap, at.row_rate, at.place_of, at.is_bad
    put_seven = build_notes(ops.function, ops.load_float64, ops.store_float64).put_seven
    load_int64, load_float64, store_float64 = ops.load_int64, ops.load_float64, ops.store_float64
    thread, block, threads, function, int64 = ops.thread, ops.block, kind.threads, ops.function, ops.int64

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

    return Table(finish_state=finish_state, slope_of_targets=slope_of_targets)
