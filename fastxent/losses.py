"""Cross entropy and its gradient: documentation and short bodies."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, checks, terms
from fastxent.reduction import reduce
from fastxent.rows import as_rows, classes_last, points, put


def cross_entropy(
    logits: ArrayLike,
    targets: arguments.Targets,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    denominator: float | None = None,
    return_lse: bool = False,
    axis: int = -1,
    check: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Cross entropy of targets under logits, in nats.

    For a row z of V logits with target t, weights w, smoothing e and z-loss :math:`\lambda`:

    .. math::

        (1 - e) w_t (\mathrm{lse}(z) - z_t) + \frac{e}{V} \sum_k w_k (\mathrm{lse}(z) - z_k)
        + \lambda\, \mathrm{lse}(z)^2

    and with probabilities q as targets :math:`\sum_k w_k ((1 - e) q_k + e / V) (\mathrm{lse}(z) - z_k)` for
    the first two terms, where z is softcap tanh(logits / softcap) / temperature. Confident rows keep their digits:
    ``lse - z_t`` is never a subtraction but the log1p of the other classes' sum.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V)
        Unnormalised log-probabilities. Never changed.
    targets : array_like of integers, shape (...); or of floats, shape (..., V); or a tuple (ids, probabilities)
        Class indices in [0, V), or ``ignore_index``; or probabilities, which need not sum to 1; or those of k classes a
        row, both (..., k): repeated ids add, slots that hold ``ignore_index`` count nothing.
    weight : array_like, shape (V,), optional
        A non-negative weight for each class.
    ignore_index : int or None
        A target with this value counts for nothing and its row is not read; None switches it off.
    label_smoothing : float
        In [0, 1]: the share of the target spread evenly over all classes.
    z_loss : float
        What the square of each row's logsumexp is multiplied by and added (PaLM, section 5); 0 for none.
    softcap : float, optional
        Logits become softcap tanh(logits / softcap), as in Gemma 2.
    temperature : float
        What they are then divided by; no digit is lost to it.
    sample_weight : array_like, shape (...), optional
        A non-negative weight for each row; a row of weight 0 is not read.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum by that of the counted rows' weight_t * sample_weight for class indices, as torch does,
        and by the sum of sample_weight, or the number of rows, for probabilities.
    denominator : float, optional
        With "mean", what to divide by instead: gradient accumulation, or 1 for a batch that may be empty.
    return_lse : bool
        Whether to return each row's logsumexp too: of shape (...), in nats, NaN where a row is not read.
    axis : int
        Where the classes are; 1 for logits (N, V, d1, ...) as torch has them.
    check : bool
        For arrays on a device: wait, and raise the IndexError of this call instead of a later one. Targets of the host
        are always checked.
    backend : str, optional
        A name from `fastxent.backends`; by default FASTXENT_BACKEND, else "cpu".

    Returns
    -------
    loss : NumPy scalar, or ndarray of shape (...) for "none"
        float64 for float64 logits, float32 for all others: never rounded to half. With ``return_lse`` a tuple of it
        and the lse.

    Raises
    ------
    IndexError
        If a target is out of range; the message counts them and shows the first.
    TypeError, ValueError
        If an argument has the wrong dtype, shape or value.
    BackendUnavailableError
        If the backend cannot run here.
    NotImplementedError
        For arrays on a device: if targets are a tuple, class indices other than int64 and int32, or probabilities of
        another dtype than the loss that are not torch's or cupy's; if the device is not the first GPU.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy(np.float32([[20, 0]]), [0])
    np.float32(2.0611537e-09)
    """
    options = arguments.Options(
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        sample_weight=sample_weight,
        reduction=reduction,
        denominator=denominator,
        return_lse=return_lse,
        axis=axis,
    )
    if checks.is_on_device(logits):
        return backends.for_device(backend).cross_entropy(logits, targets, options, check=check)
    return loss_of(arguments.normalise(logits, targets, options), backends.choose(backend))


def loss_of(problem, verbs):
    """What `cross_entropy` returns for a checked problem, by the verbs of a backend."""
    of_rows = terms.of(problem)
    return of_rows.loss(verbs.statistics(problem.logits, of_rows.targets, **of_rows.kernel_options()))


def cross_entropy_with_grad(
    logits: ArrayLike,
    targets: arguments.Targets,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    check: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Any:
    r"""Cross entropy and its gradient with respect to the logits, in one pass over them.

    The gradient of a row whose loss has the upstream gradient g is

    .. math::

        g [(1 - e) w_t + \tfrac{e}{V} \sum_j w_j + 2 \lambda\, \mathrm{lse}(z)] p_k - g \tfrac{e}{V} w_k
        - g (1 - e) w_t [k = t]

    times the derivative of z, with :math:`p_t - 1` taken from the other classes' sum, so a confident row's gradient is
    as small as it is and never 0 for want of digits.

    Parameters
    ----------
    logits, targets, check, backend, **options
        As for `cross_entropy`.
    grad_output : float, or array of shape (...) for reduction "none"; on a device a float, or an array there
        The upstream gradient of the returned loss; it scales before the result is rounded.
    out : ndarray, optional
        Where the gradient goes: of the logits' shape, their dtype or float32 or float64; ``logits`` itself for a
        gradient in place. Fastest where it is C-contiguous and the classes are its last axis. A mean over many rows is
        small: float16 may round it to 0, float32 does not.
        After Ctrl-C it holds the gradient in its first rows, each whole, and in the others what it held before; with
        ``logits`` as ``out`` those are logits still, and the call cannot be repeated. Targets of a few probabilities
        have their own entries written last of all: interrupted, no row is the gradient there.

    Returns
    -------
    loss : as `cross_entropy`
    lse : only with ``return_lse``
    dlogits : ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given; rounded once to its dtype.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError, NotImplementedError
        As `cross_entropy`, and for a bad ``grad_output`` or ``out``; before anything is written, but for the IndexError
        of targets on a device, whose rows are NaN then.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy_with_grad(np.float32([[20, 0]]), [0])
    (np.float32(2.0611537e-09), array([[-2.0611537e-09,  2.0611537e-09]], dtype=float32))
    """
    if checks.is_on_device(logits):
        return backends.for_device(backend).cross_entropy_with_grad(
            logits, targets, options, grad_output=grad_output, out=out, check=check
        )
    problem = arguments.normalise(logits, targets, options)
    dlogits = checks.read_out(out, checks.read_array(logits))
    if out is not None:
        checks.refuse_overlap(out, targets)
    grad_output = checks.read_grad_output(grad_output, problem.options.reduction, problem.shape).reshape(-1)
    loss = loss_and_gradient_of(problem, grad_output, dlogits, backends.choose(backend))
    return (*loss, dlogits) if problem.options.return_lse else (loss, dlogits)


def loss_and_gradient_of(problem, grad_output, dlogits, verbs):
    """As `loss_of`, and the gradient for an upstream one, float64 (N,) or (1,), is written to ``dlogits``."""
    of_rows, rows = terms.of(problem), as_rows(classes_last(dlogits, problem.options.axis))
    statistics = verbs.statistics_and_gradient(
        problem.logits, of_rows.targets, of_rows.coefficients(grad_output), rows, **of_rows.kernel_options()
    )
    of_rows.correct(rows, statistics, grad_output)
    return of_rows.loss(statistics)


def cross_entropy_grad(
    logits: ArrayLike,
    targets: arguments.Targets,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> NDArray:
    """The gradient of `cross_entropy` with respect to the logits; its formula is that of `cross_entropy_with_grad`.

    Parameters
    ----------
    logits, targets, grad_output, out, backend, **options
        As for `cross_entropy_with_grad`, without ``return_lse``.

    Returns
    -------
    dlogits : ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given; rounded once to its dtype.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError, NotImplementedError
        As `cross_entropy_with_grad`, and a TypeError for ``return_lse``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy_grad(np.float32([[0, 0]]), [1])
    array([[ 0.5, -0.5]], dtype=float32)
    """
    if options.get("return_lse"):
        raise TypeError("return_lse goes with cross_entropy and cross_entropy_with_grad, not with cross_entropy_grad")
    return cross_entropy_with_grad(logits, targets, grad_output=grad_output, out=out, backend=backend, **options)[1]


def nll_loss(
    log_probs: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    axis: int = -1,
) -> np.floating | NDArray[np.floating]:
    r"""Negative log-likelihood of class indices, :math:`-w_t \log p_t`, of log-probabilities someone has computed.

    `cross_entropy` takes the logits themselves, in one pass and with more digits.

    Parameters
    ----------
    log_probs : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V)
        In nats.
    targets, weight, ignore_index, reduction, axis
        As for `cross_entropy`; class indices.

    Returns
    -------
    loss : as `cross_entropy`

    Raises
    ------
    IndexError, TypeError, ValueError
        As `cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.nll_loss(np.log([[0.25, 0.75]]), [0])
    np.float64(1.3862943611198906)
    """
    problem, of_rows = _nll_problem(log_probs, targets, weight, ignore_index, reduction, axis)
    found = points(problem.logits, np.maximum(of_rows.targets, 0)[:, None])[:, 0].astype(np.float64)
    with np.errstate(invalid="ignore"):
        losses = np.where(of_rows.row_weight > 0.0, -of_rows.row_weight * found, 0.0)
    return reduce(losses, reduction, of_rows.divisor, problem.loss_dtype, problem.shape)


def nll_loss_grad(
    log_probs: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    axis: int = -1,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
) -> NDArray:
    r"""The gradient of `nll_loss` with respect to the log-probabilities: :math:`-g w_t` at the target, 0 elsewhere.

    g is the upstream gradient of the row's loss; a mean's is divided by the sum of the counted rows' weights.

    Parameters
    ----------
    log_probs, targets, weight, ignore_index, reduction, axis
        As for `nll_loss`.
    grad_output : float, or array of shape (...) for reduction "none"
        The upstream gradient of the returned loss.
    out : ndarray, optional
        Where the gradient goes: of the shape of ``log_probs``, their dtype or float32 or float64; ``log_probs`` itself
        in place.

    Returns
    -------
    ndarray of the shape and dtype of ``log_probs``, float32 for float8
        ``out`` if it was given.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `nll_loss`, and for a bad ``grad_output`` or ``out``; always before anything is written.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.nll_loss_grad(np.log([[0.25, 0.75]]), [0])
    array([[-1.,  0.]])
    """
    problem, of_rows = _nll_problem(log_probs, targets, weight, ignore_index, reduction, axis)
    grad_output = checks.read_grad_output(grad_output, reduction, problem.shape).reshape(-1)
    gradient = checks.read_out(out, checks.read_array(log_probs))
    gradient[...] = 0
    hit = np.broadcast_to(of_rows.coefficients(grad_output).hit, len(of_rows.targets))
    rows, counts = as_rows(classes_last(gradient, axis)), of_rows.targets >= 0
    with np.errstate(over="ignore"):
        put(rows, np.maximum(of_rows.targets, 0)[:, None], -hit[:, None], counts[:, None])
    return gradient


def _nll_problem(log_probs, targets, weight, ignore_index, reduction, axis):
    if isinstance(targets, tuple):
        raise TypeError("targets must be integer class indices, not a tuple")
    if np.asarray(targets).dtype.kind not in "iu":
        raise TypeError(f"targets must be integer class indices, not {np.asarray(targets).dtype}")
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "axis": axis}
    problem = arguments.normalise(log_probs, targets, options)
    return problem, terms.of(problem)
