"""Formulas of whole distributions in plain NumPy, classes along the last axis, float64: each once.

`information` applies them to probabilities, `divergences`, `softmax` and `curvature` to what the kernels make of
logits. Conventions: 0 log 0 = 0; a class that q rules out and p does not makes a divergence infinite.
"""

import numpy as np


def times(mass, value):
    """mass * value, 0 where the mass is 0 whatever the value."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(mass == 0.0, 0.0, mass * value)


def log(p):
    """log p, -inf at 0."""
    with np.errstate(divide="ignore"):
        return np.log(p)


def log1m(p):
    """log(1 - p), -inf at 1."""
    with np.errstate(divide="ignore"):
        return np.log1p(-p)


def total(terms):
    """The sum over classes."""
    return terms.sum(axis=-1, keepdims=True)


def entropy(p, log_p):
    """- sum p log p: no term is negative."""
    return total(times(p, -log_p))


def entropy_gradient(p, log_p):
    """With respect to the logits: -p (log p + H)."""
    return -times(p, log_p + entropy(p, log_p))


def kl_divergence(p, log_p, q, log_q):
    """sum p log(p / q) = sum (q - p - p d) with d = log(q / p), of which no term is negative; p and q sum to 1."""
    with np.errstate(invalid="ignore", over="ignore"):
        d = log_q - log_p
        near = np.abs(d) < 1.0
        small = np.expm1(np.where(near, d, 0.0)) - np.where(near, d, 0.0)
        terms = np.where(near, p * small, (q - p) - times(p, d))
    return total(np.where(p == 0.0, q, terms)).clip(min=0.0)


def kl_gradient(p, log_p, log_q, divergence):
    """With respect to the logits of p: p (log(p / q) - KL)."""
    with np.errstate(invalid="ignore"):
        return times(p, (log_p - log_q) - divergence)


def log_halves(log_p, log_q):
    """log(p / m) with m = (p + q) / 2: -log((1 + q / p) / 2), log 2 where q is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        d = log_q - log_p
        return np.where(d > 0.0, -d - np.log1p(np.expm1(-d) / 2), -np.log1p(np.expm1(d) / 2))


def js_divergence(p, log_p, q, log_q):
    """Half of KL(p || m) + KL(q || m) with m = (p + q) / 2: at most log 2."""
    terms = times(p, log_halves(log_p, log_q)) + times(q, log_halves(log_q, log_p))
    return 0.5 * total(terms).clip(min=0.0)


def js_gradient(p, log_p, log_q):
    """With respect to the logits of p: half of p (log(p / m) - sum p log(p / m))."""
    halves = np.where(p == 0.0, 0.0, log_halves(log_p, log_q))
    return 0.5 * times(p, halves - total(times(p, halves)))


def centred(p, v):
    """p (v - sum p v), v taken from its value at the largest p, so that the rest cancels nothing there."""
    u = v - np.take_along_axis(v, p.argmax(axis=-1, keepdims=True), axis=-1)
    return times(p, u - total(times(p, u)))


def complement(p):
    """1 - p, at the largest p the sum of the others."""
    largest = p.argmax(axis=-1, keepdims=True)
    others = p.copy()
    np.put_along_axis(others, largest, 0.0, axis=-1)
    result = 1.0 - p
    np.put_along_axis(result, largest, total(others), axis=-1)
    return result


def softcap_bend(x, softcap):
    """The second over the first derivative of softcap tanh(x / softcap)."""
    return -2.0 / softcap * np.tanh(x / softcap)


def softcapped(x, softcap):
    """softcap tanh(x / softcap) and its derivative 4 q / (1 + q)^2 with q = exp(-2 |x / softcap|)."""
    q = np.exp(-2.0 * np.abs(x / softcap))
    return softcap * np.tanh(x / softcap), 4.0 * q / (1.0 + q) ** 2
