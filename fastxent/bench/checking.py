"""A candidate against what is exact, before it meets the clock: its errors, its bits, its memory."""

from dataclasses import replace

import ml_dtypes
import numpy as np

import fastxent
from fastxent.bench import candidates, exact, machine, memory

# in units of a row's scale: what a peer may lose that computes, or rounds, in the dtype of the logits
TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "float16": 1e-2, "bfloat16": 4e-2}


def check_right(cell, task):
    """The cell with its errors, what is to be timed, and the bits of its result: None where it is wrong or absent."""
    try:
        run = _set_up(task, cell.candidate)
        result = run()
        got = _rows_of(result, task)
    except ModuleNotFoundError as missing:
        return replace(cell, note=f"absent: needs {missing.name}: pip install fastxent[peers]"), None, None
    except candidates.UnsupportedError as reason:
        return replace(cell, note=f"absent: {reason}"), None, None
    except Exception as failure:  # another library may fail in any way of its own; the comparison goes on
        return failed(cell, failure), None, None
    worst, of_row = errors(got, task.want, task.scale)
    ulps = exact.worst_ulps(got, task.want)
    cell = replace(cell, worst_error=_finite(worst), row_error=_finite(of_row), worst_ulps=_finite(ulps))
    if not (worst <= allowed(cell, task, got) and of_row <= allowed(cell, task, got, task.want)):
        return replace(cell, note="wrong"), None, None
    return cell, run, _bits(result).copy()


def check_again(cell, task, run, bits):
    """The cell with its memory, and whether a repeat and another number of threads give the same bits."""
    try:
        extra, again = memory.peak_extra(run)
        same, across = np.array_equal(_bits(again), bits), None
        if cell.candidate not in candidates.SLOW_SETUP:
            across = _same_across_threads(cell.candidate, task, bits)
    except Exception as failure:
        return failed(cell, failure)
    extra = None if cell.candidate in candidates.POOLED else extra
    return replace(cell, extra_bytes=extra, same_bits_twice=same, same_bits_across_threads=across)


def failed(cell, failure):
    """The cell of a candidate that raised ``failure``."""
    return replace(cell, seconds=None, note=f"failed: {type(failure).__name__}: {failure}"[:200])


def errors(got, want, scale):
    """The worst row's largest error in units of its largest entry, and its sum of errors in units of its sum of
    entries; of ``scale`` where that is more.

    Small entries are seen by the second alone: a row of 0.9 and of a thousand zeros is off by 1e-4 of its largest.
    """
    got, want = np.asarray(got, np.longdouble), np.atleast_2d(want.T).T
    off, sizes = np.abs(got.reshape(want.shape) - want), np.abs(want)
    largest = off.max(axis=1) / np.maximum(sizes.max(axis=1), scale)
    return float(largest.max()), float((off.sum(axis=1) / np.maximum(sizes.sum(axis=1), scale)).max())


def allowed(cell, task, got, want=None):
    """What a candidate may be off by: ours by its promise and half a unit of the last place, and, of the sum of a row's
    entries ``want``, by half the least number of the dtype for each.
    """
    if not cell.is_ours or task.promised is None:
        return TOLERANCE[cell.problem.dtype]
    limits = ml_dtypes.finfo(got.dtype)
    most = task.promised + float(limits.eps) / 2
    if want is not None and want.ndim > 1:
        sums = np.maximum(np.abs(want).sum(axis=1), task.scale)
        most += float(limits.smallest_subnormal) / 2 * want.shape[1] / float(sums.min())
    return most


def units(got, want, promised, scale=None):
    """The worst error of ``got`` in units of what is allowed: so much of ``scale``, and one rounding to a dtype of few
    bits; infinite where a number is missing, or is one where there should be none. Of what is computed in float32 an
    entry below twice the smallest normal number may be 0 on a GPU.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype.kind in "iub" and want.dtype.kind in "iub":
        return 0.0 if np.array_equal(got, want) else np.inf
    limits, few = ml_dtypes.finfo(got.dtype), got.dtype.itemsize <= 2
    real = np.dtype(np.float32 if few else got.dtype)
    least = (2 if real == np.float32 else 1) * float(np.finfo(real).tiny)
    with np.errstate(invalid="ignore"):
        allowed = np.maximum(promised * np.abs(want if scale is None else scale), least)
        if few:
            allowed = allowed + np.maximum(float(limits.eps) / 2 * np.abs(want), float(limits.smallest_subnormal))
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        error = np.where(same, 0.0, np.abs(got.astype(np.float64) - want) / allowed)
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


def _set_up(task, name):
    """What runs a candidate, with the threads of this comparison for what it has loaded."""
    run = task.setups[name](*task.arrays)
    machine.tell_torch()
    return run


def _rows_of(result, task):
    got = np.asarray(result)
    shape = (len(task.arrays[0]), *task.want.shape[1:]) if isinstance(task.rows, np.ndarray) else task.want.shape
    if got.shape != shape:
        raise ValueError(f"the result has shape {got.shape} where it must be {shape}")
    return got[task.rows]


def _finite(number):
    return number if np.isfinite(number) else None


def _same_across_threads(name, task, bits):
    """Whether another number of threads gives the same bits; None where there is no other."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if most == 1:
        return None
    with machine.threads(1 if fastxent.get_num_threads() > 1 else most):
        try:
            return np.array_equal(_bits(_set_up(task, name)()), bits)
        except candidates.UnsupportedError:
            return None


def _bits(result):
    result = np.ascontiguousarray(result)
    return result.view(f"u{result.itemsize}")
