"""Where the rows and strips of a kernel are: what it is told of them, its shared memory, and a strip's record."""

from typing import NamedTuple

from fastxent.backends.cuda.forms import FORMS, of_kind
from fastxent.rowmath import Table

SLOTS = 16  # meetings of a block, each with eight bytes a warp in shared memory
RECORD = 64  # bytes of a strip's sums, and of a row's plan


class Rows(NamedTuple):
    """Addresses of logits (N, V), ``stride`` logits from row to row, and of targets (N,) int64; the numbers N, V and
    of strips a row; and where the number after that of a row whose target is out of range is noted, int64.
    """

    logits: int
    stride: int
    targets: int
    rows: int
    classes: int
    strips: int
    flag: int


@of_kind
def build_places(ops, kind):
    """Where a row and its strips lie, for the kernels of a kind, and what is known of it in shared memory."""
    itemsize, strip_size = FORMS[kind.form].itemsize, kind.strip
    function, int32, int64 = ops.function, ops.int32, ops.int64
    lanes, per_block, meetings = FORMS[kind.form].lanes, kind.rows, meeting_bytes(kind)

    @function
    def row_rate(scaling):
        return scaling.row_high, scaling.row_low, scaling.row_nats

    @function
    def is_bad(target, classes):
        return target >= classes

    @function
    def place_of(rows, i):
        first = rows.logits + i * rows.stride * itemsize
        return first, first + rows.classes * itemsize

    @function
    def notes_of(number):
        """Where in shared memory `RECORD` bytes of one of a block's rows are."""
        return int32(meetings + number * RECORD)

    @function
    def slots_of(number, each, classes):
        """Where in shared memory the words of one of a block's rows wait, whose groups have ``each`` rows. A word
        before the first and one after the last may be read, as nonsense.
        """
        words = int32((int32(min(classes, int64(strip_size))) + lanes - 1) // lanes)
        return int32(meetings + per_block * each * RECORD + 16 + number * words * 16)

    @function
    def strip_of(start, classes):
        return int32(min(classes - start, int64(strip_size)))

    return Table(
        row_rate=row_rate,
        is_bad=is_bad,
        place_of=place_of,
        notes_of=notes_of,
        slots_of=slots_of,
        strip_of=strip_of,
    )


@of_kind
def build_notes(function, load, store):
    """What is known of a strip or a row in the memory of ``load`` and ``store``, float64: ``put_record`` of a strip,
    ``row_of`` that of a strip which is all of its row; ``put_plan`` and ``plan_of`` a row; and ``put_seven`` numbers.
    """

    @function
    def put_six(at, a, b, c, d, e, f):
        store(at, a)
        store(at + 8, b)
        store(at + 16, c)
        store(at + 24, d)
        store(at + 32, e)
        store(at + 40, f)

    @function
    def put_seven(at, a, b, c, d, e, f, g):
        put_six(at, a, b, c, d, e, f)
        store(at + 48, g)

    @function
    def put_record(at, record):
        base, exponent, total, peak, gap, mass, best, index = record
        put_seven(at, base, exponent, total, peak, gap, mass, best)
        store(at + 56, index)

    @function
    def row_of(at):
        return (
            load(at), load(at + 8), load(at + 16), 0.0, load(at + 24), load(at + 32), load(at + 40), load(at + 48),
            load(at + 56),
        )  # fmt: skip

    @function
    def put_plan(at, plan):
        put_six(at, plan[0], plan[1], plan[2], plan[3], plan[4], plan[5])

    @function
    def plan_of(at):
        return load(at), load(at + 8), load(at + 16), load(at + 24), load(at + 32), load(at + 40)

    return Table(put_seven=put_seven, put_record=put_record, row_of=row_of, put_plan=put_plan, plan_of=plan_of)


def meeting_bytes(kind):
    """Shared memory for what a group's threads tell each other, and the threads of a block at its end."""
    return SLOTS * 8 * max(1, kind.threads // 32)


def shared_bytes(kind, classes=0, staged=False, each=1):
    """Dynamic shared memory of a block whose groups have ``each`` rows: of each a record, later a plan, and where rows
    are staged their words, with one before and one after them all.
    """
    words = -(-min(classes, kind.strip) // FORMS[kind.form].lanes) if staged else 0
    return meeting_bytes(kind) + kind.rows * each * (RECORD + words * 16) + 32 * staged
