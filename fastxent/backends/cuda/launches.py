"""Which kernels make a verb, on rows that are on the device already. Nothing is copied, nothing is waited for.

A ``slot`` has the machine, a stream of it, and memory of its own for what kernels leave each other.
"""

import functools

import numpy as np

from fastxent.backends.cuda.ends import NO_RESULTS
from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.largest import ENTRY
from fastxent.backends.cuda.losses import GROUP, Loss
from fastxent.backends.cuda.places import RECORD, shared_bytes
from fastxent.backends.cuda.scores import MOMENTS

_MOST_ROWS = 32  # of a group
_END = 1 << 15  # bytes 256 threads read, by an estimate, in the time in which they end a row each


def statistics(slot, kind, given, shares, scaling, results):
    """`Results` of rows, or their `Loss`."""
    how = {"ends": _ends_of(results)}
    if given.strips == 1:
        each, groups, shared = _shared_out(slot.machine, kind, given, False)
        _launch(slot, "statistics", kind, (given, shares, scaling, results, each), groups, shared=shared, **how)
    else:
        records = _sum_strips(slot, kind, given, shares, scaling, results)
        _launch_rows(slot, "finish_statistics", kind, (given, shares, scaling, results, records), **how)


def entries(slot, kind, given, shares, of_loss, scaling, results, place, in_place, **how):
    """`statistics` of rows, and their gradient or log-softmax; ``how`` says which, and in what format."""
    how = how | {"ends": _ends_of(results)}
    if given.strips == 1:
        each, groups, shared = _shared_out(slot.machine, kind, given, True)
        arguments = given, shares, of_loss, scaling, results, place, each
        _launch(slot, "gradient", kind, arguments, groups, shared=shared, **how)
    elif given.strips <= slot.machine.together and not (in_place and kind.largest):
        blocks = given.rows * given.strips
        records, tickets = slot.reserve("records", (blocks, RECORD), np.uint8), slot.zeros("tickets", 1 + blocks)
        waiting = given, shares, of_loss, scaling, results, records, tickets, place
        shared = shared_bytes(kind, given.classes, True)
        _launch(slot, "shared_gradient", kind, waiting, blocks, shared=shared, **how)
    else:
        records = _sum_strips(slot, kind, given, shares, scaling, results)
        plans = slot.reserve("plans", (given.rows, RECORD), np.uint8)
        finish = given, shares, of_loss, scaling, results, records, plans
        _launch_rows(slot, "finish_gradient", kind, finish, **how)
        again = given, shares, scaling, results, plans, place
        _launch(slot, "strip_entries", kind, again, given.rows * given.strips, **how)


def accumulate(slot, kind, given, shares, scaling, columns):
    """The sums of rows added to their states."""
    records = _sum_strips(slot, kind, given, shares, scaling, NO_RESULTS)
    _launch_rows(slot, "finish_state", kind, (given, shares, scaling, records, columns))


def score(slot, kind, given, shares, scaling, found, known):
    """Scores of rows, and what is known of each for log-probabilities."""
    strips = given.rows * given.strips
    records, moments = (
        slot.reserve("records", (strips, RECORD), np.uint8),
        slot.reserve("moments", (strips, MOMENTS), np.uint8),
    )
    largest = slot.reserve("largest", (strips, found.kept, ENTRY), np.uint8)
    arguments = given, shares, scaling, records, moments, largest, found.kept
    shared = shared_bytes(kind, given.classes, found.kept > 0)
    _launch(slot, "strip_scores", kind, arguments, _groups(kind, given), shared=shared)
    _launch_rows(slot, "finish_scores", kind, (given, scaling, records, moments, largest, found, known))


def log_probs(slot, kind, given, scaling, known, picked):
    """Log-probabilities of some classes of each scored row."""
    _launch(
        slot,
        "log_probs",
        kind,
        (given, scaling, known, picked),
        -(-given.rows * picked.each // (kind.threads * kind.rows)),
    )


def gradient(slot, kind, given, shares, scaling, plans, place, **how):
    """Entries of rows whose plans are made."""
    if kind.capped:
        _launch_rows(slot, "slope_of_targets", kind, (given, scaling, plans))
    entries = given, shares, scaling, NO_RESULTS, plans, place
    _launch(slot, "strip_entries", kind, entries, given.rows * given.strips, **how)


def count(slot, kind, given, levels, counts):
    """How many logits of each row are above and level with its number, added to ``counts``."""
    _launch(slot, "strip_counts", kind, (given, levels, counts), _groups(kind, given))


def divergences(slot, kind, given, beside, scaling, parts):
    """What each strip adds to two divergences."""
    _launch(slot, "strip_divergences", kind, (given, beside, scaling, parts), _groups(kind, given))


def binary(slot, kind, elements, losses, gradient):
    """Losses of elements, and their gradient unless its address is 0."""
    _launch(slot, "binary", kind, (elements, losses, gradient), -(-elements.size // (kind.threads * kind.rows)))


def total_weight(slot, kind, given, results, divisor):
    """What a mean of the losses of rows is divided by."""
    _launch(slot, "total_weight", kind, (given, results, divisor), -(-given.rows // GROUP))


def total_loss(slot, kind, given, results):
    """The sum of losses that are there, of no rows too."""
    _launch(slot, "total_loss", kind, (given, results), max(1, -(-given.rows // GROUP)))


def settle_lse(slot, kind, given, lse):
    """Logsumexps of rows that hold infinities."""
    _launch_rows(slot, "settle_lse", kind, (given, lse))


def _ends_of(results):
    return "loss" if isinstance(results, Loss) else "verb"


def _sum_strips(slot, kind, given, shares, scaling, results):
    records = slot.reserve("records", (given.rows * given.strips, RECORD), np.uint8)
    arguments, ends = (given, shares, scaling, results, records), _ends_of(results)
    _launch(slot, "strip_sums", kind, arguments, given.rows * given.strips, ends=ends)
    return records


def _groups(kind, given):
    """Blocks for all strips."""
    return -(-given.rows * given.strips // kind.rows)


def _shared_out(machine, kind, given, staged):
    """How many rows a group has, of how many blocks, and their shared memory."""
    share = machine.layout.threads // (kind.threads * kind.rows)
    at_once, most = machine.at_once * share, machine.layout.shared // share
    each = _rows_of_group(kind, given.rows, given.classes, staged, at_once, most, _END // share)
    return each, -(-given.rows // (kind.rows * each)), shared_bytes(kind, given.classes, staged, each)


@functools.lru_cache(maxsize=4096)
def _rows_of_group(kind, rows, classes, staged, at_once, most, end):
    """That with which all blocks are over first, if one takes the time it reads in, and as long as for ``end`` bytes to
    end its rows. A power of two, so that a block's rows are as many as its threads or fewer, and all of one of the
    groups of `GROUP` rows that are summed together.
    """

    def duration(each):
        in_turn = -(-rows // (kind.rows * each * at_once))
        return in_turn * (kind.rows * each * classes * FORMS[kind.form].itemsize + end)

    choices = [1 << power for power in range(min(kind.threads, _MOST_ROWS).bit_length())]
    room = [each for each in choices if each == 1 or shared_bytes(kind, classes, staged, each) <= most]
    return min(room, key=duration)


def _launch_rows(slot, name, kind, arguments, **how):
    """A kernel with a thread for a row."""
    _launch(slot, name, kind, arguments, -(-arguments[0].rows // (kind.threads * kind.rows)), **how)


def _launch(slot, name, kind, arguments, blocks, shared=None, **how):
    shared = shared_bytes(kind) if shared is None else shared
    if blocks:
        slot.machine.launch(slot.stream, name, kind, arguments, blocks, shared=shared, **how)
