"""What a caller may pass: every option, every check, every error message.

`normalise` turns arguments into a `Problem` the backends can take, and raises before anything is written. Nothing
here computes a loss.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from fastxent.state import IGNORED

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


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
    """Checked arguments: rows of logits (N, V), targets (N,) with IGNORED where one counts for nothing."""

    logits: np.ndarray
    targets: np.ndarray
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
    return Problem(
        logits=as_rows(logits),
        targets=mark_ignored(targets.reshape(-1), options.ignore_index, classes),
        options=_replace_weight(options, weight),
        shape=targets.shape,
        loss_dtype=np.dtype(np.float64 if logits.dtype.itemsize == 8 else np.float32),
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
    if dtype.newbyteorder("=") not in DTYPES:
        raise TypeError(f"logits must have one of the dtypes {', '.join(map(str, DTYPES))}, not {dtype}")
    if not shape:
        raise ValueError("logits must have at least one axis, the classes; got a scalar")
    if shape[-1] == 0:
        raise ValueError(f"logits must have at least one class; got shape {shape}")


def check_targets(shape, dtype, logits_shape):
    """Targets of this ``shape`` and ``dtype`` fit the logits, or a TypeError or ValueError says why not."""
    if dtype.kind not in "iu":
        raise TypeError(f"targets must be integer class indices, not {dtype}")
    if shape != logits_shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits without its last axis, {logits_shape[:-1]}; got {shape}"
        )


def mark_ignored(targets, ignore_index, classes, first_row=0):
    """Targets (N,) as int64, IGNORED for ``ignore_index``; any other outside [0, classes) is an IndexError."""
    if ignore_index is not None and not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"ignore_index must be an integer or None, not {ignore_index!r}")
    outside = (targets < 0) | (targets >= classes)
    if not outside.any() and (ignore_index is None or not 0 <= ignore_index < classes):
        return targets.astype(np.int64, copy=False)
    ignored = np.zeros(targets.shape, bool) if ignore_index is None else targets == ignore_index
    wrong = outside & ~ignored
    if wrong.any():
        row = int(wrong.argmax())
        raise IndexError(
            f"targets must lie in [0, {classes - 1}]{'' if ignore_index is None else f' or be {ignore_index}'}; "
            f"{int(wrong.sum())} of {targets.size} do not, the first in row {first_row + row} with value {targets[row]}"
        )
    return np.where(ignored, IGNORED, targets.astype(np.int64, copy=False))


def read_out(out, logits, name="out"):
    """``out`` as an array to write: of the logits' shape and dtype, and either the logits or apart from them."""
    if out is None:
        return np.empty(logits.shape, logits.dtype.newbyteorder("="))
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(out).__name__}")
    if out.shape != logits.shape:
        raise ValueError(f"{name} must have the logits' shape {logits.shape}, not {out.shape}")
    if out.dtype != logits.dtype.newbyteorder("="):
        raise TypeError(f"{name} must have the logits' dtype {logits.dtype}, not {out.dtype}")
    if not out.flags.writeable or not out.flags.c_contiguous:
        raise ValueError(f"{name} must be writable and C-contiguous")
    same = out.ctypes.data == logits.ctypes.data and out.strides == logits.strides
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


def _replace_weight(options, weight):
    values = {field.name: getattr(options, field.name) for field in fields(Options)}
    return Options(**values | {"weight": weight})


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
