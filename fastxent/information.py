"""Information and entropy of probabilities, for those who learn or teach: arrays of any shape, classes along ``axis``.

Everything is in units of log ``base``: e for nats (the default), 2 for bits, 10 for hartleys. Conventions: 0 log 0 = 0,
and p > 0 where q = 0 gives inf. For logits, use the top-level functions: they keep digits that probabilities no longer
have.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import checks, probmath

__all__ = [
    "cross_entropy",
    "cross_entropy_grad",
    "entropy",
    "js_divergence",
    "kl_divergence",
    "log_loss",
    "log_loss_grad",
    "self_information",
]

Result = np.floating | NDArray[np.floating]


def self_information(p: ArrayLike, *, base: float = math.e) -> Result:
    """The information of an event of probability ``p``: -log p.

    Parameters
    ----------
    p : array_like of float, in [0, 1]
    base : float
        Of the logarithm: e for nats, 2 for bits, 10 for hartleys.

    Returns
    -------
    ndarray of float64 of the shape of ``p``, or a NumPy scalar; inf where p = 0

    Raises
    ------
    TypeError, ValueError
        If an argument is no number, or out of range.

    Examples
    --------
    >>> from fastxent import information
    >>> information.self_information(0.5, base=2)
    np.float64(1.0)
    """
    return (0.0 - probmath.log(checks.read_probabilities("p", p)) / _log_of(base))[()]


def entropy(p: ArrayLike, *, axis: int = -1, base: float = math.e) -> Result:
    r"""The entropy of distributions, :math:`H(p) = -\sum_k p_k \log p_k`.

    Parameters
    ----------
    p : array_like of float, in [0, 1], summing to 1 along ``axis``
    axis : int
        Where the classes are.
    base : float
        As for `self_information`.

    Returns
    -------
    ndarray of float64 of the shape of ``p`` without ``axis``, or a NumPy scalar

    Raises
    ------
    TypeError, ValueError
        If ``p`` holds no probabilities, a distribution does not sum to 1 within 1e-6, or ``axis`` or ``base`` is wrong.

    Examples
    --------
    A fair coin has one bit, sixteen of them sixteen, a foregone match nearly none:

    >>> from fastxent import information
    >>> information.entropy([0.5, 0.5], base=2)
    np.float64(1.0)
    >>> information.entropy([1 / 2**16] * 2**16, base=2)
    np.float64(16.0)
    >>> round(information.entropy([0.99, 0.01], base=2), 4)
    np.float64(0.0808)
    """
    found = checks.read_distributions("p", p, axis)
    return _out(probmath.entropy(found, probmath.log(found)), base)


def cross_entropy(p: ArrayLike, q: ArrayLike, *, axis: int = -1, base: float = math.e) -> Result:
    r"""The cross entropy of ``q`` under ``p``, :math:`H(p, q) = -\sum_k p_k \log q_k = H(p) + \mathrm{KL}(p \| q)`.

    Parameters
    ----------
    p, q : array_like of float, in [0, 1], summing to 1 along ``axis``
        They broadcast.
    axis, base
        As for `entropy`.

    Returns
    -------
    ndarray of float64 of the shape to which ``p`` and ``q`` broadcast, without ``axis``, or a NumPy scalar
        inf where q rules out a class that p does not.

    Raises
    ------
    TypeError, ValueError
        As for `entropy`, and if p and q do not broadcast.

    Examples
    --------
    >>> from fastxent import information
    >>> information.cross_entropy([0.5, 0.5], [0.25, 0.75], base=2).round(6)
    np.float64(1.207519)
    """
    a, b = checks.read_two_distributions(p, q, axis)
    return _out(probmath.total(probmath.times(a, -probmath.log(b))), base)


def kl_divergence(p: ArrayLike, q: ArrayLike, *, axis: int = -1, base: float = math.e) -> Result:
    r"""The Kullback-Leibler divergence :math:`\sum_k p_k \log(p_k / q_k)`: what coding p as q costs; never negative.

    Parameters
    ----------
    p, q, axis, base
        As for `cross_entropy`.

    Returns
    -------
    ndarray of float64 of the shape to which ``p`` and ``q`` broadcast, without ``axis``, or a NumPy scalar
        inf where q rules out a class that p does not.

    Raises
    ------
    TypeError, ValueError
        As for `cross_entropy`.

    Examples
    --------
    >>> from fastxent import information
    >>> information.kl_divergence([0.5, 0.5], [0.25, 0.75], base=2).round(6)
    np.float64(0.207519)
    """
    a, b = checks.read_two_distributions(p, q, axis)
    return _out(probmath.kl_divergence(a, probmath.log(a), b, probmath.log(b)), base)


def js_divergence(p: ArrayLike, q: ArrayLike, *, axis: int = -1, base: float = math.e) -> Result:
    r"""The Jensen-Shannon divergence: half of KL(p || m) + KL(q || m) with m = (p + q) / 2; at most one bit.

    Parameters
    ----------
    p, q, axis, base
        As for `cross_entropy`.

    Returns
    -------
    ndarray of float64 of the shape to which ``p`` and ``q`` broadcast, without ``axis``, or a NumPy scalar

    Raises
    ------
    TypeError, ValueError
        As for `cross_entropy`.

    Examples
    --------
    >>> from fastxent import information
    >>> information.js_divergence([1, 0], [0, 1], base=2)
    np.float64(1.0)
    """
    a, b = checks.read_two_distributions(p, q, axis)
    return _out(probmath.js_divergence(a, probmath.log(a), b, probmath.log(b)), base)


def log_loss(y: ArrayLike, p: ArrayLike, *, clip: float | None = None, base: float = math.e) -> Result:
    r"""The log loss of outcomes ``y`` under probabilities ``p`` of 1, :math:`-(y \log p + (1 - y) \log(1 - p))`, each.

    Its sum over several outcomes that do not exclude each other is the multi-label loss of an example.

    Parameters
    ----------
    y : array_like of float, in [0, 1]
        0 and 1, or how much of the outcome is 1.
    p : array_like of float, in [0, 1]
        Broadcasts with ``y``.
    clip : float, optional
        Take p within [clip, 1 - clip]. Off by default, because it bounds the loss by -log(clip): a forecast that was
        certain and wrong then costs the same as one that was nearly so, and its gradient there is 0.
    base : float
        As for `self_information`.

    Returns
    -------
    ndarray of float64, or a NumPy scalar
        inf where p rules out what happened.

    Raises
    ------
    TypeError, ValueError
        If an argument is no number or out of range, or y and p do not broadcast.

    Examples
    --------
    >>> from fastxent import information
    >>> information.log_loss([1, 0], [0.5, 0.75], base=2)
    array([1., 2.])

    Doors that hold a gift with probability 0.8, 0.7 and 0.1, of which the first two did:

    >>> round(information.log_loss([1, 1, 0], [0.8, 0.7, 0.1]).sum(), 4)
    np.float64(0.6852)
    """
    one, forecast, _ = _outcomes(y, p, clip)
    loss = probmath.times(one, -probmath.log(forecast)) + probmath.times(1.0 - one, -probmath.log1m(forecast))
    return (loss / _log_of(base))[()]


def log_loss_grad(y: ArrayLike, p: ArrayLike, *, clip: float | None = None, base: float = math.e) -> Result:
    r"""The derivative of `log_loss` by ``p``: :math:`-y / p + (1 - y) / (1 - p)`, 0 where ``clip`` holds p back.

    In units of log ``base``, as the loss: divided by log(base).

    Parameters
    ----------
    y, p, clip, base
        As for `log_loss`.

    Returns
    -------
    ndarray of float64, or a NumPy scalar
        -inf or inf where p rules out what happened.

    Raises
    ------
    TypeError, ValueError
        As for `log_loss`.

    Examples
    --------
    >>> from fastxent import information
    >>> information.log_loss_grad([1, 0], [0.5, 0.75])
    array([-2.,  4.])
    """
    one, forecast, held = _outcomes(y, p, clip)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wrong, right = (1.0 - one) / (1.0 - forecast), one / forecast
        gradient = np.where(one == 1.0, 0.0, wrong) - np.where(one == 0.0, 0.0, right)
    return (np.where(held, 0.0, gradient) / _log_of(base))[()]


def cross_entropy_grad(p: ArrayLike, q: ArrayLike, *, base: float = math.e) -> Result:
    r"""The derivative of `cross_entropy` by the entries of ``q``: :math:`-p_k / q_k`, 0 where p is 0.

    In units of log ``base``, as the cross entropy: divided by log(base).

    Parameters
    ----------
    p, q : array_like of float, in [0, 1]
        They broadcast; sums are not looked at.
    base : float
        As for `self_information`.

    Returns
    -------
    ndarray of float64 of the shape to which ``p`` and ``q`` broadcast, or a NumPy scalar
        -inf where q is 0 and p is not.

    Raises
    ------
    TypeError, ValueError
        If an argument is no number or out of range, or p and q do not broadcast.

    Examples
    --------
    >>> from fastxent import information
    >>> information.cross_entropy_grad([0.5, 0.5], [0.25, 0.75])
    array([-2.        , -0.66666667])
    """
    a, b = checks.read_probabilities("p", p), checks.read_probabilities("q", q)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (-np.where(a == 0.0, 0.0, a / b) / _log_of(base))[()]


def _outcomes(y, p, clip):
    y, p = checks.read_probabilities("y", y), checks.read_probabilities("p", p)
    if clip is None:
        return y, p, False
    clip = checks.read_clip(clip)
    return y, np.clip(p, clip, 1.0 - clip), (p < clip) | (p > 1.0 - clip)


def _log_of(base):
    return math.log(checks.read_base(base))


def _out(value, base):
    """(..., 1) nats -> (...) in units of log ``base``."""
    return (value[..., 0] / _log_of(base))[()]
