"""Binary cross entropy: a thread for an element, each on its own."""

from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.rowmath import Table

KERNELS = ("binary",)


class Elements(NamedTuple):
    """Addresses of logits and targets (n,) of one kind, and of weights, float64; a step is 8, or 0 where all elements
    have the same. A target is keep y + even.
    """

    size: int
    logits: int
    targets: int
    weight: int
    pos_weight: int
    upstream: int
    weight_step: int
    pos_weight_step: int
    upstream_step: int
    keep: float
    even: float


@of_kind
def build(ops, kind):
    """The kernel, by name, for logits of the format of a `Kind`, float32 or float64."""
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    exp_of_minus = rowmath.build_terms(ops, real).exp_of_minus
    loss_and_slope = rowmath.build_rows(ops).binary_loss_and_slope
    load_one, store_one, load_float64, store_float64 = (
        form.load_one,
        form.store_one,
        ops.load_float64,
        ops.store_float64,
    )
    to_float64, to_real, block, thread, int64 = ops.to_float64, form.to_real, ops.block, ops.thread, ops.int64
    itemsize, threads, zero = form.itemsize, kind.threads * kind.rows, real.type(0)

    def binary(elements, losses, gradient):
        """(n,) logits and targets -> losses (n,) float64, and the gradient unless its address is 0."""
        i = int64(block()) * threads + thread()
        if i < elements.size:
            x = load_one(elements.logits + i * itemsize)
            y = to_float64(load_one(elements.targets + i * itemsize)) * elements.keep + elements.even
            q = to_float64(exp_of_minus(zero - x if x < zero else x))
            positive = load_float64(elements.pos_weight + i * elements.pos_weight_step) * y
            loss, slope = loss_and_slope(to_float64(x), q, positive, 1.0 - y)
            weight = load_float64(elements.weight + i * elements.weight_step)
            store_float64(losses + i * 8, weight * loss if weight != 0.0 else 0.0)
            if gradient != 0:
                upstream = load_float64(elements.upstream + i * elements.upstream_step)
                store_one(gradient + i * itemsize, to_real(upstream * weight * slope))

    return Table(binary=binary)
