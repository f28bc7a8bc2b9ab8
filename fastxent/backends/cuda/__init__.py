"""The CUDA backend: the verbs every backend has, over rows on their way through a GPU.

Arrays of the host go through page-locked memory in blocks of rows, copied while other blocks are computed. It is never
chosen for them by itself. Logits, and what is written, may be arrays of a device instead, and stay there; targets and
statistics are the host's, and a verb waits for the device. With FASTXENT_CUDA_SIMULATED=1 in the environment the GPU
is one in NumPy: very slow, for tests.
"""

import numpy as np

from fastxent.backends.cuda.run import is_simulated, runner, scaling_of, strips_of
from fastxent.state import LARGEST, Coefficients, LseState, RowScores, Statistics, in_block

_NOUGHT = np.zeros(1)


def why_unavailable():
    """Why no GPU can be used here, in a sentence; None when one can."""
    if is_simulated():
        return None
    from fastxent.backends.cuda import machine

    return machine.why_unavailable()


def describe():
    """What a person may want to know of this backend, by name."""
    reason = why_unavailable()
    if reason is not None:
        return {}
    machine = runner().machine
    return {"GPU": f"{machine.name}, compute capability {machine.architecture[0]}.{machine.architecture[1]}"}


def statistics(logits, targets, *, spread=None, softcap=None, temperature=1.0, wanted=()):
    """See `fastxent.backends.reference.statistics`."""
    logits = runner().taken(logits)
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    runner().statistics(logits, targets, spread, scaling_of(logits.dtype, softcap, temperature), result)
    return result


def statistics_and_gradient(
    logits, targets, coefficients, out, *, spread=None, softcap=None, temperature=1.0, wanted=()
):
    """See `fastxent.backends.reference.statistics_and_gradient`."""
    logits = runner().taken(logits)
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    scaling, written = scaling_of(logits.dtype, softcap, temperature), runner().taken(out)
    runner().entries(logits, targets, coefficients, spread, scaling, result, written, "gradient")
    return result


def accumulate(logits, targets, *, spread=None, vocab_start=0, state=None, softcap=None, temperature=1.0):
    """See `fastxent.backends.reference.accumulate`."""
    logits = runner().taken(logits)
    result = LseState.empty(len(logits), softcap, temperature) if state is None else state.copy()
    scaling = scaling_of(logits.dtype, softcap, temperature)
    runner().accumulate(logits, in_block(targets, logits, vocab_start), spread, scaling, result.columns)
    return result


def gradient(logits, targets, state, coefficients, out, *, spread=None, vocab_start=0, target_share=_NOUGHT):
    """See `fastxent.backends.reference.gradient`."""
    logits, written = runner().taken(logits), runner().taken(out)
    exponent, factor, own = state.of_gradient(coefficients, target_share)
    smooth = np.broadcast_to(coefficients.smooth, len(logits))
    of_rows, scaling = (
        (state["base"], exponent, factor, smooth, own),
        scaling_of(logits.dtype, state.softcap, state.temperature),
    )
    runner().gradient(logits, in_block(targets, logits, vocab_start), of_rows, spread, scaling, written)


def count(logits, levels):
    """See `fastxent.backends.reference.count`."""
    logits, counts = runner().taken(logits), np.empty((len(logits), 2), np.int64)
    runner().count(logits, np.asarray(levels, np.float64), counts)
    return counts


def score(logits, targets, *, ids=None, top_k=0, softcap=None, temperature=1.0):
    """See `fastxent.backends.reference.score`."""
    logits = runner().taken(logits)
    ids = np.empty((len(logits), 0), np.int64) if ids is None else ids
    result = RowScores.allocate(len(logits), top_k, ids.shape[1])
    runner().score(logits, targets, ids, scaling_of(logits.dtype, softcap, temperature), result)
    return result


def divergences(logits_p, logits_q, lse_p, lse_q):
    """See `fastxent.backends.reference.divergences`."""
    logits_p, logits_q = runner().taken(logits_p), runner().taken(logits_q)
    parts = np.empty((len(logits_p), strips_of(logits_p, logits_q), 2))
    runner().divergences(logits_p, logits_q, lse_p, lse_q, parts)
    unknown = ~(np.isfinite(lse_p) & np.isfinite(lse_q))
    kl, js = np.moveaxis(parts.sum(axis=1), 1, 0)
    return np.where(unknown, np.nan, kl), np.where(unknown, np.nan, js)


def logsumexp(logits, *, temperature=1.0):
    """See `fastxent.backends.reference.logsumexp`."""
    logits = runner().taken(logits)
    wanted = "target_logit", "lse"
    found = statistics(logits, np.full(len(logits), LARGEST), temperature=temperature, wanted=wanted)
    # a row that holds infinities: one that is NaN too stays NaN
    for i in np.flatnonzero(np.isinf(found.target_logit)):
        found.lse[i] = runner().row(logits, i).astype(np.float64).max()
    return found.lse


def log_softmax(logits, out, *, temperature=1.0):
    """See `fastxent.backends.reference.log_softmax`."""
    _of_largest(logits, out, _NOUGHT, temperature, "log_softmax")
    return out


def softmax(logits, out, *, temperature=1.0):
    """See `fastxent.backends.reference.softmax`."""
    _of_largest(logits, out, np.ones(1), temperature, "gradient")
    return out


def binary(logits, targets, weight, pos_weight, label_smoothing, upstream, losses, gradient):
    """See `fastxent.backends.reference.binary`."""
    keep, even = 1.0 - label_smoothing, 0.5 * label_smoothing
    runner().binary(logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient)


def _of_largest(logits, out, extra, temperature, entries):
    logits, out = runner().taken(logits), runner().taken(out)
    coefficients = Coefficients(hit=_NOUGHT, smooth=_NOUGHT, extra=extra, square=_NOUGHT)
    result, targets = Statistics.allocate(len(logits), ()), np.full(len(logits), LARGEST)
    scaling = scaling_of(logits.dtype, None, temperature)
    runner().entries(logits, targets, coefficients, None, scaling, result, out, entries)
