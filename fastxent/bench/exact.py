"""Losses and gradients of whole rows in long double, to judge results of float64 and less."""

import functools

import numpy as np

_CHECKED = 64
SOFTCAP = 1e-5  # what a softcap adds to both promises: tanh and its slope at a rounded argument


@functools.cache
def some_rows(count):
    """Which of so many rows are judged, in order: 64 at most, the same ones every time, the last among them."""
    chosen = np.random.default_rng(count).choice(count - 1, min(count, _CHECKED) - 1, replace=False)
    return np.append(np.sort(chosen), count - 1)


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


def promised(dtype):
    """What ours may be off by, of a loss, and of a gradient's entry in units of its row's largest before it is rounded,
    where logits have this dtype: all but float64 are computed in float32.
    """
    return (1e-12, 1e-12) if np.dtype(dtype) == np.float64 else (5e-7, 1e-6)


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


def loss_and_gradient(got, wanted, dtype, name="gradient", scale=None, more=0.0):
    """The figures of a check: each name, what was got, what is wanted, what is promised and ``more``, of what."""
    (loss, gradient), (want, exactly) = got, wanted
    of_loss, of_gradient = promised(dtype)
    yield "loss", loss, want, of_loss + more
    yield name, gradient, exactly, of_gradient + more, scale
