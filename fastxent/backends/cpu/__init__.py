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
from fastxent.backends.cpu import binary as binary_kernel
from fastxent.backends.cpu import cache, kernels, scores, strided
from fastxent.backends.cpu import divergences as divergences_kernel
from fastxent.backends.cpu.columns import FEW
from fastxent.backends.cpu.formats import viewed
from fastxent.backends.cpu.twins import Twins, threads_for
from fastxent.checks import loss_dtype
from fastxent.rows import Masked, Rows, boxes, pitch
from fastxent.state import LARGEST, STRIP, Coefficients, LseState, RowScores, Statistics, in_block

_LAUNCH = 1 << 25  # elements in one launch: some 5 ms, and a tenth of a second in float64 with a softcap
_ROWS = 1 << 18  # and rows, for their scratch
_SMALL = 1 << 18  # elements that lie as a kernel reads them are one launch, whatever there may be to find out
_BINARY = 8  # an element of a binary loss is as much work as so many others
_GATHER = 1 << 20  # elements gathered at a time: a few megabytes, still in the cache when the kernel reads them
_NOUGHT = np.zeros(1)
_LINE = 64  # rows gathered at a time where four times that allows it: neighbours along the rows share cache lines


_statistics = Twins(kernels.statistics)
_statistics_and_gradient = Twins(kernels.statistics_and_gradient)
_accumulate = Twins(kernels.accumulate)
_gradient = Twins(kernels.gradient)
_log_softmax = Twins(kernels.log_softmax)
_score = Twins(scores.score)
_count = Twins(scores.count)
_divergences = Twins(divergences_kernel.divergences)
_binary = Twins(binary_kernel.binary)
KERNELS = (
    _statistics, _statistics_and_gradient, _accumulate, _gradient, _log_softmax, _score, _count, _divergences, _binary,
)  # fmt: skip


def _read_only(block):
    """A view that no kernel can write: read-only and writable arrays then share one compiled kernel."""
    if not block.flags.writeable:
        return block
    view = block.view()
    view.flags.writeable = False
    return view


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


def statistics(logits, targets, *, spread=None, softcap=None, temperature=1.0, wanted=()):
    """See `fastxent.backends.reference.statistics`."""
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    classes = logits.shape[1]
    targets, scaling = _read_only(targets), _scaling(logits.dtype, softcap, temperature)
    for rows, block, shares in _blocks(logits, spread):
        _statistics(
            len(block) * classes, block, classes, targets[rows], shares, scaling,
            _segments(classes, targets[rows]), _strips(block, classes), _results(result.of(rows)),
        )  # fmt: skip
    return result


def statistics_and_gradient(
    logits, targets, coefficients, out, *, spread=None, softcap=None, temperature=1.0, wanted=()
):
    """See `fastxent.backends.reference.statistics_and_gradient`."""
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    classes = logits.shape[1]
    targets, scaling = _read_only(targets), _scaling(logits.dtype, softcap, temperature)
    for rows, block, shares in _blocks(logits, spread, out):
        with _written(out, rows, logits.dtype) as written:
            _statistics_and_gradient(
                len(block) * classes, block, classes, targets[rows], shares, _coefficients(coefficients, rows), scaling,
                written, _segments(classes, targets[rows]), _strips(block, classes), _results(result.of(rows)),
            )  # fmt: skip
    return result


def accumulate(logits, targets, *, spread=None, vocab_start=0, state=None, softcap=None, temperature=1.0):
    """See `fastxent.backends.reference.accumulate`."""
    result = LseState.empty(len(logits), softcap, temperature) if state is None else state.copy()
    classes = logits.shape[1]
    local, scaling = _read_only(in_block(targets, logits, vocab_start)), _scaling(logits.dtype, softcap, temperature)
    for rows, block, shares in _blocks(logits, spread):
        work, strips = len(block) * classes, _strips(block, classes)
        _accumulate(work, block, classes, local[rows], shares, scaling, strips, result.columns[rows])
    return result


def gradient(logits, targets, state, coefficients, out, *, spread=None, vocab_start=0, target_share=_NOUGHT):
    """See `fastxent.backends.reference.gradient`."""
    local, scaling = in_block(targets, logits, vocab_start), _scaling(logits.dtype, state.softcap, state.temperature)
    exponent, whole, own = state.of_gradient(coefficients, target_share)
    classes = logits.shape[1]
    smooth = np.broadcast_to(coefficients.smooth, len(logits))
    of_rows = [np.ascontiguousarray(column) for column in (state["base"], exponent, whole, own, smooth)]
    local, of_rows = _read_only(local), [_read_only(column) for column in of_rows]
    for rows, block, shares in _blocks(logits, spread, out):
        of_block = kernels.Whole(*(column[rows] for column in of_rows))
        with _written(out, rows, logits.dtype) as written:
            work, strips = len(block) * classes, _strips(block, classes)
            _gradient(work, block, classes, local[rows], shares, of_block, scaling, written, strips)


def count(logits, levels):
    """See `fastxent.backends.reference.count`."""
    counts, levels = np.empty((len(logits), 2), np.int64), _read_only(np.ascontiguousarray(levels, np.float64))
    classes = logits.shape[1]
    for rows, block, _ in _blocks(logits, None):
        _count(len(block) * classes, block, classes, levels[rows], counts[rows])
    return counts


def score(logits, targets, *, ids=None, top_k=0, softcap=None, temperature=1.0):
    """See `fastxent.backends.reference.score`."""
    ids = np.empty((len(logits), 0), np.int64) if ids is None else np.ascontiguousarray(ids)
    result = RowScores.allocate(len(logits), top_k, ids.shape[1])
    classes = logits.shape[1]
    targets, ids, scaling = _read_only(targets), _read_only(ids), _scaling(logits.dtype, softcap, temperature)
    for rows, block, shares in _blocks(logits, None):
        work, strips = len(block) * classes, _strips(block, classes)
        if classes <= FEW:
            found = _results(Statistics(result.nll[rows], *([np.empty(0)] * 4)))
            _statistics(work, block, classes, targets[rows], shares, scaling, 1, strips, found)
        segments = _segments(classes, targets[rows])
        _score(work, block, classes, targets[rows], ids[rows], scaling, segments, strips, result.of(rows))
    return result


def divergences(logits_p, logits_q, lse_p, lse_q):
    """See `fastxent.backends.reference.divergences`."""
    dtype = logits_p.dtype.newbyteorder("=")
    if logits_q.dtype.newbyteorder("=") != dtype:
        dtype = np.result_type(loss_dtype(logits_p.dtype), loss_dtype(logits_q.dtype))
    rows, classes = logits_p.shape
    parts = np.empty((rows, -(-classes // divergences_kernel.PIECE), 2))
    for part in _slices(logits_p, (logits_q, logits_q.dtype)):
        p, q = (_read_only(_gathered(logits, part, dtype)) for logits in (logits_p, logits_q))
        lse = _read_only(lse_p[part]), _read_only(lse_q[part])
        _divergences(2 * len(p) * classes, p, q, classes, *lse, _scaling(dtype, None, 1.0), parts[part])
    unknown = ~(np.isfinite(lse_p) & np.isfinite(lse_q))
    kl, js = np.moveaxis(parts.sum(axis=1), 1, 0)
    return np.where(unknown, np.nan, kl), np.where(unknown, np.nan, js)


def logsumexp(logits, *, temperature=1.0):
    """See `fastxent.backends.reference.logsumexp`."""
    wanted = "target_logit", "lse"
    found = statistics(logits, np.full(len(logits), LARGEST), temperature=temperature, wanted=wanted)
    # a row that holds infinities: one that is NaN too stays NaN
    for i in np.flatnonzero(np.isinf(found.target_logit)):
        found.lse[i] = logits[i : i + 1][0].astype(np.float64).max()
    return found.lse


def log_softmax(logits, out, *, temperature=1.0):
    """See `fastxent.backends.reference.log_softmax`."""
    scaling = _scaling(logits.dtype, None, temperature)
    classes = logits.shape[1]
    for rows, block, shares in _blocks(logits, None, out):
        with _written(out, rows, logits.dtype) as written:
            work, strips = len(block) * classes, _strips(block, classes)
            _log_softmax(work, block, classes, shares, scaling, strips, written)
    return out


def softmax(logits, out, *, temperature=1.0):
    """See `fastxent.backends.reference.softmax`."""
    nothing = np.zeros(1)
    coefficients = Coefficients(hit=nothing, smooth=nothing, extra=np.ones(1), square=nothing)
    statistics_and_gradient(logits, np.full(len(logits), LARGEST), coefficients, out, temperature=temperature)
    return out


def binary(logits, targets, weight, pos_weight, label_smoothing, upstream, losses, gradient):
    """See `fastxent.backends.reference.binary`."""
    logits, targets, weight, pos_weight, upstream = map(_read_only, (logits, targets, weight, pos_weight, upstream))
    keep, even = 1.0 - label_smoothing, 0.5 * label_smoothing
    _binary(_BINARY * len(logits), logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient)


def _blocks(logits, spread, out=None):
    """``rows, block, shares``: slices of rows, their logits as a kernel reads them (`_lying`), and their shares."""
    real, probabilities = loss_dtype(logits.dtype), None if spread is None else spread.probabilities
    shares, beside = _shares(spread, real), []
    if isinstance(logits, np.ndarray) and 0 < logits.size <= _SMALL and probabilities is None:
        lying = _lying(logits, logits.shape[1], logits.dtype)
        if lying is not None:  # one launch, and nothing to find out: 2 us less of the smallest call
            yield slice(0, len(logits)), _read_only(lying), shares
            return
    if probabilities is not None:
        beside.append((probabilities, real))
    if out is not None:
        beside.append((out, _writable(out, logits.dtype)))
    for rows in _slices(logits, *beside):
        block = _gathered(logits, rows, logits.dtype.newbyteorder("="))
        if probabilities is not None:
            shares = shares._replace(probabilities=_read_only(_gathered(probabilities, rows, real)))
        yield rows, _read_only(block), shares


def _slices(logits, *beside):
    """Slices of rows for one launch each: those that lie together in memory, in arrays ``beside`` them in their dtypes
    too, else few enough to be gathered.
    """
    count, classes = logits.shape
    together = min([_together(rows, dtype) for rows, dtype in ((logits, logits.dtype), *beside)])
    size = _LAUNCH // classes
    if together < min(count, max(1, _GATHER // classes)):
        together, size = count, max(_GATHER // classes, min(_LINE, 4 * _GATHER // classes))
    step = min(_ROWS, max(1, size))
    if 0 < count <= min(together, step):
        return [slice(0, count)]
    return [
        slice(start, min(last, start + step))
        for first in range(0, count, max(1, together))
        for last in [min(count, first + together)]
        for start in range(first, last, step)
    ]


def _together(rows, dtype):
    """How many rows at a time a kernel may read as they lie."""
    if isinstance(rows, Masked):
        return 0
    if isinstance(rows, Rows):
        return rows.together(lambda view: _lying(view, rows.shape[1], dtype) is not None)
    return 0 if _lying(rows, rows.shape[1], dtype) is None else len(rows)


def _lying(view, classes, dtype):
    """The rows of an array of ``dtype`` as a contiguous matrix, of which kernels touch the first ``classes`` columns;
    None where they do not lie so. Few classes must lie without gaps.
    """
    if view.dtype != dtype or not (view.flags.aligned and dtype.isnative):
        return None
    if view.flags.c_contiguous:
        return viewed(view.reshape(-1, classes))
    width = pitch(view, classes)
    if width is None or width > classes <= FEW:
        return None
    shape, strides = (view.size // classes, width), (width * view.itemsize, view.itemsize)
    return np.lib.stride_tricks.as_strided(viewed(view), shape, strides, writeable=view.flags.writeable)


def _gathered(rows, part, dtype):
    """``rows[part]`` as a kernel reads it, a native array of ``dtype``: as it lies where it may, else a copy."""
    if isinstance(rows, Masked) or rows.dtype.newbyteorder("=") != dtype:
        return viewed(np.ascontiguousarray(rows[part], dtype))
    views = list(boxes(rows, part))
    if len(views) == 1 and (lying := _lying(views[0][0], rows.shape[1], dtype)) is not None:
        return lying
    block = np.empty((part.stop - part.start, rows.shape[1]), dtype)
    for view, place in views:
        strided.copy(view, block[place].reshape(view.shape))
    return viewed(block)


def _writable(out, logits_dtype):
    """The dtype that a kernel for logits of a dtype may write to ``out`` as it lies, if it is that."""
    own = loss_dtype(logits_dtype)
    return own if out.dtype == own or out.dtype.itemsize != 2 else logits_dtype.newbyteorder("=")


def _written(out, part, logits_dtype):
    """An array for a kernel to write that ends up in ``out[part]``: itself where a kernel for its like exists."""
    views = list(boxes(out, part))
    if len(views) == 1 and (lying := _lying(views[0][0], out.shape[1], _writable(out, logits_dtype))) is not None:
        return contextlib.nullcontext(lying)
    return _copied(out, part, loss_dtype(logits_dtype), views)


@contextlib.contextmanager
def _copied(out, part, own, views):
    """An array of the dtype ``own`` that is copied to views of ``out[part]``."""
    yield (written := np.empty((part.stop - part.start, out.shape[1]), own))
    for view, place in views:
        if out.dtype.newbyteorder("=") == own:
            strided.copy(written[place].reshape(view.shape), view)
        else:
            with np.errstate(over="ignore"):
                view[...] = written[place].reshape(view.shape)


def _shares(spread, real):
    """Shares without probabilities."""
    if spread is None:
        return _no_shares(real)
    weight = _read_only(np.ascontiguousarray(spread.weight, np.float64))
    return _no_shares(real)._replace(weight=weight, keep=spread.keep, even=spread.even)


@functools.cache
def _no_shares(real):
    return kernels.Shares(_read_only(np.empty(0)), _read_only(np.empty((0, 0), real)), 0.0, 1.0)


def _coefficients(coefficients, rows):
    return kernels.Coefficients(*map(_read_only, coefficients.of(rows)))


@functools.lru_cache
def _scaling(dtype, softcap, temperature):
    real = loss_dtype(dtype).type
    cap = real(0.0 if softcap is None else 1.0 / softcap)
    high, low, nats = rowmath.rate(real, softcap, temperature)
    return kernels.Scaling(high, low, nats, cap, *rowmath.rate(np.float64, softcap, temperature))


def _results(found):
    return kernels.Results(found.nll, found.target_logit, found.peak, found.lse, found.gap)


def _strips(block, classes):
    """Scratch for the sums of each row's strips."""
    return np.empty((len(block), -(-classes // STRIP), 8))


def _segments(classes, targets):
    """How many runs of strips a row is cut into so that there is work for every thread; no bit depends on it."""
    rows = len(targets)
    threads = threads_for(rows * classes)
    if threads == 1 or rows >= 4 * threads or (targets == LARGEST).any():
        return 1
    return min(-(-classes // STRIP), -(-4 * threads // rows))
