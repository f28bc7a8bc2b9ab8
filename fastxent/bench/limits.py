"""What no kernel can beat: reading an array once, and copying it, with the threads the kernels use."""

import numpy as np
from numba import njit, prange

_CHUNK = 1 << 16


@njit(parallel=True, fastmath=True)
def _read(flat, sums):
    for c in prange(sums.shape[0]):
        part = flat[c * _CHUNK : (c + 1) * _CHUNK]
        total = part[0] * 0
        for j in range(part.shape[0]):
            total += part[j]
        sums[c] = total


@njit(parallel=True)
def _copy(flat, out):
    for c in prange((flat.shape[0] + _CHUNK - 1) // _CHUNK):
        part, copied = flat[c * _CHUNK : (c + 1) * _CHUNK], out[c * _CHUNK : (c + 1) * _CHUNK]
        for j in range(part.shape[0]):
            copied[j] = part[j]


def read(array):
    """Sum a contiguous array: the limit of a forward pass."""
    sums = np.empty(-(-array.size // _CHUNK), array.dtype)
    _read(array.reshape(-1), sums)
    return sums.sum()


def copy(array, out):
    """Copy a contiguous array into ``out``: the limit of a loss with its gradient."""
    _copy(array.reshape(-1), out.reshape(-1))
    return out
