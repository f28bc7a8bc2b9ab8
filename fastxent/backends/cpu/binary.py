"""Binary cross entropy: elements in parallel, each on its own."""

from numba import prange

from fastxent.backends.cpu.formats import as_real
from fastxent.backends.cpu.formulas import binary_loss_and_slope, compiled, exp_of_minus, inlined
from fastxent.backends.cpu.memory import load_some, store_some
from fastxent.backends.cpu.vector import LANES, fma, lanes_of, to_float64, weighted, where, widest_registers

_CHUNK = 4096


@inlined
def _some(values, j, count):
    """values[j:], or in every lane the one that holds for all."""
    if values.size == 1:
        return lanes_of(values[0])
    return load_some(values, j, count, -1, 0.0)


@compiled
def _binary_chunk(logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient, start, stop):
    widest_registers()
    for j in range(start, stop, LANES):
        count = stop - j
        x = load_some(logits, j, count, -1, 0.0)
        y = fma(to_float64(load_some(targets, j, count, -1, 0.0)), keep, even)
        q = to_float64(exp_of_minus(where(x < 0.0, 0.0 - x, x)))
        loss, slope = binary_loss_and_slope(to_float64(x), q, _some(pos_weight, j, count) * y, 1.0 - y)
        share = _some(weight, j, count)
        store_some(losses, j, count, weighted(share, loss))
        if gradient.size > 0:
            store_some(gradient, j, count, as_real(logits, _some(upstream, j, count) * share * slope))


def binary(logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient):
    """(n,) logits and targets of their type, float64 weights and upstream gradient, (n,) or (1,) -> losses (float64),
    and the gradient where it has room. A target is keep y + even.
    """
    for chunk in prange((logits.shape[0] + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        stop = min(logits.shape[0], start + _CHUNK)
        _binary_chunk(logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient, start, stop)
