"""logsumexp, log_softmax and softmax over any axes, with a mask and a scale, and their vector-Jacobian products."""

import sys
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import backends, checks, probmath

Axis = int | tuple[int, ...] | None


def logsumexp(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    keepdims: bool = False,
    scale: float = 1.0,
    where: ArrayLike | None = None,
    backend: str | None = None,
) -> np.floating | NDArray[np.floating]:
    """log(sum(exp(scale * logits))), in nats.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64
    axis : int, tuple of int, or None
        The axes to sum over; None for all.
    keepdims : bool
        Whether the axes summed over stay, of length 1.
    scale : float
        Positive; no digit is lost to it.
    where : array_like of bool, broadcast to the logits' shape, optional
        False leaves a logit out, as if it were -inf.
    backend : str, optional
        As for `fastxent.cross_entropy`.

    Returns
    -------
    ndarray, or a NumPy scalar; float64 for float64 logits, else float32
        -inf where every logit is -inf or left out, +inf with +inf among them, as scipy.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `fastxent.cross_entropy`.
    NotImplementedError
        For logits on a device, with ``where`` or an ``axis`` that is None or a tuple, or on another GPU than the first.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.logsumexp(np.zeros((2, 4)))
    array([1.38629436, 1.38629436])
    """
    if checks.is_on_device(logits):
        return _on_device("logsumexp", logits, axis, scale, where, backend, keepdims=keepdims)
    rows = checks.read_rows(logits, axis, where)
    lse = backends.choose(backend).logsumexp(rows.logits, temperature=temperature_of(scale))
    with np.errstate(over="ignore"):
        return lse.astype(checks.loss_dtype(rows.logits.dtype)).reshape(rows.reduced_shape(keepdims))[()]


def log_softmax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    scale: float = 1.0,
    where: ArrayLike | None = None,
    out: NDArray | None = None,
    backend: str | None = None,
) -> NDArray:
    """scale * logits - logsumexp(scale * logits): log-probabilities in nats, none above 0.

    The largest logit's comes from the sum of the others, so a confident row does not round to 0.

    Parameters
    ----------
    logits, axis, scale, where, backend
        As for `logsumexp`.
    out : ndarray, optional
        Of the logits' shape, their dtype or float32 or float64; ``logits`` itself works in place.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given. -inf where a logit is left out; NaN in rows that are all -inf or left out, or hold +inf
        or NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError, NotImplementedError
        As for `logsumexp`, and for a bad ``out``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.log_softmax(np.float32([20, 0]))
    array([-2.0611537e-09, -2.0000000e+01], dtype=float32)
    """
    return _over_rows("log_softmax", logits, axis, scale, where, out, backend)


def softmax(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    scale: float = 1.0,
    where: ArrayLike | None = None,
    out: NDArray | None = None,
    backend: str | None = None,
) -> NDArray:
    """exp(scale * logits) / sum(exp(scale * logits)): probabilities.

    Parameters
    ----------
    logits, axis, scale, where, out, backend
        As for `log_softmax`.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given. 0 where a logit is left out; NaN in rows that are all -inf or left out, or hold +inf or
        NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError, NotImplementedError
        As for `log_softmax`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.softmax(np.float32([0, 0, -np.inf]))
    array([0.5, 0.5, 0. ], dtype=float32)

    Attention weights under a causal mask, softmax(Q K^T / sqrt(d)):

    >>> fastxent.softmax(np.zeros((3, 3)), scale=0.125, where=np.tri(3, dtype=bool))
    array([[1.        , 0.        , 0.        ],
           [0.5       , 0.5       , 0.        ],
           [0.33333333, 0.33333333, 0.33333333]])
    """
    return _over_rows("softmax", logits, axis, scale, where, out, backend)


def logsumexp_grad(
    logits: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    axis: Axis = -1,
    scale: float = 1.0,
    where: ArrayLike | None = None,
    out: NDArray | None = None,
    backend: str | None = None,
) -> NDArray:
    """The gradient of `logsumexp`: scale * grad_output * softmax(scale * logits).

    Parameters
    ----------
    logits, axis, scale, where, out, backend
        As for `softmax`; on the host.
    grad_output : array_like, of the shape of the result with or without the axes summed over, or broadcast to it
        The upstream gradient.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given. 0 where a logit is left out; NaN in rows whose softmax is NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `softmax`, and for a bad ``grad_output``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.logsumexp_grad(np.zeros((2, 4)), grad_output=[4, 8])
    array([[1., 1., 1., 1.],
           [2., 2., 2., 2.]])
    """
    rows, written = _read(logits, axis, where, out)
    g = checks.read_row_gradient(grad_output, rows)
    for some, p in _probabilities(rows, scale, backend):
        written.rows[some] = float(scale) * g[some, None] * p
    return written.array


def log_softmax_grad(
    logits: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    axis: Axis = -1,
    scale: float = 1.0,
    where: ArrayLike | None = None,
    out: NDArray | None = None,
    backend: str | None = None,
) -> NDArray:
    """The vector-Jacobian product of `log_softmax`: scale * (g - softmax * sum(g)) with g = ``grad_output``, (..., V).

    Taken as (1 - softmax) * g - softmax * (sum(g) - g), with 1 - softmax of the largest logit the sum of the others: a
    confident row keeps its digits. A logit left out has gradient 0, and its g counts for nothing.

    Parameters
    ----------
    logits, axis, scale, where, out, backend
        As for `logsumexp_grad`.
    grad_output : array_like, broadcast to the logits' shape
        The upstream gradient.

    Returns
    -------
    ndarray
        As for `logsumexp_grad`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `logsumexp_grad`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.log_softmax_grad(np.zeros(4), grad_output=[1, 0, 0, 0])
    array([ 0.75, -0.25, -0.25, -0.25])
    """

    def product(p, g):
        return probmath.complement(p) * g - p * (probmath.total(g) - g)

    return _vector_jacobian(product, logits, grad_output, axis, scale, where, out, backend)


def softmax_grad(
    logits: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    axis: Axis = -1,
    scale: float = 1.0,
    where: ArrayLike | None = None,
    out: NDArray | None = None,
    backend: str | None = None,
) -> NDArray:
    """The vector-Jacobian product of `softmax`: scale * p * (g - sum(p * g)) with g = ``grad_output``, (..., V).

    Parameters
    ----------
    logits, grad_output, axis, scale, where, out, backend
        As for `log_softmax_grad`.

    Returns
    -------
    ndarray
        As for `logsumexp_grad`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `logsumexp_grad`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.softmax_grad(np.zeros(4), grad_output=[4, 0, 0, 0])
    array([ 0.75, -0.25, -0.25, -0.25])
    """
    return _vector_jacobian(probmath.centred, logits, grad_output, axis, scale, where, out, backend)


def temperature_of(scale):
    """1 / scale, exactly; a TypeError or ValueError if that is no temperature."""
    if not checks.read_positive("scale", scale) < checks.LARGEST_SCALE:
        raise ValueError(f"scale must be less than {checks.LARGEST_SCALE:.0e}; got {scale}")
    temperature = 1 / Fraction(float(scale))
    if temperature > Fraction(sys.float_info.max):
        raise ValueError(f"scale must be at least {1 / sys.float_info.max:.3g}; got {scale}")
    return temperature


def _on_device(function, logits, axis, scale, where, backend, **how):
    """A function of logits on a CUDA device, whose result is there too."""
    functions = backends.for_device(backend, "softmaxes")
    if where is not None:
        raise NotImplementedError("where must be None for logits on a device: mask them with -inf there")
    if axis is None or isinstance(axis, tuple):
        raise NotImplementedError(f"axis must be one for logits on a device; got {axis}")
    return getattr(functions, function)(logits, temperature_of(scale), axis=axis, **how)


def _over_rows(verb, logits, axis, scale, where, out, backend):
    if checks.is_on_device(logits):
        return _on_device(verb, logits, axis, scale, where, backend, out=out)
    temperature, (rows, written) = temperature_of(scale), _read(logits, axis, where, out)
    getattr(backends.choose(backend), verb)(rows.logits, written.rows, temperature=temperature)
    return written.array


class _Written(NamedTuple):
    """What is returned, and its rows for the kernels to write."""

    array: NDArray
    rows: Any


def _read(logits, axis, where, out):
    rows = checks.read_rows(logits, axis, where)
    array = checks.read_out(out, rows.array)
    return rows, _Written(array, rows.like(array))


def _vector_jacobian(product, logits, grad_output, axis, scale, where, out, backend):
    """scale * product(p, g), block by block."""
    rows, written = _read(logits, axis, where, out)
    upstream = rows.like(checks.read_like("grad_output", grad_output, rows.array))
    for some, p in _probabilities(rows, scale, backend):
        with np.errstate(invalid="ignore", over="ignore"):
            written.rows[some] = float(scale) * product(p, rows.where_kept(some, upstream[some]))
    return written.array


def _probabilities(rows, scale, backend):
    """``rows, p``: slices of rows and their probabilities in float64, some megabytes at a time."""
    verbs, temperature = backends.choose(backend), temperature_of(scale)
    for some in rows.blocks():
        block = rows.logits[some]
        yield some, verbs.softmax(block, np.empty(block.shape), temperature=temperature)
