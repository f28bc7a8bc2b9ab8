"""The CPU backend: the verbs every backend has, each a loop of bounded launches over blocks of rows.

A launch is bounded so that Ctrl-C is answered between launches, and so that rows without a contiguous native view can
be gathered into a small buffer instead of being copied whole.
"""

import contextlib
import functools
import os

import numba
import numpy as np

from fastxent import rowmath
from fastxent.backends.cpu import cache, kernels
from fastxent.backends.cpu.formats import viewed
from fastxent.backends.cpu.twins import Twins, threads_for
from fastxent.state import ABSENT, IGNORED, LARGEST, STRIP, LseState, Statistics

_LAUNCH = 1 << 26  # elements in one launch: some 10 ms
_ROWS = 1 << 18  # and rows, for their scratch
_GATHER = 1 << 20  # elements gathered at a time: a few megabytes, still in the cache when the kernel reads them


_statistics = Twins(kernels.statistics)
_statistics_and_gradient = Twins(kernels.statistics_and_gradient)
_accumulate = Twins(kernels.accumulate)
_log_softmax = Twins(kernels.log_softmax)
KERNELS = (_statistics, _statistics_and_gradient, _accumulate, _log_softmax)


def _read_only(block):
    """A view that no kernel can write: read-only and writable arrays then share one compiled kernel."""
    view = block.view()
    view.flags.writeable = False
    return view


_NO_PROBABILITIES = _read_only(np.empty((0, 0)))
_NOTHING_SPREAD = kernels.Shares(_read_only(np.empty(0)), _NO_PROBABILITIES, 0.0, 1.0)


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
    targets, scaling = _read_only(targets), _scaling(logits.dtype)
    for rows, block in _blocks(logits):
        shares, segments = _shares(weight), _segments(block, targets)
        _statistics(block.size, block, targets[rows], shares, scaling, segments, _strips(block), _results(result[rows]))
    return result


def statistics_and_gradient(logits, targets, coefficients, out, weight=None):
    """See `fastxent.backends.reference.statistics_and_gradient`."""
    result = Statistics.allocate(len(logits), weight is not None)
    targets, scaling = _read_only(targets), _scaling(logits.dtype)
    for rows, block in _blocks(logits):
        with _written(out[rows], logits.dtype) as written:
            _statistics_and_gradient(
                block.size, block, targets[rows], _shares(weight), coefficients[rows], scaling, written,
                _segments(block, targets), _strips(block), _results(result[rows]),
            )  # fmt: skip
    return result


def accumulate(logits, targets, weight=None, vocab_start=0, state=None):
    """See `fastxent.backends.reference.accumulate`."""
    columns = LseState.empty(len(logits)).columns if state is None else state.columns.copy()
    here = (targets >= vocab_start) & (targets < vocab_start + logits.shape[1])
    local = _read_only(np.where(here, targets - vocab_start, np.where(targets == IGNORED, IGNORED, ABSENT)))
    for rows, block in _blocks(logits):
        scaling, strips = _scaling(logits.dtype), _strips(block)
        _accumulate(block.size, block, local[rows], _shares(weight), scaling, strips, columns[rows])
    return LseState(columns)


def logsumexp(logits):
    """See `fastxent.backends.reference.logsumexp`."""
    found = statistics(logits, np.full(len(logits), LARGEST))
    with np.errstate(invalid="ignore"):
        lse = found.target_logit + found.nll
    # a row that holds infinities: one that is NaN too stays NaN
    for i in np.flatnonzero(np.isinf(found.target_logit)):
        lse[i] = logits[i : i + 1][0].astype(np.float64).max()
    return lse


def log_softmax(logits, out):
    """See `fastxent.backends.reference.log_softmax`."""
    scaling = _scaling(logits.dtype)
    for rows, block in _blocks(logits):
        with _written(out[rows], logits.dtype) as written:
            _log_softmax(block.size, block, _shares(None), scaling, _strips(block), written)
    return out


def softmax(logits, out):
    """See `fastxent.backends.reference.softmax`."""
    coefficients = np.tile((0.0, 0.0, 1.0), (len(logits), 1))
    statistics_and_gradient(logits, np.full(len(logits), LARGEST), coefficients, out)
    return out


def _blocks(logits):
    """``rows, block``: slices of rows and their logits as a contiguous native array."""
    ready = isinstance(logits, np.ndarray) and logits.flags.aligned and logits.flags.c_contiguous
    ready = ready and logits.dtype.isnative
    size = min(_ROWS, max(1, (_LAUNCH if ready else _GATHER) // logits.shape[1]))
    for start in range(0, len(logits), size):
        rows = slice(start, min(len(logits), start + size))
        block = logits[rows] if ready else np.ascontiguousarray(logits[rows], logits.dtype.newbyteorder("="))
        yield rows, _read_only(viewed(block))


@contextlib.contextmanager
def _written(out, logits_dtype):
    """An array for a kernel to write that ends up in ``out``: itself where a kernel for its dtype exists."""
    own = np.dtype(np.float64 if logits_dtype.itemsize == 8 else np.float32)
    if out.dtype == own or (out.dtype == logits_dtype and out.dtype.itemsize == 2):
        yield viewed(out)
    else:
        yield (written := np.empty(out.shape, own))
        with np.errstate(over="ignore"):
            out[:] = written


def _shares(weight):
    if weight is None:
        return _NOTHING_SPREAD
    weight = np.ascontiguousarray(weight, np.float64)
    return kernels.Shares(_read_only(weight), _NO_PROBABILITIES, 0.0, 1.0)


@functools.cache
def _scaling(dtype):
    real = np.float64 if dtype.itemsize == 8 else np.float32
    return kernels.Scaling(*rowmath.rate(real), *rowmath.rate(np.float64))


def _results(statistics):
    return kernels.Results(statistics.nll, statistics.target_logit, statistics.peak, statistics.gap)


def _strips(block):
    """Scratch for the sums of each row's strips."""
    return np.empty((len(block), -(-block.shape[1] // STRIP), 6))


def _segments(block, targets):
    """How many runs of strips a row is cut into so that there is work for every thread; no bit depends on it."""
    threads = threads_for(block.size)
    if threads == 1 or len(block) >= 4 * threads or targets[0] == LARGEST:
        return 1
    return min(-(-block.shape[1] // STRIP), -(-4 * threads // len(block)))
