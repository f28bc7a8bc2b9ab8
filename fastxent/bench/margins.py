"""Confident rows: how wrong a candidate is where the target stands ever farther above the rest."""

import numpy as np

from fastxent.bench import exact
from fastxent.bench.record import Confident

MARGINS = tuple(float(margin) for margin in range(0, 61, 2))
_CLASSES = 1000


def build(dtype):
    """``logits, targets``: a row for each of `MARGINS`, whose target is so much above the largest other logit."""
    rng = np.random.default_rng(len(MARGINS))
    logits, targets = rng.standard_normal((len(MARGINS), _CLASSES)), rng.integers(0, _CLASSES, len(MARGINS))
    each = np.arange(len(MARGINS))
    logits[each, targets] = -np.inf
    logits[each, targets] = logits.max(axis=1) + MARGINS
    return logits.astype(dtype), targets


def measure(operation, dtype, candidate, setup, with_gradient):
    """`Confident` of a candidate: relative errors of the losses, or of the gradients' entries at the targets.

    What is no number has no digit right, like an error of 1.
    """
    logits, targets = build(dtype)
    each = np.arange(len(targets))
    losses, gradient = exact.losses_and_gradient(logits, targets)
    want = gradient[each, targets] if with_gradient else losses
    got = np.asarray(setup(logits, targets)()).astype(np.longdouble)
    got = got[each, targets] if with_gradient else got
    with np.errstate(invalid="ignore"):
        errors = np.abs(got - want) / np.abs(want)
    return Confident(
        operation, dtype, candidate, MARGINS, tuple(np.where(np.isfinite(errors), errors, 1.0).astype(float).tolist())
    )
