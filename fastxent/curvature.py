"""Second order: the Hessian of each row's cross entropy times a vector, and its diagonal.

For a row with probabilities p whose gradient with respect to z, its logits in nats, is c p minus what does not depend
on z, the Hessian is c (diag(p) - p p^T) + 2 g z_loss p p^T. The softmax kernel gives p in float64, block by block; a
softcap adds the gradient times the second derivative of z.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, checks, probmath, terms
from fastxent.losses import cross_entropy_grad
from fastxent.rows import as_rows, classes_last, row_blocks
from fastxent.state import IGNORED


def cross_entropy_hvp(
    logits: ArrayLike,
    targets: arguments.Targets,
    v: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> NDArray:
    r"""The Hessian of `fastxent.cross_entropy` with respect to the logits, times ``v``.

    For a row with probabilities p, :math:`c\,p_k (v_k - \sum_j p_j v_j)`, and what the z-loss and a softcap add.

    Parameters
    ----------
    logits, targets, backend, **options
        As for `fastxent.cross_entropy`, without ``return_lse`` and ``check``; on the host.
    v : array_like, broadcast to the logits' shape
    grad_output : float, or array of shape (...) for reduction "none"
        The upstream gradient of the loss.
    out : ndarray, optional
        As for `fastxent.cross_entropy_with_grad`, and ``v`` itself or apart from it.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As `fastxent.cross_entropy`, and for a bad ``v``, ``grad_output`` or ``out``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy_hvp(np.zeros((1, 2)), [0], [[1.0, 0.0]])
    array([[ 0.25, -0.25]])
    """
    logits = checks.read_array(logits)
    given, v = v, checks.read_like("v", v, logits)
    if out is not None and out is not given and np.may_share_memory(out, v):
        raise ValueError("out must be v itself or not overlap it")

    def product(rows, v, p, slope, c, square):
        u = slope * v[rows].astype(np.float64)
        along = square * p * (p * u).sum(axis=1, keepdims=True)
        return slope * (c * probmath.centred(p, u) + along)

    return _by_blocks(logits, targets, v, product, grad_output, out, backend, options)


def cross_entropy_hessian_diag(
    logits: ArrayLike,
    targets: arguments.Targets,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> NDArray:
    r"""The diagonal of the Hessian of `fastxent.cross_entropy`: :math:`c\,p_k (1 - p_k)` for a row.

    Parameters
    ----------
    logits, targets, grad_output, out, backend, **options
        As for `cross_entropy_hvp`.

    Returns
    -------
    ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As `cross_entropy_hvp`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy_hessian_diag(np.zeros((1, 2)), [0])
    array([[0.25, 0.25]])
    """

    def diagonal(rows, _, p, slope, c, square):
        return slope**2 * (c * p * probmath.complement(p) + square * p**2)

    return _by_blocks(checks.read_array(logits), targets, np.ones(()), diagonal, grad_output, out, backend, options)


def _by_blocks(logits, targets, v, entries, grad_output, out, backend, options):
    """``entries(rows, v, p, dz/dx, c, 2 g z_loss)`` of every block of rows; under a softcap also v d2z/dx2 dz."""
    problem = arguments.normalise(logits, targets, options)
    if problem.options.return_lse:
        raise TypeError("return_lse goes with cross_entropy and cross_entropy_with_grad alone")
    grad_output = checks.read_grad_output(grad_output, problem.options.reduction, problem.shape)
    result = checks.read_out(out, logits)
    axis, softcap = problem.options.axis, problem.options.softcap
    gradient: Any = None
    if softcap is not None:
        wide = np.empty(logits.shape)
        cross_entropy_grad(logits, targets, grad_output=grad_output, out=wide, backend=backend, **options)
        gradient = as_rows(classes_last(wide, axis))
    of_rows, verbs = terms.of(problem), backends.choose(backend)
    # what `terms` divides by the temperature is here with respect to logits in nats
    in_nats = [column * problem.options.temperature for column in of_rows.coefficients(grad_output.reshape(-1))]
    coefficients = terms.Coefficients(*in_nats)
    written, v = (
        as_rows(classes_last(result, axis)),
        as_rows(classes_last(np.broadcast_to(v, logits.shape), axis)),
    )
    for rows in row_blocks(problem.logits):
        x, slope = problem.logits[rows].astype(np.float64), 1.0 / problem.options.temperature
        z = x * slope
        if softcap is not None:
            capped, capped_slope = probmath.softcapped(x, softcap)
            z, slope = capped * slope, capped_slope * slope
        counts = (of_rows.targets[rows] != IGNORED)[:, None]
        p = np.where(counts, verbs.softmax(z, np.empty(z.shape)), 0.0)
        lse = verbs.logsumexp(z)
        c = of_rows.slope_of_probabilities(coefficients, lse, rows)[:, None]
        square = np.atleast_1d(coefficients.of(rows).square)[:, None]
        with np.errstate(invalid="ignore"):
            block = entries(rows, v, p, slope, c, square)
            if softcap is not None:
                block = block + v[rows] * gradient[rows] * probmath.softcap_bend(x, softcap)
        with np.errstate(over="ignore"):
            written[rows] = np.where(counts, block, 0.0)
    return result
