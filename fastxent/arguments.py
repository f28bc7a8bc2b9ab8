"""What a caller may pass: every option, every check, every error message.

`normalise` turns arguments into a `Problem` the backends can take, and raises before anything is written. Nothing
here computes a loss.
"""

import math
from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from fastxent.state import IGNORED

REDUCTIONS = ("none", "sum", "mean")
DTYPES = tuple(
    map(
        np.dtype,
        (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the cross entropy family, with their defaults; `fastxent.cross_entropy` explains each."""

    weight: ArrayLike | None = None
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"
    denominator: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Checked arguments: rows of logits (N, V), targets (N,) with IGNORED where one counts for nothing.

    ``counted`` tells where: bool (N,), or True where every row counts.
    """

    logits: np.ndarray
    targets: np.ndarray
    counted: np.ndarray | bool
    options: Options
    shape: tuple[int, ...]
    loss_dtype: np.dtype


def normalise(logits, targets, options):
    """The `Problem` of logits (..., V) and targets (...) under ``options`` (an Options or a mapping)."""
    options = _read_options(options)
    logits = read_logits(logits)
    targets = np.asarray(targets)
    check_targets(targets.shape, targets.dtype, logits.shape)
    classes = logits.shape[-1]
    weight = None if options.weight is None else _read_weight(options.weight, classes)
    _check_scalars(options)
    marked, counted = mark_ignored(targets.reshape(-1), options.ignore_index, classes)
    return Problem(
        logits=as_rows(logits),
        targets=marked,
        counted=counted,
        options=options if weight is None else replace(options, weight=weight),
        shape=targets.shape,
        loss_dtype=loss_dtype(logits.dtype),
    )


def read_logits(logits):
    """Logits as an array of a supported dtype with at least one axis and one class."""
    _refuse_what_numpy_would_misread(logits)
    logits = np.asarray(logits)
    check_logits(logits.shape, logits.dtype)
    return logits


def _refuse_what_numpy_would_misread(logits):
    library = type(logits).__module__.partition(".")[0]
    if getattr(logits, "requires_grad", False) is True:
        raise TypeError(
            "logits must not require grad; pass logits.detach(), and take cross_entropy_grad for the gradient"
        )
    if library == "jax" and any(kind.__name__ == "Tracer" for kind in type(logits).__mro__):
        raise TypeError("logits must be a concrete array, not a JAX tracer; call outside of jit and grad")
    if library == "dask":
        raise TypeError("logits must be in memory, not a dask array; map over its blocks, or pass logits.compute()")


def check_logits(shape, dtype):
    """Logits of this ``shape`` and ``dtype`` can be taken, or a TypeError or ValueError says why not."""
    if dtype not in DTYPES and dtype.newbyteorder("=") not in DTYPES:
        raise TypeError(f"logits must have one of the dtypes {', '.join(map(str, DTYPES))}, not {dtype}")
    if not shape:
        raise ValueError("logits must have at least one axis, the classes; got a scalar")
    if shape[-1] == 0:
        raise ValueError(f"logits must have at least one class; got shape {shape}")


def loss_dtype(dtype):
    """What losses of logits of ``dtype`` are: float64 for float64, else float32, never rounded to half."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def _gradient_dtype(dtype):
    """The logits' own, in native byte order; float32 for float8."""
    return np.dtype(np.float32) if dtype.itemsize == 1 else dtype.newbyteorder("=")


def check_targets(shape, dtype, logits_shape):
    """Targets of this ``shape`` and ``dtype`` fit the logits, or a TypeError or ValueError says why not."""
    if dtype.kind not in "iu":
        raise TypeError(f"targets must be integer class indices, not {dtype}")
    if shape != logits_shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits without its last axis, {logits_shape[:-1]}; got {shape}"
        )


def mark_ignored(targets, ignore_index, classes, first_row=0):
    """Targets (N,) as int64, IGNORED for ``ignore_index``, and where they are not: bool (N,), or True everywhere.

    Any other outside [0, classes) is an IndexError.
    """
    if ignore_index is not None and not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"ignore_index must be an integer or None, not {ignore_index!r}")
    outside = _outside(targets, classes)
    if not outside.any() and (ignore_index is None or not 0 <= ignore_index < classes):
        return targets.astype(np.int64, copy=False), True
    ignored = np.zeros(targets.shape, bool) if ignore_index is None else targets == ignore_index
    wrong = outside & ~ignored
    if wrong.any():
        row = int(wrong.argmax())
        raise IndexError(
            f"targets must lie in [0, {classes - 1}]{'' if ignore_index is None else f' or be {ignore_index}'}; "
            f"{int(wrong.sum())} of {targets.size} do not, the first in row {first_row + row} with value {targets[row]}"
        )
    return np.where(ignored, IGNORED, targets.astype(np.int64, copy=False)), ~ignored


def _outside(targets, classes):
    if targets.dtype == np.int64:
        return targets.view(np.uint64) >= classes  # one pass: seen as unsigned, what is negative is large
    return (targets < 0) | (targets >= classes)


def read_out(out, logits, name="out"):
    """``out`` as an array to write: of the logits' shape, their dtype or float32 or float64, and either the logits
    themselves or apart from them. By default a new one.
    """
    if out is None:
        return np.empty(logits.shape, _gradient_dtype(logits.dtype))
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(out).__name__}")
    if out.shape != logits.shape:
        raise ValueError(f"{name} must have the logits' shape {logits.shape}, not {out.shape}")
    if out.dtype.name not in (logits.dtype.name, "float32", "float64") or not out.dtype.isnative:
        raise TypeError(
            f"{name} must have the logits' dtype {logits.dtype.name} or float32 or float64, in native byte order; "
            f"not {out.dtype.str}"
        )
    if not out.flags.writeable or not out.flags.c_contiguous:
        raise ValueError(f"{name} must be writable and C-contiguous")
    same = (out.ctypes.data, out.strides, out.dtype) == (logits.ctypes.data, logits.strides, logits.dtype)
    if not same and np.may_share_memory(out, logits):
        raise ValueError(f"{name} must be the logits themselves or not overlap them")
    return out


def read_grad_output(grad_output, problem):
    """The upstream gradient in float64: a scalar, or (N,) for reduction "none"."""
    grad_output = np.asarray(grad_output, np.float64)
    if grad_output.ndim == 0:
        return grad_output
    if problem.options.reduction != "none":
        raise ValueError(f'grad_output must be a scalar unless reduction is "none"; got shape {grad_output.shape}')
    if grad_output.shape != problem.shape:
        raise ValueError(f"grad_output must have the targets' shape {problem.shape}, not {grad_output.shape}")
    return grad_output.reshape(-1)


def _read_options(options):
    if isinstance(options, Options):
        return options
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(known)}")
    return Options(**options)


class Rows:
    """Logits (..., V) as rows (N, V) that are gathered when they are sliced, where no view of them exists."""

    def __init__(self, logits):
        self._logits, self._batch = logits, logits.shape[:-1]
        self.shape, self.dtype = (math.prod(self._batch), logits.shape[-1]), logits.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return self._logits[np.unravel_index(np.arange(len(self))[rows], self._batch)]


def as_rows(logits):
    """Logits (..., V) as a view (N, V), or as `Rows`; never a copy."""
    if logits.ndim == 2:
        return logits
    if logits.flags.c_contiguous:
        return logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    return Rows(logits)


def _read_weight(weight, classes):
    weight = np.asarray(weight)
    if weight.dtype.kind not in "fiu":
        raise TypeError(f"weight must hold real numbers, not {weight.dtype}")
    weight = weight.astype(np.float64)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one number a class; got {weight.shape}")
    if not (np.isfinite(weight) & (weight >= 0)).all():
        first = weight[~(np.isfinite(weight) & (weight >= 0))][0]
        raise ValueError(f"weight must be finite and not negative; got {first}")
    return weight


def _check_scalars(options):
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {options.reduction!r}")
    smoothing = _real("label_smoothing", options.label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {smoothing}")
    if options.denominator is not None:
        if options.reduction != "mean":
            raise ValueError(f'denominator goes with reduction="mean"; got reduction={options.reduction!r}')
        if math.isnan(_real("denominator", options.denominator)):
            raise ValueError("denominator must be a number; got nan")


def _real(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    return float(value)
