"""Divergences of two distributions given by logits: pieces of rows in parallel, both rows read side by side."""

import numpy as np
from numba import prange

from fastxent.backends.cpu.formats import as_real
from fastxent.backends.cpu.formulas import compiled, divergence_terms, exp_parts, exp_split, power_of_two, reference
from fastxent.backends.cpu.memory import load_some, prefetch, row_of
from fastxent.backends.cpu.vector import LANES, lanes_of, sum_lanes, to_float64, widest_registers

PIECE = 16384  # classes of a row in one task
_BLOCK = 256  # classes between two flushes of the lanes to float64
_AHEAD = 4096
_FAR = 32.0  # nats between two normalisers, from which one row is moved to the other before they are subtracted


@compiled
def _normaliser(row, lse, scaling):
    """What turns exp(row - base) 2**-exponent into probabilities: the reference, and the factor that is left."""
    base, exponent, magic, floor = reference(as_real(row, lse), (scaling.high, scaling.low, scaling.nats))
    power, n = exp_split(np.float64(base) - lse, (scaling.row_high, scaling.row_low, scaling.row_nats))
    return base, magic, floor, as_real(row, power * power_of_two(n + np.float64(exponent)))


@compiled
def _sum_piece(p, q, lse_p, lse_q, start, stop, scaling, part):
    widest_registers()
    rate = scaling.high, scaling.low, scaling.nats
    base_p, magic_p, floor_p, factor_p = _normaliser(p, lse_p, scaling)
    base_q, magic_q, floor_q, factor_q = _normaliser(q, lse_q, scaling)
    # of an offset that one row has and the other has not, the larger logits bear the subtraction without rounding
    zero, apart = as_real(p, 0.0), lse_q - lse_p
    shift = as_real(p, apart) if abs(apart) > _FAR else zero
    shift_p, shift_q = (zero, shift) if abs(lse_q) > abs(lse_p) else (-shift, zero)
    near = as_real(p, apart - np.float64(shift))
    rest = as_real(p, apart - np.float64(shift) - np.float64(near))
    total_kl, total_js = lanes_of(0.0), lanes_of(0.0)
    for block in range(start, stop, _BLOCK):
        kl, js = lanes_of(as_real(p, 0.0)), lanes_of(as_real(p, 0.0))
        for j in range(block, min(stop, block + _BLOCK), LANES):
            prefetch(p, j + _AHEAD)
            prefetch(q, j + _AHEAD)
            z, y = load_some(p, j, stop - j, -1, -np.inf), load_some(q, j, stop - j, -1, -np.inf)
            power_p, scale_p = exp_parts(z - base_p, rate, magic_p, floor_p)
            power_q, scale_q = exp_parts(y - base_q, rate, magic_q, floor_q)
            log_ratio = (y - shift_q) - (z - shift_p) - near - rest
            terms = divergence_terms(power_p * scale_p * factor_p, power_q * scale_q * factor_q, log_ratio)
            kl, js = kl + terms[0], js + terms[1]
        total_kl, total_js = total_kl + to_float64(kl), total_js + to_float64(js)
    part[0], part[1] = sum_lanes(total_kl), sum_lanes(total_js)


def divergences(p, q, classes, lse_p, lse_q, scaling, parts):
    """Logits (N, V) of two distributions and the logsumexp of their rows, float64 (N,) -> parts (N, n, 2), float64:
    what each piece of a row adds to KL(p || q) and to JS(p, q).
    """
    for task in prange(parts.shape[0] * parts.shape[1]):
        i, piece = task // parts.shape[1], task % parts.shape[1]
        start = piece * PIECE
        stop = min(classes, start + PIECE)
        _sum_piece(
            row_of(p, i, classes), row_of(q, i, classes), lse_p[i], lse_q[i], start, stop, scaling, parts[i, piece]
        )
