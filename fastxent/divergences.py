"""Entropy of a distribution given by logits, and divergences of two: over classes of the last or another axis.

The values come from kernels of their own; for gradients each row is taken in float64, some megabytes of rows at a time,
through the log-softmax kernel. Confident rows keep their digits in both. For probabilities see `fastxent.information`.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import backends, checks, probmath
from fastxent.rows import row_blocks


def entropy_from_logits(
    logits: ArrayLike, *, axis: int = -1, backend: str | None = None
) -> np.floating | NDArray[np.floating]:
    r"""The entropy of softmax(logits) in nats, :math:`-\sum_k p_k \log p_k`.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V)
    axis : int
        Where the classes are.
    backend : str, optional
        As for `fastxent.cross_entropy`.

    Returns
    -------
    ndarray of shape (...), or a NumPy scalar; float64 for float64 logits, else float32
        NaN for a row that is all -inf or holds +inf or NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `fastxent.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.entropy_from_logits(np.float32([0, 0]))
    np.float32(0.6931472)
    """
    rows = checks.read_rows(logits, axis)
    scores = backends.choose(backend).score(rows.logits, np.zeros(len(rows.logits), np.int64))
    return _shaped(scores.entropy, [rows])


def entropy_from_logits_grad(
    logits: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    axis: int = -1,
    out: NDArray | None = None,
    backend: str | None = None,
) -> NDArray:
    """The gradient of `entropy_from_logits`: -p (log p + H), times ``grad_output``.

    Parameters
    ----------
    logits, axis, backend
        As for `entropy_from_logits`.
    grad_output : array_like, of shape (...) with or without the axis of the classes, or broadcast to it
        The upstream gradient.
    out : ndarray, optional
        Where the gradient goes: of the logits' shape, their dtype or float32 or float64; ``logits`` itself in place.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given. NaN in rows whose entropy is NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `entropy_from_logits`, and for a bad ``grad_output`` or ``out``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.entropy_from_logits_grad(np.log([0.2, 0.8])).round(4)
    array([ 0.2218, -0.2218])
    """
    rows = checks.read_rows(logits, axis)
    (gradient,) = _written([rows], grad_output, [out], backend, lambda p, log_p: [probmath.entropy_gradient(p, log_p)])
    return gradient


def kl_divergence_from_logits(
    logits_p: ArrayLike, logits_q: ArrayLike, *, axis: int = -1, backend: str | None = None
) -> np.floating | NDArray[np.floating]:
    r"""The Kullback-Leibler divergence of softmax(logits_q) from softmax(logits_p) in nats, never negative.

    .. math:: \mathrm{KL}(p \| q) = \sum_k p_k \log (p_k / q_k)

    Parameters
    ----------
    logits_p, logits_q : array_like, of one shape (..., V)
        Of the dtypes of `fastxent.cross_entropy`, not necessarily the same: a model and its quantised copy.
    axis, backend
        As for `entropy_from_logits`.

    Returns
    -------
    ndarray of shape (...), or a NumPy scalar; float64 if either is float64, else float32
        inf where q rules out a class that p does not; NaN where a row of either is all -inf or holds +inf or NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `fastxent.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.kl_divergence_from_logits(np.log([0.5, 0.5]), np.log([0.25, 0.75])).round(6)
    np.float64(0.143841)
    """
    pair = checks.read_pair(logits_p, logits_q, axis)
    return _shaped(_divergences(pair, backend)[0], pair)


def kl_divergence_from_logits_grad(
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    axis: int = -1,
    out: tuple[NDArray | None, NDArray | None] = (None, None),
    backend: str | None = None,
) -> tuple[NDArray, NDArray]:
    """The gradients of `kl_divergence_from_logits`: p (log(p / q) - KL) and q - p, times ``grad_output``.

    Parameters
    ----------
    logits_p, logits_q, axis, backend
        As for `kl_divergence_from_logits`.
    grad_output
        As for `entropy_from_logits_grad`.
    out : pair of ndarray or None
        Where the gradients go, each as for `entropy_from_logits_grad`; the two must not overlap.

    Returns
    -------
    dlogits_p, dlogits_q : ndarray of the shape and dtype of its logits, float32 for float8
        Those of ``out`` that were given. NaN in rows whose divergence is NaN; where it is inf, that of p is not finite.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `kl_divergence_from_logits`, and for a bad ``grad_output`` or ``out``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> by_p, by_q = fastxent.kl_divergence_from_logits_grad(np.log([0.5, 0.5]), np.log([0.2, 0.8]))
    >>> by_q.round(4)
    array([-0.3,  0.3])
    """
    pair = checks.read_pair(logits_p, logits_q, axis)

    def gradients(p, log_p, q, log_q):
        divergence = probmath.kl_divergence(p, log_p, q, log_q)
        return [probmath.kl_gradient(p, log_p, log_q, divergence), q - p]

    return tuple(_written(pair, grad_output, out, backend, gradients))


def js_divergence_from_logits(
    logits_p: ArrayLike, logits_q: ArrayLike, *, axis: int = -1, backend: str | None = None
) -> np.floating | NDArray[np.floating]:
    r"""The Jensen-Shannon divergence of two softmax distributions in nats: in [0, log 2], symmetric.

    Half of :math:`\mathrm{KL}(p \| m) + \mathrm{KL}(q \| m)` with m = (p + q) / 2 (Lin, 1991).

    Parameters
    ----------
    logits_p, logits_q, axis, backend
        As for `kl_divergence_from_logits`.

    Returns
    -------
    ndarray of shape (...), or a NumPy scalar; float64 if either is float64, else float32
        NaN where a row of either is all -inf or holds +inf or NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `fastxent.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.js_divergence_from_logits(np.float32([0, -np.inf]), np.float32([-np.inf, 0]))
    np.float32(0.6931472)
    """
    pair = checks.read_pair(logits_p, logits_q, axis)
    return _shaped(_divergences(pair, backend)[1], pair)


def js_divergence_from_logits_grad(
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    axis: int = -1,
    out: tuple[NDArray | None, NDArray | None] = (None, None),
    backend: str | None = None,
) -> tuple[NDArray, NDArray]:
    r"""The gradients of `js_divergence_from_logits`, times ``grad_output``.

    :math:`\tfrac{1}{2} p_k (\log (p_k / m_k) - \mathrm{KL}(p \| m))` with m = (p + q) / 2, and the same of q.

    Parameters
    ----------
    logits_p, logits_q, grad_output, axis, out, backend
        As for `kl_divergence_from_logits_grad`.

    Returns
    -------
    dlogits_p, dlogits_q : ndarray of the shape and dtype of its logits, float32 for float8
        Those of ``out`` that were given. NaN in rows whose divergence is NaN.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `kl_divergence_from_logits_grad`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> by_p, by_q = fastxent.js_divergence_from_logits_grad(np.log([0.5, 0.5]), np.log([0.2, 0.8]))
    >>> by_p.round(4)
    array([ 0.0774, -0.0774])
    """
    pair = checks.read_pair(logits_p, logits_q, axis)

    def gradients(p, log_p, q, log_q):
        return [probmath.js_gradient(p, log_p, log_q), probmath.js_gradient(q, log_q, log_p)]

    return tuple(_written(pair, grad_output, out, backend, gradients))


def _distributions(sources, some, verbs):
    """p, log p of each of ``sources`` in turn, for a slice of rows."""
    for rows in sources:
        block = rows.logits[some].astype(np.float64)
        yield verbs.softmax(block, np.empty(block.shape))
        yield verbs.log_softmax(block, np.empty(block.shape))


def _divergences(pair, backend):
    verbs, (p, q) = backends.choose(backend), (rows.logits for rows in pair)
    if checks.loss_dtype(p.dtype) == checks.loss_dtype(q.dtype):
        return verbs.divergences(p, q, verbs.logsumexp(p), verbs.logsumexp(q))
    found = np.empty((2, len(p)))
    for some in row_blocks(p):  # float64 beside less: both are taken as float64
        blocks = [rows[some].astype(np.float64) for rows in (p, q)]
        found[:, some] = verbs.divergences(*blocks, *map(verbs.logsumexp, blocks))
    return found


def _shaped(values, sources):
    """One number a row as the caller gets it."""
    dtype = np.result_type(*(checks.loss_dtype(rows.logits.dtype) for rows in sources))
    return values.astype(dtype).reshape(sources[0].reduced_shape(False))[()]


def _written(sources, grad_output, outs, backend, formula):
    g = checks.read_row_gradient(grad_output, sources[0])
    if not isinstance(outs, (tuple, list)) or len(outs) != len(sources):
        raise ValueError(f"out must be a pair of arrays or None; got {checks.shown(outs)}")
    results = [checks.read_out(out, rows.array) for rows, out in zip(sources, outs, strict=True)]
    if len(results) > 1 and np.may_share_memory(*results):
        raise ValueError("out must be two arrays that do not overlap each other")
    written = [rows.like(result) for rows, result in zip(sources, results, strict=True)]
    verbs = backends.choose(backend)
    for some in sources[0].blocks():
        for target, gradient in zip(written, formula(*_distributions(sources, some, verbs)), strict=True):
            with np.errstate(invalid="ignore", over="ignore"):
                target[some] = g[some, None] * gradient
    return results
