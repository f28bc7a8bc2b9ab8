"""The formula as a person writes it who thinks of nothing else: in NumPy, and as a loop under Numba."""

import functools
import math

import numpy as np


def numpy_cross_entropy(logits, targets):
    """Per-row losses in plain NumPy the way scipy.special.log_softmax goes about it, in the logits' dtype."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(logits)), targets]


def numpy_cross_entropy_with_grad(logits, targets):
    """The sum of the losses and its gradient in plain NumPy."""
    each = np.arange(len(logits))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        loss = -np.log(p[each, targets]).sum()
    p[each, targets] -= 1
    return loss, p


@functools.cache
def numba_loops():
    """Two loops with rows in parallel: the losses into an array, and with the gradient into another."""
    import numba

    @numba.njit(parallel=True)
    def loss(logits, targets, losses):
        for i in numba.prange(logits.shape[0]):
            peak = logits[i, 0]
            for j in range(logits.shape[1]):
                peak = max(peak, logits[i, j])
            total = logits[i, 0] * 0
            for j in range(logits.shape[1]):
                total += math.exp(logits[i, j] - peak)
            losses[i] = math.log(total) - (logits[i, targets[i]] - peak)

    @numba.njit(parallel=True)
    def loss_and_gradient(logits, targets, losses, dlogits):
        for i in numba.prange(logits.shape[0]):
            peak = logits[i, 0]
            for j in range(logits.shape[1]):
                peak = max(peak, logits[i, j])
            total = logits[i, 0] * 0
            for j in range(logits.shape[1]):
                dlogits[i, j] = math.exp(logits[i, j] - peak)
                total += dlogits[i, j]
            for j in range(logits.shape[1]):
                dlogits[i, j] /= total
            losses[i] = math.log(total) - (logits[i, targets[i]] - peak)
            dlogits[i, targets[i]] -= 1

    return loss, loss_and_gradient
