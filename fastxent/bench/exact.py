"""Losses and gradients of whole rows in long double, to judge results of float64 and less."""

import numpy as np


def losses_and_gradient(logits, targets):
    """lse - target logit of each row (N,), and softmax minus one-hot (N, V); nothing cancels."""
    losses = np.empty(len(logits), np.longdouble)
    gradient = np.empty(logits.shape, np.longdouble)
    for i, target in enumerate(targets):
        z = logits[i].astype(np.longdouble) - np.longdouble(logits[i, target])
        others = np.delete(z, target)
        peak = others.max(initial=-np.inf)
        high = max(peak, 0)
        rest = np.exp(others - high).sum()
        losses[i] = high + np.log(rest + np.exp(-high)) if high > 0 else np.log1p(rest)
        gradient[i] = np.exp(z - losses[i])
        gradient[i, target] = np.expm1(-losses[i])
    return losses, gradient


def worst_ulps(got, want):
    """The largest error of normal numbers among ``want``, in units of their last place in the dtype of ``got``."""
    limits = _limits(got.dtype)
    size = np.abs(want)
    normal = size >= limits.tiny
    exponent = np.floor(np.log2(np.where(normal, size, 1)))
    error = np.abs(got.astype(np.longdouble) - want) / np.exp2(exponent - limits.nmant)
    return float(np.max(error, where=normal, initial=0.0))


def _limits(dtype):
    import ml_dtypes

    return ml_dtypes.finfo(dtype)
