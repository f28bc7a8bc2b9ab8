"""The CPU backend: the verbs every backend has, each a loop of bounded launches over blocks of rows.

A launch is bounded so that Ctrl-C is answered between launches, and so that rows without a contiguous native view can
be gathered into a small buffer instead of being copied whole.
"""

import os

import numba
import numpy as np

from fastxent.backends.cpu import cache, kernels
from fastxent.backends.cpu.twins import Twins, threads_for
from fastxent.state import ABSENT, IGNORED, STRIP, LseState, Statistics

_LAUNCH = 1 << 26  # elements in one launch: some 10 ms
_ROWS = 1 << 18  # and rows, for their scratch
_GATHER = 1 << 20  # elements gathered at a time: a few megabytes, still in the cache when the kernel reads them

_statistics = Twins(kernels.statistics)
_statistics_and_gradient = Twins(kernels.statistics_and_gradient)
_accumulate = Twins(kernels.accumulate)
_logsumexp = Twins(kernels.logsumexp)
_log_softmax = Twins(kernels.log_softmax)
_softmax = Twins(kernels.softmax)


def why_unavailable():
    """None: the CPU is always there."""
    return None


def describe():
    """What a person may want to know of this backend, by name: threads, and where compiled kernels are kept."""
    threads, folder = numba.get_num_threads(), cache.folder()
    if folder is None:
        kept = "none: no folder can be written; kernels live in memory"
    else:
        kept = f"{folder}, {'writable' if os.access(folder, os.W_OK) else 'read only'}"
    return {"threads": f"{threads}, layer {numba.threading_layer()}", "kernel cache": kept}


def statistics(logits, targets, weight=None):
    """See `fastxent.backends.reference.statistics`."""
    result = Statistics.allocate(len(logits), weight is not None)
    weight, targets = _class_weights(weight), _read_only(targets)
    for rows, block in _blocks(logits):
        part = result[rows]
        strips, segments = _strips(block), _segments(block)
        _statistics(block.size, block, targets[rows], weight, segments, strips, part.nll, part.peak, part.gap)
    return result


def statistics_and_gradient(logits, targets, coefficients, out, weight=None):
    """See `fastxent.backends.reference.statistics_and_gradient`."""
    result = Statistics.allocate(len(logits), weight is not None)
    weight, targets = _class_weights(weight), _read_only(targets)
    for rows, block in _blocks(logits):
        part, terms = result[rows], out[rows]
        _statistics_and_gradient(
            block.size, block, targets[rows], weight, coefficients[rows], terms, _segments(block), _strips(block),
            part.nll, part.peak, part.gap,
        )  # fmt: skip
    return result


def accumulate(logits, targets, weight=None, vocab_start=0, state=None):
    """See `fastxent.backends.reference.accumulate`."""
    columns = LseState.empty(len(logits)).columns if state is None else state.columns.copy()
    here = (targets >= vocab_start) & (targets < vocab_start + logits.shape[1])
    local = _read_only(np.where(here, targets - vocab_start, np.where(targets == IGNORED, IGNORED, ABSENT)))
    weight = _class_weights(weight)
    for rows, block in _blocks(logits):
        _accumulate(block.size, block, local[rows], weight, _strips(block), columns[rows])
    return LseState(columns)


def logsumexp(logits):
    """See `fastxent.backends.reference.logsumexp`."""
    lse = np.empty(len(logits))
    for rows, block in _blocks(logits):
        _logsumexp(block.size, block, _strips(block), lse[rows])
    return lse


def log_softmax(logits, out):
    """See `fastxent.backends.reference.log_softmax`."""
    for rows, block in _blocks(logits):
        _log_softmax(block.size, block, _strips(block), out[rows])
    return out


def softmax(logits, out):
    """See `fastxent.backends.reference.softmax`."""
    for rows, block in _blocks(logits):
        _softmax(block.size, block, _strips(block), out[rows])
    return out


def _blocks(logits):
    """``rows, block``: slices of rows and their logits as a contiguous native array."""
    ready = isinstance(logits, np.ndarray) and logits.flags.aligned and logits.flags.c_contiguous
    ready = ready and logits.dtype.isnative
    size = min(_ROWS, max(1, (_LAUNCH if ready else _GATHER) // logits.shape[1]))
    for start in range(0, len(logits), size):
        rows = slice(start, min(len(logits), start + size))
        block = logits[rows] if ready else np.ascontiguousarray(logits[rows], logits.dtype.newbyteorder("="))
        yield rows, _read_only(block)


def _read_only(block):
    """A view that no kernel can write: read-only and writable arrays then share one compiled kernel."""
    view = block.view()
    view.flags.writeable = False
    return view


def _class_weights(weight):
    return None if weight is None else _read_only(np.ascontiguousarray(weight, np.float64))


def _strips(block):
    """Scratch for the sums of each row's strips."""
    return np.empty((len(block), -(-block.shape[1] // STRIP), 6))


def _segments(block):
    """How many runs of strips a row is cut into so that there is work for every thread; no bit depends on it."""
    threads = threads_for(block.size)
    if threads == 1 or len(block) >= 4 * threads:
        return 1
    return min(-(-block.shape[1] // STRIP), -(-4 * threads // len(block)))
