"""Cross entropy and its gradient: documentation and short bodies."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, reduction, rowmath

Loss = np.floating | NDArray[np.floating]


def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    denominator: float | None = None,
    backend: str | None = None,
) -> Loss:
    r"""Cross entropy of class indices under logits, in nats.

    For a row z of logits with target t, weights w and smoothing e over V classes:

    .. math:: (1 - e) w_t (\mathrm{lse}(z) - z_t) + \frac{e}{V} \sum_k w_k (\mathrm{lse}(z) - z_k)

    Confident rows keep their digits: ``lse - z_t`` is never a subtraction but the log1p of the other classes' sum.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V)
        Unnormalised log-probabilities. Never changed.
    targets : array_like of integers, shape (...)
        Class indices in [0, V), or ``ignore_index``.
    weight : array_like, shape (V,), optional
        A non-negative weight for each class.
    ignore_index : int or None
        A target with this value counts for nothing and its row is not read; None switches it off.
    label_smoothing : float
        In [0, 1]: the share of the target spread evenly over all classes.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum by the sum of the counted rows' weights, as torch does.
    denominator : float, optional
        With "mean", what to divide by instead: gradient accumulation, or 1 for a batch that may be empty.
    backend : str, optional
        A name from `fastxent.backends`; by default FASTXENT_BACKEND, else the fastest.

    Returns
    -------
    loss : NumPy scalar, or ndarray of shape (...) for "none"
        float64 for float64 logits, float32 for all others: never rounded to half.

    Raises
    ------
    IndexError
        If a target is out of range; the message counts them and shows the first.
    TypeError, ValueError
        If an argument has the wrong dtype, shape or value.
    BackendUnavailableError
        If the backend cannot run here.

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
        reduction=reduction,
        denominator=denominator,
    )
    problem = arguments.normalise(logits, targets, options)
    terms = _Terms(problem)
    statistics = backends.choose(backend).statistics(problem.logits, problem.targets, terms.smoothing_weight)
    return terms.loss(statistics)


def cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Loss, NDArray]:
    r"""Cross entropy and its gradient with respect to the logits, in one pass over them.

    The gradient of a row whose loss has the upstream gradient g is

    .. math:: g [(1 - e) w_t + \tfrac{e}{V} \sum_j w_j] p_k - g \tfrac{e}{V} w_k - g (1 - e) w_t [k = t]

    with :math:`p_t - 1` taken from the other classes' sum, so a confident row's gradient is as small as it is and
    never 0 for want of digits.

    Parameters
    ----------
    logits, targets, backend, **options
        As for `cross_entropy`.
    grad_output : float, or array of shape (...) for reduction "none"
        The upstream gradient of the returned loss; it scales before the result is rounded.
    out : ndarray, optional
        Where the gradient goes: of the logits' shape, their dtype or float32 or float64, C-contiguous; ``logits``
        itself for a gradient in place. A mean over many rows is small: float16 may round it to 0, float32 does not.

    Returns
    -------
    loss : as `cross_entropy`
    dlogits : ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given; rounded once to its dtype.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As `cross_entropy`, and for a bad ``grad_output`` or ``out``; always before anything is written.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy_with_grad(np.float32([[20, 0]]), [0])
    (np.float32(2.0611537e-09), array([[-2.0611537e-09,  2.0611537e-09]], dtype=float32))
    """
    logits = arguments.read_logits(logits)
    problem = arguments.normalise(logits, targets, options)
    grad_output = arguments.read_grad_output(grad_output, problem)
    dlogits = arguments.read_out(out, logits)
    terms = _Terms(problem)
    statistics = backends.choose(backend).statistics_and_gradient(
        problem.logits,
        problem.targets,
        terms.coefficients(grad_output),
        arguments.as_rows(dlogits),
        terms.smoothing_weight,
    )
    return terms.loss(statistics), dlogits


def cross_entropy_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> NDArray:
    """The gradient of `cross_entropy` with respect to the logits; see `cross_entropy_with_grad`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.cross_entropy_grad(np.float32([[0, 0]]), [1])
    array([[ 0.5, -0.5]], dtype=float32)
    """
    return cross_entropy_with_grad(logits, targets, grad_output=grad_output, out=out, backend=backend, **options)[1]


class _Terms:
    """The O(N) part of a problem: row weights, the divisor, and with them the losses and the coefficients."""

    def __init__(self, problem):
        options, self._problem = problem.options, problem
        self._classes = problem.logits.shape[1]
        self._target_weight = np.asarray(problem.counted, np.float64)
        if options.weight is not None:
            self._target_weight = self._target_weight * options.weight[np.maximum(problem.targets, 0)]
        self._divisor = reduction.divisor(
            self._target_weight, len(problem.targets), options.reduction, options.denominator
        )
        self.smoothing_weight = None
        if options.label_smoothing > 0.0:
            self.smoothing_weight = np.ones(self._classes) if options.weight is None else options.weight

    def loss(self, statistics):
        options = self._problem.options
        losses = rowmath.loss(
            statistics.nll, statistics.gap, self._target_weight, options.label_smoothing, self._classes
        )
        return reduction.reduce(losses, options.reduction, self._divisor, self._problem.loss_dtype, self._problem.shape)

    def coefficients(self, grad_output):
        """hit, smooth and extra of each row, (N, 3) float64."""
        with np.errstate(divide="ignore", invalid="ignore"):
            g = np.where(self._problem.counted, grad_output / self._divisor, 0.0)
        coefficients = np.empty((len(self._problem.targets), 3))
        smoothing = self._problem.options.label_smoothing
        parts = rowmath.coefficients(g, self._target_weight, smoothing, self._classes)
        for column, part in zip(coefficients.T, parts, strict=True):
            column[:] = part
        return coefficients
