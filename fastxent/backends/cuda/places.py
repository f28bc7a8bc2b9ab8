"""Where the rows and strips of a kernel are: what it is told of them, its shared memory, and a strip's record."""

from types import SimpleNamespace
from typing import NamedTuple

from fastxent.backends.cuda.forms import FORMS

SLOTS = 16  # meetings of a block, each with eight bytes a warp in shared memory


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


def build_places(ops, kind):
    """Where a row and its strips lie, and ``put_record`` of a strip, for the kernels of a kind."""
    itemsize, threads, strip_size = FORMS[kind.form].itemsize, kind.threads, kind.strip
    function, int32, int64, store_float64 = ops.function, ops.int32, ops.int64, ops.store_float64
    slots_bytes = stage_bytes(kind)

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
    def slots_of(group):
        """Where a group's words wait in shared memory."""
        return SLOTS * 8 * (threads // 32) + group * slots_bytes + 16

    @function
    def strip_of(start, classes):
        return int32(min(classes - start, int64(strip_size)))

    @function
    def put_seven(at, a, b, c, d, e, f, g):
        store_float64(at, a)
        store_float64(at + 8, b)
        store_float64(at + 16, c)
        store_float64(at + 24, d)
        store_float64(at + 32, e)
        store_float64(at + 40, f)
        store_float64(at + 48, g)

    @function
    def put_record(at, record):
        base, exponent, total, peak, gap, mass, best, index = record
        put_seven(at, base, exponent, total, peak, gap, mass, best)
        store_float64(at + 56, index)

    return SimpleNamespace(
        row_rate=row_rate,
        is_bad=is_bad,
        place_of=place_of,
        slots_of=slots_of,
        strip_of=strip_of,
        put_seven=put_seven,
        put_record=put_record,
    )


def stage_bytes(kind):
    """Shared memory for the words of a strip, and one at each end."""
    return (-(-kind.strip // FORMS[kind.form].lanes) + 2) * 16


def shared_bytes(kind, staged):
    """Dynamic shared memory of a block."""
    return SLOTS * 8 * max(1, kind.threads // 32) + (kind.rows * stage_bytes(kind) if staged else 0)
