"""Which kernels make a verb, on rows that are on the device already. Nothing is copied, nothing is waited for.

A ``slot`` has the machine, a stream of it, and memory of its own for what kernels leave each other.
"""

import numpy as np

from fastxent.backends.cuda.finish import RECORD
from fastxent.backends.cuda.kernels import shared_bytes


def statistics(slot, kind, given, shares, scaling, results):
    """Statistics of rows."""
    if given.strips == 1:
        _launch(slot, "statistics", kind, (given, shares, scaling, results), _groups(kind, given))
    else:
        records = _sum_strips(slot, kind, given, shares, scaling)
        _launch_rows(slot, "finish_statistics", kind, (given, shares, scaling, results, records))


def entries(slot, kind, given, shares, of_loss, scaling, results, place, in_place, **how):
    """Statistics of rows, and their gradient or log-softmax; ``how`` says which, and in what format."""
    staged = shared_bytes(kind, True)
    if given.strips == 1:
        arguments = given, shares, of_loss, scaling, results, place
        _launch(slot, "gradient", kind, arguments, _groups(kind, given), shared=staged, **how)
    elif given.strips <= slot.machine.together and not in_place:
        blocks = given.rows * given.strips
        records, tickets = slot.reserve("records", (blocks, RECORD), np.uint8), slot.zeros("tickets", 1 + blocks)
        waiting = given, shares, of_loss, scaling, results, records, tickets, place
        _launch(slot, "shared_gradient", kind, waiting, blocks, shared=staged, **how)
    else:
        records = _sum_strips(slot, kind, given, shares, scaling)
        plans = slot.reserve("plans", (given.rows, RECORD), np.uint8)
        finish = given, shares, of_loss, scaling, results, records, plans
        _launch_rows(slot, "finish_gradient", kind, finish, **how)
        _launch(slot, "strip_entries", kind, (given, shares, scaling, plans, place), given.rows * given.strips, **how)


def accumulate(slot, kind, given, shares, scaling, columns):
    """The sums of rows added to their states."""
    records = _sum_strips(slot, kind, given, shares, scaling)
    _launch_rows(slot, "finish_state", kind, (given, shares, scaling, records, columns))


def binary(slot, kind, elements, losses, gradient):
    """Losses of elements, and their gradient unless its address is 0."""
    _launch(slot, "binary", kind, (elements, losses, gradient), -(-elements.size // (kind.threads * kind.rows)))


def _sum_strips(slot, kind, given, shares, scaling):
    records = slot.reserve("records", (given.rows * given.strips, RECORD), np.uint8)
    _launch(slot, "strip_sums", kind, (given, shares, scaling, records), given.rows * given.strips)
    return records


def _groups(kind, given):
    """Blocks of whole rows."""
    return -(-given.rows // kind.rows)


def _launch_rows(slot, name, kind, arguments, **how):
    """A kernel with a thread for a row."""
    _launch(slot, name, kind, arguments, -(-arguments[0].rows // (kind.threads * kind.rows)), **how)


def _launch(slot, name, kind, arguments, blocks, shared=None, **how):
    shared = shared_bytes(kind, False) if shared is None else shared
    slot.machine.launch(slot.stream, name, kind, arguments, blocks, shared=shared, **how)
