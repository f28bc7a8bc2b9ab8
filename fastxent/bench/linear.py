"""The fused linear loss: problems, candidates and limits, for `fastxent.bench.compare`.

A loss candidate returns per-row losses (N,); a gradient candidate some rows, the last among them, of the gradients of
the hidden states and of the output matrix, one after the other, of the sum of the losses.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np

import fastxent
from fastxent.bench import exact
from fastxent.bench.naive import numpy_cross_entropy, numpy_cross_entropy_with_grad


def build(shape, dtype="float32"):
    """``hidden, weight, targets`` of (rows, width, classes), the same ones every time; the logits have variance 16."""
    rng, (rows, width, classes) = np.random.default_rng(shape), shape
    hidden = rng.standard_normal((rows, width), dtype=np.float32)
    weight = rng.standard_normal((classes, width), dtype=np.float32)
    weight *= np.float32(4 / np.sqrt(width))
    return hidden.astype(dtype), weight.astype(dtype), rng.integers(0, classes, rows)


def expected(hidden, weight, targets):
    """Losses, and some rows of both gradients, of products in float64."""
    losses, dhidden, dweight, _ = fastxent.linear_cross_entropy_with_grad(
        hidden, weight, targets, reduction="none", backend="reference",
        out=(np.empty(hidden.shape), np.empty(weight.shape), None),
    )  # fmt: skip
    return losses, some(dhidden, dweight)


def limits(hidden, weight):
    """What a loss, and a loss with its gradients, cannot beat: their products into arrays that are there."""
    logits = np.zeros((len(hidden), len(weight)), hidden.dtype)
    dhidden, dweight = np.zeros_like(hidden), np.zeros_like(weight)

    def product():
        np.matmul(hidden, weight.T, out=logits)

    def products():
        product()
        np.matmul(logits, weight, out=dhidden)
        np.matmul(logits.T, hidden, out=dweight)

    return product, products


def some(*gradients):
    """The rows of gradients that are judged."""
    return np.concatenate([gradient[exact.some_rows(len(gradient))] for gradient in gradients])


def _ours(hidden, weight, targets):
    return lambda: fastxent.linear_cross_entropy(hidden, weight, targets, reduction="none")


def _ours_with_grad(hidden, weight, targets):
    out = np.zeros_like(hidden), np.zeros_like(weight), None
    return lambda: some(
        *fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, reduction="sum", out=out)[1:3]
    )


def _in_torch(chunked):
    """torch's loss of hidden states, matrix, targets and a reduction; chunked or by way of all logits."""
    import torch

    functional = torch.nn.functional
    if not chunked:
        return lambda x, w, t, reduction: functional.cross_entropy(functional.linear(x, w), t, reduction=reduction)
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, t, reduction: functional.linear_cross_entropy(x, w, t, reduction=reduction, options=options)


def _torch(hidden, weight, targets, chunked=False):
    import torch

    loss, tensors = _in_torch(chunked), [torch.from_numpy(array) for array in (hidden, weight, targets)]

    def run():
        with torch.no_grad(), _loudly():
            return loss(*tensors, "none").numpy()

    return run


def _torch_with_grad(hidden, weight, targets, chunked=False):
    import torch

    loss, t = _in_torch(chunked), torch.from_numpy(targets)
    x, w = (torch.from_numpy(array).requires_grad_(True) for array in (hidden, weight))

    def run():
        with _loudly():
            return some(*(gradient.numpy() for gradient in torch.autograd.grad(loss(x, w, t, "sum"), (x, w))))

    return run


@contextlib.contextmanager
def _loudly():
    """Warnings are errors: torch says by one that it does not chunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _numpy(hidden, weight, targets):
    return lambda: numpy_cross_entropy(hidden @ weight.T, targets)


def _numpy_with_grad(hidden, weight, targets):
    def run():
        _, dlogits = numpy_cross_entropy_with_grad(hidden @ weight.T, targets)
        return some(dlogits @ weight, dlogits.T @ hidden)

    return run


LOSS: dict[str, Callable] = {
    "fastxent": _ours,
    "torch": _torch,
    "torch chunked": partial(_torch, chunked=True),
    "numpy": _numpy,
}
LOSS_AND_GRADIENTS: dict[str, Callable] = {
    "fastxent": _ours_with_grad,
    "torch": _torch_with_grad,
    "torch chunked": partial(_torch_with_grad, chunked=True),
    "numpy": _numpy_with_grad,
}
