"""What a kernel is told, made of what a verb is told: plain numbers, and arrays on their way to the device."""

import functools

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.ends import Coefficients
from fastxent.backends.cuda.words import Scaling, Shares
from fastxent.checks import loss_dtype
from fastxent.state import IGNORED, LARGEST


@functools.lru_cache
def scaling_of(dtype, softcap, temperature):
    """Plain numbers: a launch takes no others."""
    real = loss_dtype(dtype)
    cap = 0.0 if softcap is None else 1.0 / softcap
    of_logits, of_rows = rowmath.rate(real.type, softcap, temperature), rowmath.rate(np.float64, softcap, temperature)
    return Scaling(*(bits_of(number, real) for number in (*of_logits, cap)), *map(float, of_rows))


def bits_of(number, real):
    """A number as the kernels that compute with ``real`` take it."""
    return int(np.array(number, real).view(f"i{real.itemsize}"))


def kind_of(machine, dtype, classes, targets, scaling, spread, mergeable=False):
    """What the kernels for such rows are compiled for."""
    name = "none"
    if spread is not None:
        name = "probabilities" if spread.keep else "weights" if spread.weight.size > 1 else "even"
    live = targets[targets != IGNORED]
    # rows of probabilities have no other kernels where none of them counts
    largest = name == "probabilities" or bool((live == LARGEST).any())
    if largest and not (live == LARGEST).all():
        raise NotImplementedError("the cuda backend takes rows with and without a target in separate calls")
    form = dtype.newbyteorder("=").name
    return machine.layout.kind(form, classes, scaling.cap != 0.0, name, largest, mergeable)


def shares_of(slot, rows, spread, kind, real, classes):
    """Shares of some rows; weights are divided by a power of two: those beyond float32 would not fit."""
    if spread is None:
        return Shares(0, 0, 0, 0, 0, 1.0)
    if kind.spread == "even":
        return Shares(0, 0, 0, 0, 0, float(spread.weight[0]))
    scale = 2.0 ** int(np.frexp(spread.weight.max(initial=0.0))[1])
    weight = slot.upload("weight", np.broadcast_to(spread.weight / scale, classes), real)
    if kind.spread == "weights":
        return Shares(weight, 0, 0, 0, 0, scale)
    place, stride = slot.upload_rows("probabilities", spread.probabilities[rows], real)
    return Shares(weight, place, stride, bits_of(spread.keep, real), bits_of(spread.even, real), scale)


def mass_of_others(weight, targets):
    """What all classes but each row's target weigh, 0 where it is ignored."""
    before, after = (np.concatenate([[0.0], np.cumsum(part)]) for part in (weight, weight[::-1]))
    place = np.maximum(targets, 0)
    others = np.where(targets >= 0, before[place] + after[len(weight) - 1 - place], before[-1])
    return np.where(targets == IGNORED, 0.0, others)


def coefficients_of(slot, coefficients):
    """Coefficients of the rows of a slot, on their way to the device."""
    places = [slot.upload(f"coefficient {k}", column, np.float64) for k, column in enumerate(coefficients)]
    return Coefficients(*places, *(8 if len(column) > 1 else 0 for column in coefficients))
