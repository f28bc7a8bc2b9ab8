"""logsumexp, log_softmax and softmax over the last axis."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends


def logsumexp(logits: ArrayLike, *, backend: str | None = None) -> np.floating | NDArray[np.floating]:
    """log(sum(exp(logits))) over the last axis, in nats.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V)
    backend : str, optional
        As for `fastxent.cross_entropy`.

    Returns
    -------
    ndarray of shape (...), or a NumPy scalar for one row; of the logits' dtype
        -inf for a row of -inf, +inf for a row with +inf, as scipy.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `fastxent.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.logsumexp(np.zeros((2, 4)))
    array([1.38629436, 1.38629436])
    """
    read = arguments.read_logits(logits)
    lse = backends.choose(backend).logsumexp(arguments.as_rows(read))
    return lse.astype(arguments.loss_dtype(read.dtype)).reshape(read.shape[:-1])[()]


def log_softmax(logits: ArrayLike, *, out: NDArray | None = None, backend: str | None = None) -> NDArray:
    """logits - logsumexp(logits) over the last axis: log-probabilities in nats, none above 0.

    The largest logit's comes from the sum of the others, so a confident row does not round to 0.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V)
    out : ndarray, optional
        Of the logits' shape, their dtype or float32 or float64, C-contiguous; ``logits`` itself works in place.
    backend : str, optional
        As for `fastxent.cross_entropy`.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `fastxent.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.log_softmax(np.float32([20, 0]))
    array([-2.0611537e-09, -2.0000000e+01], dtype=float32)
    """
    return _over_rows("log_softmax", logits, out, backend)


def softmax(logits: ArrayLike, *, out: NDArray | None = None, backend: str | None = None) -> NDArray:
    """exp(logits) / sum(exp(logits)) over the last axis: probabilities.

    Parameters, result and errors as for `log_softmax`; a row that is all -inf, or holds +inf or NaN, gives NaN.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.softmax(np.float32([0, 0, -np.inf]))
    array([0.5, 0.5, 0. ], dtype=float32)
    """
    return _over_rows("softmax", logits, out, backend)


def _over_rows(verb, logits, out, backend):
    logits = arguments.read_logits(logits)
    out = arguments.read_out(out, logits)
    getattr(backends.choose(backend), verb)(arguments.as_rows(logits), arguments.as_rows(out))
    return out
