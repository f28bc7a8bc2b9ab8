"""What a caller may pass: every option, every check, every error message.

`normalise` turns arguments into a `Problem` the backends can take, and raises before anything is written. Nothing
here computes a loss.
"""

import math
from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from fastxent.rows import AxisRows, Masked, as_rows, classes_last
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
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    sample_weight: ArrayLike | None = None
    reduction: str = "mean"
    denominator: float | None = None
    return_lse: bool = False
    axis: int = -1


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Probabilities of k classes a row: ids (N, k) int64, probabilities (N, k) float64, 0 where a slot is not used."""

    ids: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, slots=True)
class Problem:
    """Checked arguments: rows of logits (N, V), and as targets class indices (N,) with IGNORED where a row counts for
    nothing, probabilities (N, V), or `SparseTargets`.

    ``counted`` tells which rows count: bool (N,), or True for all. In ``options`` weight and sample_weight are float64
    (V,) and (N,), or None; ``shape`` is the targets' without classes.
    """

    logits: np.ndarray
    targets: np.ndarray | SparseTargets
    counted: np.ndarray | bool
    options: Options
    shape: tuple[int, ...]
    loss_dtype: np.dtype


def normalise(logits, targets, options):
    """The `Problem` of logits and targets under ``options`` (an Options or a mapping); classes lie along its axis."""
    options = _read_options(options)
    logits = read_logits(logits, options.axis)
    _check_scalars(options)
    classes, shape = logits.shape[-1], logits.shape[:-1]
    weight = None if options.weight is None else _read_weight(options.weight, classes)
    sample_weight = None if options.sample_weight is None else _read_sample_weight(options.sample_weight, shape)
    plain = weight is None and sample_weight is None
    if isinstance(targets, tuple):
        marked, counted = _read_sparse(targets, options.ignore_index, shape, classes), True
    elif (targets := np.asarray(targets)).dtype.kind in "iu":
        check_targets(targets.shape, targets.dtype, logits.shape, options.axis)
        marked, counted = mark_ignored(targets.reshape(-1), options.ignore_index, classes)
    else:
        marked, counted = _read_probabilities(targets, options, logits.shape), True
    if sample_weight is not None and not sample_weight.all():
        counted = counted & (sample_weight > 0.0)
    return Problem(
        logits=as_rows(logits),
        targets=marked,
        counted=counted,
        options=options if plain else replace(options, weight=weight, sample_weight=sample_weight),
        shape=shape,
        loss_dtype=loss_dtype(logits.dtype),
    )


def _read_probabilities(targets, options, logits_shape):
    """Dense probabilities as rows (N, V)."""
    probabilities = targets
    if targets.ndim == len(logits_shape) and -targets.ndim <= options.axis < targets.ndim:
        probabilities = classes_last(targets, options.axis)
    if probabilities.shape != logits_shape:
        check_targets(targets.shape, targets.dtype, logits_shape, options.axis)
    if targets.dtype not in DTYPES:
        raise TypeError(f"targets must be class indices or probabilities, not {targets.dtype}")
    if options.ignore_index is not None and options.ignore_index >= 0:
        raise ValueError(
            f"ignore_index must be negative or None where targets are probabilities; got {options.ignore_index}"
        )
    _check_amounts("targets", targets)
    return as_rows(probabilities)


def _read_sparse(targets, ignore_index, shape, classes):
    if len(targets) != 2:
        raise ValueError(f"sparse targets must be two arrays, (ids, probabilities); got {len(targets)}")
    ids, probabilities = map(np.asarray, targets)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids of sparse targets must be integers, not {ids.dtype}")
    if probabilities.dtype not in DTYPES:
        raise TypeError(f"probabilities of sparse targets must be real numbers, not {probabilities.dtype}")
    if ids.shape[:-1] != shape or ids.ndim != len(shape) + 1:
        raise ValueError(f"ids of sparse targets must have the shape {shape} and one axis more; got {ids.shape}")
    if probabilities.shape != ids.shape:
        raise ValueError(
            f"probabilities of sparse targets must have the ids' shape {ids.shape}, not {probabilities.shape}"
        )
    marked, used = mark_ignored(ids.reshape(-1), ignore_index, classes)
    used = np.broadcast_to(used, marked.shape).reshape(math.prod(shape), ids.shape[-1])
    probabilities = probabilities.reshape(used.shape)
    _check_amounts("probabilities of sparse targets", probabilities[used])
    marked = marked.reshape(used.shape)
    return SparseTargets(np.where(used, marked, 0), np.where(used, probabilities.astype(np.float64), 0.0))


def _check_amounts(name, values):
    """Finite and not negative, without a temporary of their size."""
    if values.size and not (values.min() >= 0 and values.max() < np.inf):
        rows = values.reshape(-1)
        first = next(value for value in rows if not 0 <= value < np.inf)
        raise ValueError(f"{name} must be finite and not negative; got {first}")


def read_logits(logits, axis=-1):
    """Logits as an array of a supported dtype with at least one class, these moved to the last axis: a view."""
    _refuse_what_numpy_would_misread(logits)
    logits = np.asarray(logits)
    check_logits(logits.shape, logits.dtype, axis)
    return classes_last(logits, axis)


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


def check_logits(shape, dtype, axis=-1):
    """Logits of this ``shape`` and ``dtype`` can be taken, or a TypeError or ValueError says why not."""
    _check_dtype(dtype)
    if not shape:
        raise ValueError("logits must have at least one axis, the classes; got a scalar")
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis must be an integer, not {axis!r}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis must lie in [{-len(shape)}, {len(shape) - 1}] for logits of shape {shape}; got {axis}")
    if shape[axis] == 0:
        raise ValueError(f"logits must have at least one class; got shape {shape}")


def _check_dtype(dtype):
    if dtype not in DTYPES and dtype.newbyteorder("=") not in DTYPES:
        raise TypeError(f"logits must have one of the dtypes {', '.join(map(str, DTYPES))}, not {dtype}")


def loss_dtype(dtype):
    """What losses of logits of ``dtype`` are: float64 for float64, else float32, never rounded to half."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def gradient_dtype(dtype):
    """The logits' own, in native byte order; float32 for float8."""
    return np.dtype(np.float32) if dtype.itemsize == 1 else dtype.newbyteorder("=")


def check_targets(shape, dtype, logits_shape, axis=-1):
    """Class indices of this ``shape`` and ``dtype`` fit logits (..., V), or a TypeError or ValueError says why not."""
    batch = logits_shape[:-1]
    if dtype.kind in "iu" and len(shape) == len(logits_shape):
        raise TypeError(f"targets of the logits' rank must be probabilities, floating; got {dtype} of shape {shape}")
    if dtype.kind not in "iu" and len(shape) == len(batch):
        raise TypeError(f"targets must be integer class indices, or probabilities of the logits' shape; not {dtype}")
    if shape == batch:
        return
    place, all_axes = axis % len(logits_shape), list(batch)
    all_axes.insert(place, logits_shape[-1])
    wanted = batch if dtype.kind in "iu" else tuple(all_axes)
    hint = ""
    for other in range(len(all_axes)):
        if dtype.kind in "iu" and other != place and shape == (*all_axes[:other], *all_axes[other + 1 :]):
            hint = f"; with axis={other} it would fit"
    what = f"the shape of logits without axis {axis}" if dtype.kind in "iu" else "the logits' shape"
    raise ValueError(f"targets must have {what}, {wanted}; got {shape}{hint}")


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
    """``out`` as an array to write: of the shape of ``logits``, their dtype or float32 or float64, and either the
    logits themselves or apart from them. By default a new one.
    """
    if out is None:
        return np.empty(logits.shape, gradient_dtype(logits.dtype))
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(out).__name__}")
    if out.shape != logits.shape:
        raise ValueError(f"{name} must have the logits' shape {logits.shape}, not {out.shape}")
    if out.dtype.name not in (logits.dtype.name, "float32", "float64") or not out.dtype.isnative:
        raise TypeError(
            f"{name} must have the logits' dtype {logits.dtype.name} or float32 or float64, in native byte order; "
            f"not {out.dtype.str}"
        )
    if not out.flags.writeable:
        raise ValueError(f"{name} must be writable")
    if 0 in [step for step, size in zip(out.strides, out.shape, strict=True) if size > 1]:
        raise ValueError(f"{name} must not be broadcast: several of its elements are one")
    same = (out.ctypes.data, out.strides, out.dtype) == (logits.ctypes.data, logits.strides, logits.dtype)
    if not same and np.may_share_memory(out, logits):
        raise ValueError(f"{name} must be the logits themselves or not overlap them")
    return out


def read_grad_output(grad_output, reduction, shape):
    """The upstream gradient in float64: a scalar, or of ``shape`` for reduction "none"."""
    grad_output = _read_reals("grad_output", grad_output)
    if grad_output.ndim == 0:
        return grad_output
    if reduction != "none":
        raise ValueError(f'grad_output must be a scalar unless reduction is "none"; got shape {grad_output.shape}')
    if grad_output.shape != shape:
        raise ValueError(f"grad_output must have the targets' shape {shape}, not {grad_output.shape}")
    return grad_output


def _read_options(options):
    if isinstance(options, Options):
        return options
    known = [field.name for field in fields(Options)]
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(known)}")
    return Options(**options)


def read_rows(logits, axis, where=None):
    """`AxisRows` of logits over ``axis``: an int, a tuple of them, or None for all."""
    _refuse_what_numpy_would_misread(logits)
    array = np.asarray(logits)
    axes = tuple(range(array.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    for one in axes or (-1,):
        check_logits(array.shape, array.dtype, one)
    axes = tuple(one % array.ndim for one in axes)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"axis must name one axis or more, each once; got {axis!r}")
    rows = AxisRows(array, axes, None, None)
    moved, mask = rows.like(array), None
    if where is not None:
        where = np.asarray(where)
        if where.dtype != bool:
            raise TypeError(f"where must hold truth values, not {where.dtype}")
        try:
            mask = rows.like(np.broadcast_to(where, array.shape))
        except ValueError:
            raise ValueError(f"where must broadcast to the logits' shape {array.shape}; got {where.shape}") from None
        moved = Masked(moved, mask, gradient_dtype(moved.dtype))
    return replace(rows, logits=moved, mask=mask)


def read_pair(logits_p, logits_q, axis):
    """`AxisRows` of two arrays of logits of one shape."""
    pair = read_rows(logits_p, axis), read_rows(logits_q, axis)
    if pair[0].array.shape != pair[1].array.shape:
        raise ValueError(f"logits_q must have the shape of logits_p {pair[0].array.shape}, not {pair[1].array.shape}")
    return pair


def read_row_gradient(grad_output, rows):
    """An upstream gradient for each of `AxisRows`, float64 (N,)."""
    grad_output, shape = _read_reals("grad_output", grad_output), rows.reduced_shape(False)
    if grad_output.shape == rows.reduced_shape(True):
        grad_output = grad_output.reshape(shape)
    try:
        return np.broadcast_to(grad_output, shape).reshape(-1)
    except ValueError:
        raise ValueError(f"grad_output must broadcast to the result's shape {shape}; got {grad_output.shape}") from None


def read_like(name, values, array):
    """Real numbers of the shape of ``array``, or that broadcast to it."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiu" and values.dtype not in DTYPES:
        raise TypeError(f"{name} must hold real numbers, not {values.dtype}")
    try:
        return np.broadcast_to(values, array.shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the logits' shape {array.shape}; got {values.shape}") from None


@dataclass(frozen=True, slots=True)
class BinaryProblem:
    """Checked arguments of a binary cross entropy; all arrays broadcast to the shape of the logits."""

    logits: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    pos_weight: np.ndarray
    label_smoothing: float
    reduction: str
    loss_dtype: np.dtype


def read_binary(logits, targets, *, weight=None, pos_weight=None, label_smoothing=0.0, reduction="mean"):
    """The `BinaryProblem` of its arguments."""
    _refuse_what_numpy_would_misread(logits)
    logits = np.asarray(logits)
    _check_dtype(logits.dtype)
    _check_reduction(reduction)
    smoothing = _read_smoothing(label_smoothing)
    targets = np.asarray(targets)
    if targets.shape != logits.shape:
        raise ValueError(f"targets must have the logits' shape {logits.shape}; got {targets.shape}")
    if targets.dtype.kind not in "fiub" and targets.dtype not in DTYPES:
        raise TypeError(f"targets must hold real numbers in [0, 1], not {targets.dtype}")
    _check_within("targets", targets)
    return BinaryProblem(
        logits=logits,
        targets=targets,
        weight=_read_element_weight("weight", weight, logits),
        pos_weight=_read_element_weight("pos_weight", pos_weight, logits),
        label_smoothing=smoothing,
        reduction=reduction,
        loss_dtype=loss_dtype(logits.dtype),
    )


def _read_element_weight(name, values, logits):
    values = np.ones(()) if values is None else read_like(name, values, logits)
    _check_amounts(name, values)
    return values


def read_probabilities(name, p):
    """Real numbers in [0, 1] as float64."""
    p = _read_reals(name, p)
    _check_within(name, p)
    return p


def read_distributions(name, p, axis):
    """Probabilities as float64 with the classes moved to the last axis; they sum to 1 within 1e-6."""
    p = read_probabilities(name, p)
    check_logits(p.shape, p.dtype, axis)
    p = classes_last(p, axis)
    sums = p.sum(axis=-1)
    if (np.abs(sums - 1.0) > 1e-6).any():
        first = sums[np.abs(sums - 1.0) > 1e-6].flat[0] if sums.ndim else sums
        raise ValueError(f"{name} must sum to 1 along axis {axis}; got a sum of {first}")
    return p


def read_two_distributions(p, q, axis):
    """Two distributions, or arrays of them, that broadcast."""
    p, q = read_distributions("p", p, axis), read_distributions("q", q, axis)
    try:
        return np.broadcast_arrays(p, q)
    except ValueError:
        raise ValueError(f"q must broadcast with p; got shapes {p.shape} and {q.shape}") from None


def read_base(base):
    """The base of a logarithm: positive, finite and not 1."""
    base = _real("base", base)
    if not 0.0 < base < math.inf or base == 1.0:
        raise ValueError(f"base must be positive, finite and not 1; got {base}")
    return base


def read_clip(clip):
    """How far probabilities are held from 0 and 1."""
    clip = _real("clip", clip)
    if not 0.0 <= clip < 0.5:
        raise ValueError(f"clip must lie in [0, 0.5); got {clip}")
    return clip


def read_positive(name, value):
    """A positive and finite real number."""
    value = _real(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")
    return value


def _check_within(name, values):
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        first = next(value for value in values.reshape(-1) if not 0 <= value <= 1)
        raise ValueError(f"{name} must lie in [0, 1]; got {first}")


def _read_weight(weight, classes):
    weight = _read_reals("weight", weight)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one number a class; got {weight.shape}")
    _check_amounts("weight", weight)
    return weight


def _read_sample_weight(sample_weight, shape):
    sample_weight = _read_reals("sample_weight", sample_weight)
    if sample_weight.shape != shape:
        raise ValueError(f"sample_weight must have shape {shape}, one number a row; got {sample_weight.shape}")
    _check_amounts("sample_weight", sample_weight)
    return sample_weight.reshape(-1)


def _read_reals(name, values):
    values = np.asarray(values)
    if values.dtype.kind not in "fiu" and values.dtype not in DTYPES:
        raise TypeError(f"{name} must hold real numbers, not {values.dtype}")
    return values.astype(np.float64)


def _check_scalars(options):
    _check_reduction(options.reduction)
    _read_smoothing(options.label_smoothing)
    if not 0.0 <= _real("z_loss", options.z_loss) < math.inf:
        raise ValueError(f"z_loss must be finite and not negative; got {options.z_loss}")
    read_positive("temperature", options.temperature)
    if options.softcap is not None:
        read_positive("softcap", options.softcap)
    if options.denominator is not None:
        if options.reduction != "mean":
            raise ValueError(f'denominator goes with reduction="mean"; got reduction={options.reduction!r}')
        if math.isnan(_real("denominator", options.denominator)):
            raise ValueError("denominator must be a number; got nan")


def _check_reduction(reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def _read_smoothing(smoothing):
    smoothing = _real("label_smoothing", smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {smoothing}")
    return smoothing


def _real(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a real number, not {value!r}")
    return float(value)
