"""What may be asked of one argument, whoseever it is: each check and its message once.

Nothing here knows an option or computes a loss; what belongs together as a problem is in `arguments`.
"""

import math
from dataclasses import replace

import ml_dtypes
import numpy as np

from fastxent.rows import AxisRows, Masked, classes_last

REDUCTIONS = ("none", "sum", "mean")
_WRITTEN = np.dtype(np.float32), np.dtype(np.float64)  # gradients of whatever logits
LARGEST_SCALE = 1e38
_DLPACK_CUDA = 2
_WORK = 10_000  # some 100 us to find out whether two arrays share an element
DTYPES = tuple(
    map(
        np.dtype,
        (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
)


def shown(value):
    """A value as a message has it: on one line, and not all of a long one."""
    return " ".join(repr(value).split())[:60]


def is_floating(dtype):
    """Whether this is one of `DTYPES`, in whatever byte order."""
    return dtype in DTYPES or dtype.newbyteorder("=") in DTYPES


def check_dtype(dtype, name="logits"):
    """Logits of this dtype can be taken, or a TypeError says which can."""
    if not is_floating(dtype):
        raise TypeError(f"{name} must have one of the dtypes {', '.join(map(str, DTYPES))}, not {dtype}")


def loss_dtype(dtype):
    """What logits of ``dtype`` are computed with and their losses are: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def gradient_dtype(dtype):
    """The logits' own, in native byte order; float32 for float8."""
    return np.dtype(np.float32) if dtype.itemsize == 1 else dtype.newbyteorder("=")


def read_array(logits, name="logits"):
    """Logits as an array: what NumPy reads, or what lies on the CPU and speaks DLPack."""
    refuse_misread(logits, name)
    if is_on_device(logits) and not hasattr(logits, "__array__"):
        raise TypeError(f"{name} must be in memory of the host, not on a GPU: this function takes no such arrays")
    if not hasattr(logits, "__array__") and hasattr(logits, "__dlpack__"):
        return np.from_dlpack(logits)
    return np.asarray(logits)


def is_on_device(array):
    """Whether an array lies on a CUDA device, by its own word."""
    if isinstance(array, np.ndarray):
        return False
    is_cuda = getattr(array, "is_cuda", None)  # torch's, whose other word for it takes 2 us
    if isinstance(is_cuda, bool):
        return is_cuda
    if hasattr(array, "__dlpack_device__"):
        return array.__dlpack_device__()[0] == _DLPACK_CUDA
    return hasattr(array, "__cuda_array_interface__")


def refuse_misread(logits, name):
    """A TypeError for what NumPy would take for something else, or without its gradient."""
    library = type(logits).__module__.partition(".")[0]
    if getattr(logits, "requires_grad", False) is True:
        raise TypeError(
            f"{name} must not require grad; pass {name}.detach(), and take the function with _grad for the gradient"
        )
    if library == "jax" and any(kind.__name__ == "Tracer" for kind in type(logits).__mro__):
        raise TypeError(f"{name} must be a concrete array, not a JAX tracer; call outside of jit and grad")
    if library == "dask":
        raise TypeError(
            f"{name} must be in memory, not a dask array; fastxent.dask takes those, or pass {name}.compute()"
        )


def check_logits(shape, dtype, axis=-1):
    """Logits of this ``shape`` and ``dtype`` can be taken, or a TypeError or ValueError says why not."""
    check_dtype(dtype)
    if not shape:
        raise ValueError("logits must have at least one axis, the classes; got a scalar")
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis must be an integer, not {shown(axis)}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis must lie in [{-len(shape)}, {len(shape) - 1}] for logits of shape {shape}; got {axis}")
    if shape[axis] == 0:
        raise ValueError(f"logits must have at least one class; got shape {shape}")


def read_logits(logits, axis=-1):
    """Logits as an array of a supported dtype with at least one class, these moved to the last axis: a view."""
    logits = read_array(logits)
    check_logits(logits.shape, logits.dtype, axis)
    return classes_last(logits, axis)


def read_rows(logits, axis, where=None):
    """`AxisRows` of logits over ``axis``: an int, a tuple of them, or None for all."""
    array = read_array(logits)
    axes = tuple(range(array.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    for one in axes or (-1,):
        check_logits(array.shape, array.dtype, one)
    axes = tuple(one % array.ndim for one in axes)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"axis must name one axis or more, each once; got {shown(axis)}")
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
    if out.dtype not in (logits.dtype.newbyteorder("="), *_WRITTEN):
        raise TypeError(
            f"{name} must have the logits' dtype {logits.dtype.name} or float32 or float64, in native byte order; "
            f"not {out.dtype.str}"
        )
    if not out.flags.writeable:
        raise ValueError(f"{name} must be writable")
    if _overlaps_itself(out):
        raise ValueError(f"{name} must not overlap itself; got shape {out.shape} with strides {out.strides}")
    if out is not logits and not _is_same(out, logits) and _share_memory(out, logits):
        raise ValueError(f"{name} must be the logits themselves or not overlap them")
    return out


def _is_same(a, b):
    """Whether two arrays are of the same elements."""
    return (a.strides, a.dtype, a.ctypes.data) == (b.strides, b.dtype, b.ctypes.data)


def _overlaps_itself(array):
    """Whether several elements may be one: broadcast, or windows that slide by less than their width."""
    if array.flags.c_contiguous:
        return False
    extent = array.itemsize
    for stride, size in sorted((abs(step), size) for step, size in zip(array.strides, array.shape, strict=True)):
        if array.size and size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def _share_memory(a, b):
    try:
        return np.shares_memory(a, b, max_work=_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def check_wanted(wanted, names):
    """``wanted`` says of each of ``names`` whether its gradient is computed."""
    if not isinstance(wanted, tuple) or len(wanted) != len(names) or not all(isinstance(one, bool) for one in wanted):
        raise TypeError(f"wanted must be a tuple of a bool for each of {', '.join(names)}; got {shown(wanted)}")


def check_scaling(softcap, temperature):
    """A softcap, or None, and a temperature are positive, and float32, in which kernels take most logits, holds what
    becomes of a logit of 1 under them; or a TypeError or ValueError says why not.
    """
    softcap = 1.0 if softcap is None else read_positive("softcap", softcap)
    temperature = read_positive("temperature", temperature)
    for name, value in (
        ("1 / softcap", 1.0 / softcap), ("1 / temperature", 1.0 / temperature),
        ("softcap / temperature", softcap / temperature),
    ):  # fmt: skip
        if not value < LARGEST_SCALE:
            raise ValueError(f"{name} must be less than {LARGEST_SCALE:.0e}; got {value}")


def refuse_overlap(out, targets, name="out"):
    """A ValueError where a gradient is to be written over targets that are an array."""
    if isinstance(targets, np.ndarray) and np.may_share_memory(out, targets):
        raise ValueError(f"{name} must not overlap targets, which are read while it is written")


def read_outputs(out, inputs, wanted):
    """Arrays for the gradients of ``inputs``, named arrays or None, that are ``wanted``: those of the tuple ``out``, or
    new ones; None for the others.
    """
    check_wanted(wanted, tuple(inputs))
    if out is None:
        out = (None,) * len(inputs)
    if not isinstance(out, tuple) or len(out) != len(inputs):
        raise ValueError(f"out must be a tuple of an array or None for each of {', '.join(inputs)}; got {shown(out)}")
    given = [array for array in inputs.values() if array is not None]
    results = []
    for number, (array, (name, like), asked) in enumerate(zip(out, inputs.items(), wanted, strict=True)):
        if (like is None or not asked) and array is not None:
            why = f"without {name}" if like is None else f"where the gradient of {name} is not wanted"
            raise ValueError(f"out[{number}] must be None {why}")
        results.append(None if like is None or not asked else read_out(array, like, f"out[{number}]"))
        if array is None:
            continue
        if not array.flags.c_contiguous:
            raise ValueError(f"out[{number}] must be C-contiguous")
        others = [other for other in results[:-1] if other is not None]
        if any(np.may_share_memory(array, other) for other in (*given, *others)):
            raise ValueError(f"out[{number}] must not overlap an input or another output")
    return results


def read_memory(memory, default):
    """How many bytes a call may take beside its results: a positive whole number, or ``default`` for None."""
    if memory is None:
        return default
    if isinstance(memory, bool) or not isinstance(memory, (int, np.integer)):
        raise TypeError(f"memory must be a whole number of bytes or None, not {shown(memory)}")
    if memory < 1:
        raise ValueError(f"memory must be positive; got {memory}")
    return int(memory)


def read_grad_output(grad_output, reduction, shape):
    """The upstream gradient in float64: a scalar, or of ``shape`` for reduction "none"."""
    check_grad_output(grad_output := np.asarray(grad_output), reduction, shape)
    return grad_output.astype(np.float64)


def check_grad_output(grad_output, reduction, shape):
    """An array, NumPy's or another's, of real numbers: a scalar, or of ``shape`` for reduction "none"."""
    _check_reals("grad_output", grad_output.dtype)
    if grad_output.ndim and reduction != "none":
        raise ValueError(f'grad_output must be a scalar unless reduction is "none"; got shape {grad_output.shape}')
    if grad_output.ndim and grad_output.shape != shape:
        raise ValueError(f"grad_output must have the targets' shape {shape}, not {grad_output.shape}")


def read_row_gradient(grad_output, rows):
    """An upstream gradient for each of `AxisRows`, float64 (N,)."""
    grad_output, shape = read_reals("grad_output", grad_output), rows.reduced_shape(False)
    if grad_output.shape == rows.reduced_shape(True):
        grad_output = grad_output.reshape(shape)
    try:
        return np.broadcast_to(grad_output, shape).reshape(-1)
    except ValueError:
        raise ValueError(f"grad_output must broadcast to the result's shape {shape}; got {grad_output.shape}") from None


def read_like(name, values, array):
    """Real numbers of the shape of ``array``, or that broadcast to it."""
    values = _array_of_reals(name, values)
    try:
        return np.broadcast_to(values, array.shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the logits' shape {array.shape}; got {values.shape}") from None


def read_reals(name, values):
    """An array of real numbers as float64."""
    return _array_of_reals(name, values).astype(np.float64)


def _array_of_reals(name, values):
    values = np.asarray(values)
    _check_reals(name, values.dtype)
    return values


def _check_reals(name, dtype):
    if dtype.kind not in "fiu" and not is_floating(dtype):
        raise TypeError(f"{name} must hold real numbers, not {dtype}")


def read_real(name, value):
    """A real number as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a real number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within a float's range; got {shown(value)}") from None


def read_positive(name, value):
    """A positive and finite real number."""
    value = read_real(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")
    return value


def read_smoothing(smoothing):
    """A label smoothing in [0, 1]."""
    smoothing = read_real("label_smoothing", smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1]; got {smoothing}")
    return smoothing


def check_ignore_index(ignore_index):
    """An integer, or None."""
    if ignore_index is not None and not isinstance(ignore_index, (int, np.integer)):
        raise TypeError(f"ignore_index must be an integer or None, not {shown(ignore_index)}")


def check_reduction(reduction):
    """``reduction`` is one of `REDUCTIONS`."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {shown(reduction)}")


def check_amounts(name, values):
    """Finite and not negative, without a temporary of their size."""
    if not values.size or _bits_of_amounts(values):
        return
    with np.errstate(invalid="ignore"):  # of a NaN
        lowest, highest = float(values.min()), float(values.max())
    # as Python's numbers: beside an infinity, which it does not have, float8_e4m3fn compares as beside a NaN
    if not (lowest >= 0 and highest < math.inf):
        first = next(value for value in values.reshape(-1) if not 0 <= float(value) < math.inf)
        raise ValueError(f"{name} must be finite and not negative; got {first}")


def _bits_of_amounts(values):
    """Whether all are finite and not negative by their bits alone, in one pass: False may also mean -0."""
    if values.dtype.kind != "f" or not values.dtype.isnative:
        return False
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    return values.view(unsigned).max() < np.array(np.inf, values.dtype).view(unsigned)


def check_within(name, values):
    """All in [0, 1]."""
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        first = next(value for value in values.reshape(-1) if not 0 <= value <= 1)
        raise ValueError(f"{name} must lie in [0, 1]; got {first}")


def read_probabilities(name, p):
    """Real numbers in [0, 1] as float64."""
    p = read_reals(name, p)
    check_within(name, p)
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
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"q must have as many classes as p, {p.shape[-1]}; got {q.shape[-1]}")
    try:
        return np.broadcast_arrays(p, q)
    except ValueError:
        raise ValueError(f"q must broadcast with p; got shapes {p.shape} and {q.shape}") from None


def read_base(base):
    """The base of a logarithm: positive, finite and not 1."""
    base = read_real("base", base)
    if not 0.0 < base < math.inf or base == 1.0:
        raise ValueError(f"base must be positive, finite and not 1; got {base}")
    return base


def read_clip(clip):
    """How far probabilities are held from 0 and 1."""
    clip = read_real("clip", clip)
    if not 0.0 <= clip < 0.5:
        raise ValueError(f"clip must lie in [0, 0.5); got {clip}")
    return clip
