"""The CUDA backend: the verbs every backend has, over rows on their way through a GPU.

Arrays of the host go through page-locked memory in blocks of rows, copied while other blocks are computed. It is never
chosen for them by itself. With FASTXENT_CUDA_SIMULATED=1 in the environment the GPU is one in NumPy: very slow, for
tests.
"""

import functools
import importlib
import os

import numpy as np

from fastxent import rowmath
from fastxent.checks import loss_dtype
from fastxent.state import ABSENT, IGNORED, LARGEST, Coefficients, LseState, Statistics

_FIELDS = Statistics.__slots__
_NOUGHT = np.zeros(1)


def why_unavailable():
    """Why no GPU can be used here, in a sentence; None when one can."""
    if _is_simulated():
        return None
    from fastxent.backends.cuda import machine

    return machine.why_unavailable()


def describe():
    """What a person may want to know of this backend, by name."""
    reason = why_unavailable()
    if reason is not None:
        return {}
    machine = _runner().machine
    return {"GPU": f"{machine.name}, compute capability {machine.architecture[0]}.{machine.architecture[1]}"}


def statistics(logits, targets, *, spread=None, softcap=None, temperature=1.0, wanted=()):
    """See `fastxent.backends.reference.statistics`."""
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    _runner().statistics(logits, targets, spread, _scaling(logits.dtype, softcap, temperature), result)
    return result


def statistics_and_gradient(
    logits, targets, coefficients, out, *, spread=None, softcap=None, temperature=1.0, wanted=()
):
    """See `fastxent.backends.reference.statistics_and_gradient`."""
    result = Statistics.allocate(len(logits), wanted if spread is None else (*wanted, "gap"))
    scaling = _scaling(logits.dtype, softcap, temperature)
    _runner().entries(logits, targets, coefficients, spread, scaling, result, out, "gradient")
    return result


def accumulate(logits, targets, *, spread=None, vocab_start=0, state=None):
    """See `fastxent.backends.reference.accumulate`."""
    columns = LseState.empty(len(logits)).columns if state is None else state.columns.copy()
    here = (targets >= vocab_start) & (targets < vocab_start + logits.shape[1])
    local = np.where(here, targets - vocab_start, np.where(targets == IGNORED, IGNORED, ABSENT))
    _runner().accumulate(logits, local, spread, _scaling(logits.dtype, None, 1.0), columns)
    return LseState(columns)


def logsumexp(logits, *, temperature=1.0):
    """See `fastxent.backends.reference.logsumexp`."""
    wanted = "target_logit", "lse"
    found = statistics(logits, np.full(len(logits), LARGEST), temperature=temperature, wanted=wanted)
    # a row that holds infinities: one that is NaN too stays NaN
    for i in np.flatnonzero(np.isinf(found.target_logit)):
        found.lse[i] = logits[i : i + 1][0].astype(np.float64).max()
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
    _runner().binary(logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient)


def _of_largest(logits, out, extra, temperature, entries):
    coefficients = Coefficients(hit=_NOUGHT, smooth=_NOUGHT, extra=extra, square=_NOUGHT)
    result, targets = Statistics.allocate(len(logits), ()), np.full(len(logits), LARGEST)
    scaling = _scaling(logits.dtype, None, temperature)
    _runner().entries(logits, targets, coefficients, None, scaling, result, out, entries)


@functools.lru_cache
def _scaling(dtype, softcap, temperature):
    """Plain numbers: a launch takes no others."""
    from fastxent.backends.cuda.sums import Scaling

    real = loss_dtype(dtype).type
    cap = 0.0 if softcap is None else float(real(1.0 / softcap))
    of_logits, of_rows = rowmath.rate(real, softcap, temperature), rowmath.rate(np.float64, softcap, temperature)
    return Scaling(*(float(number) for number in (*of_logits, cap, *of_rows)))


def _is_simulated():
    return os.environ.get("FASTXENT_CUDA_SIMULATED") == "1"


def _runner():
    return _runner_on(_is_simulated())


@functools.cache
def _runner_on(simulated):
    from fastxent.backends.cuda.run import Runner

    module = importlib.import_module(f"fastxent.backends.cuda.{'simulated' if simulated else 'machine'}")
    return Runner(module.Machine())
