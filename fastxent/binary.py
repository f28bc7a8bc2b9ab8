"""Binary cross entropy of independent outcomes: documentation and short bodies."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, checks, reduction

_CHUNK = 1 << 18  # elements handed to a kernel at a time, gathered where an array is not laid out as one


def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> np.floating | NDArray[np.floating]:
    r"""Binary cross entropy of targets under logits x of their probability, in nats.

    .. math:: w\,[p_w\, y \log(1 + e^{-x}) + (1 - y) \log(1 + e^{x})], \quad y = (1 - e)\, target + e / 2

    Both logarithms keep their digits however small they are: a target of 0 at logit -20 has loss 2.06e-9, not 0.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, any shape
    targets : array_like of real numbers in [0, 1], of the logits' shape
    weight : array_like, broadcast to the logits' shape, optional
        A non-negative weight for each element.
    pos_weight : array_like, broadcast to the logits' shape, optional
        A non-negative weight of the positive part: for each class where classes are the last axis.
    label_smoothing : float
        In [0, 1]: targets are drawn towards 1/2 by as much.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of elements, as torch does.
    backend : str, optional
        As for `fastxent.cross_entropy`.

    Returns
    -------
    loss : NumPy scalar, or ndarray of the logits' shape for "none"
        float64 for float64 logits, float32 for all others.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong dtype, shape or value.
    BackendUnavailableError
        If the backend cannot run here.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.binary_cross_entropy_with_logits(np.float32([20, -20]), [1, 0])
    np.float32(2.0611537e-09)
    """
    options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": label_smoothing, "reduction": reduction}
    return _run(arguments.read_binary(logits, targets, **options), None, None, backend)


def binary_cross_entropy_with_logits_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[np.floating | NDArray[np.floating], NDArray]:
    r"""`binary_cross_entropy_with_logits` and its gradient with respect to the logits, in one pass over them.

    .. math:: g\, w\,[(1 - y)\, \sigma(x) - p_w\, y\, \sigma(-x)]

    Parameters
    ----------
    logits, targets, backend, **options
        As for `binary_cross_entropy_with_logits`.
    grad_output : float, or array of the logits' shape for reduction "none"
        The upstream gradient of the loss.
    out : ndarray, optional
        Where the gradient goes: of the logits' shape, their dtype or float32 or float64; ``logits`` itself in place.

    Returns
    -------
    loss : as `binary_cross_entropy_with_logits`
    dlogits : ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As `binary_cross_entropy_with_logits`, and for a bad ``grad_output`` or ``out``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.binary_cross_entropy_with_logits_with_grad(np.float32([0, 0]), [1, 0])
    (np.float32(0.6931472), array([-0.25,  0.25], dtype=float32))
    """
    problem = arguments.read_binary(logits, targets, **options)
    grad_output = checks.read_grad_output(grad_output, problem.reduction, problem.logits.shape)
    dlogits = checks.read_out(out, problem.logits)
    return _run(problem, grad_output, dlogits, backend), dlogits


def binary_cross_entropy_with_logits_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> NDArray:
    r"""The gradient of `binary_cross_entropy_with_logits` with respect to the logits.

    .. math:: g\, w\,[(1 - y)\, \sigma(x) - p_w\, y\, \sigma(-x)]

    Parameters
    ----------
    logits, targets, grad_output, out, backend, **options
        As for `binary_cross_entropy_with_logits_with_grad`.

    Returns
    -------
    dlogits : ndarray of the logits' shape and dtype, float32 for float8
        ``out`` if it was given.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As `binary_cross_entropy_with_logits_with_grad`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> fastxent.binary_cross_entropy_with_logits_grad(np.float32([0, 0]), [1, 0])
    array([-0.25,  0.25], dtype=float32)
    """
    options |= {"grad_output": grad_output, "out": out, "backend": backend}
    return binary_cross_entropy_with_logits_with_grad(logits, targets, **options)[1]


def _run(problem, grad_output, dlogits, backend):
    """The loss, and the gradient into ``dlogits`` unless that is None; chunk by chunk, whatever the layouts."""
    real, verbs = problem.loss_dtype, backends.choose(backend)
    divided_by = np.float64(problem.logits.size) if problem.reduction == "mean" else np.float64(1.0)
    losses = np.empty(problem.logits.shape, real) if problem.reduction == "none" else None
    with np.errstate(divide="ignore", invalid="ignore"):
        upstream = np.zeros(()) if grad_output is None else grad_output / divided_by
    weights = {"weight": problem.weight, "pos_weight": problem.pos_weight, "upstream": upstream}
    # what is one number for all elements stays one
    fixed = {name: values.astype(np.float64).reshape(1) for name, values in weights.items() if values.ndim == 0}
    fixed |= {"losses": np.empty(_CHUNK), "gradient": np.empty(0, real)}
    read = {"logits": problem.logits, "targets": problem.targets}
    read |= {name: values for name, values in weights.items() if name not in fixed}
    written = {name: array for name, array in (("losses", losses), ("gradient", dlogits)) if array is not None}
    total = reduction.Total()
    with _chunks(read, written, real) as chunks:
        for chunk in chunks if problem.logits.size else ():
            arrays = fixed | dict(zip((*read, *written), chunk, strict=True))
            arrays["losses"] = arrays["losses"][: len(arrays["logits"])]
            verbs.binary(label_smoothing=problem.label_smoothing, **arrays)
            if losses is None:
                total.add(arrays["losses"])
    if losses is not None:
        return losses[()]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return real.type(total.value() / divided_by)


def _chunks(read, written, real):
    """An iterator over contiguous chunks of arrays that broadcast, logits and their like as ``real``."""
    operands: list[Any] = [*read.values(), *written.values()]
    kinds = ["readonly"] * len(read) + ["writeonly"] * len(written)
    flags: list[Any] = [[kind, "contig", "overlap_assume_elementwise"] for kind in kinds]
    dtypes = [real if name in ("logits", "targets", "gradient") else np.float64 for name in (*read, *written)]
    how: list[Any] = ["external_loop", "buffered", "zerosize_ok", "copy_if_overlap"]
    return np.nditer(operands, how, flags, dtypes, "C", "unsafe", buffersize=_CHUNK)
