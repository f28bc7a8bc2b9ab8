"""Binary cross entropy: elements in parallel, each on its own."""

from numba import prange

from fastxent.backends.cpu.formats import as_real
from fastxent.backends.cpu.formulas import binary_loss_and_slope, compiled, exp_of_minus
from fastxent.backends.cpu.memory import load_some, store_some
from fastxent.backends.cpu.vector import LANES, to_float64, where, widest_registers

_CHUNK = 4096


@compiled
def _binary_chunk(logits, positive, negative, upstream, losses, gradient, start, stop):
    widest_registers()
    for j in range(start, stop, LANES):
        count = stop - j
        x = load_some(logits, j, count, -1, 0.0)
        q = to_float64(exp_of_minus(where(x < 0.0, 0.0 - x, x)))
        a, b = to_float64(load_some(positive, j, count, -1, 0.0)), to_float64(load_some(negative, j, count, -1, 0.0))
        loss, slope = binary_loss_and_slope(to_float64(x), q, a, b)
        store_some(losses, j, count, loss)
        if gradient.size > 0:
            store_some(gradient, j, count, as_real(logits, load_some(upstream, j, count, -1, 0.0) * slope))


def binary(logits, positive, negative, upstream, losses, gradient):
    """(n,) logits, masses (the logits' type) and upstream gradient (float64) -> losses (float64) and gradient."""
    for chunk in prange((logits.shape[0] + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        stop = min(logits.shape[0], start + _CHUNK)
        _binary_chunk(logits, positive, negative, upstream, losses, gradient, start, stop)
