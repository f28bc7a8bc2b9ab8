"""What no kernel can beat: reading an array once, and copying it, with the threads the kernels use.

Whatever an array holds is taken as words of 64 bits; up to seven bytes at its end are left out.
"""

import time
from dataclasses import dataclass

import numpy as np
from numba import njit, prange

_CHUNK = 1 << 15
# bytes: a call of one megabyte is all one thread's, and its overhead as long as its arithmetic; eight are as fast an
# element from a third-level cache as a thread's share is from the second
_IN_CACHE = 8 << 20
_USUAL_CLASSES, _MOST_CLASSES, _MOST_ROWS = 1 << 14, 1 << 15, 1 << 18


@njit(parallel=True)
def _read(words, sums):
    for c in prange(sums.shape[0]):
        part = words[c * _CHUNK : (c + 1) * _CHUNK]
        total = 0
        for j in range(part.shape[0]):
            total += part[j]
        sums[c] = total


@njit(parallel=True)
def _copy(words, out):
    for c in prange((words.shape[0] + _CHUNK - 1) // _CHUNK):
        part, copied = words[c * _CHUNK : (c + 1) * _CHUNK], out[c * _CHUNK : (c + 1) * _CHUNK]
        for j in range(part.shape[0]):
            copied[j] = part[j]


def _words(array):
    raw = array.reshape(-1).view(np.uint8)
    return raw[: raw.size // 8 * 8].view(np.int64)


def read(array):
    """Sum the words of a contiguous array: the limit of a forward pass."""
    words = _words(array)
    sums = np.empty(-(-words.size // _CHUNK), np.int64)
    _read(words, sums)
    return sums.sum()


def copy(array, out):
    """Copy a contiguous array into ``out``: the limit of a loss with its gradient."""
    _copy(_words(array), _words(out))
    return out


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine can do: bytes a second of reading and of copying (read and written, both counted), and how many
    elements of ``dtype`` a second our own loss takes that lie in the cache, of the classes asked for. With so many
    threads.
    """

    read: float
    copy: float
    elements: float
    dtype: str
    threads: int


def measure(dtype="float32", megabytes=64, rounds=7, classes=_USUAL_CLASSES):
    """`Limits` of this machine now, with the threads of this process: some tenths of a second once kernels are there.

    Parameters
    ----------
    dtype : dtype or str
        Of the logits whose loss is timed, one that `fastxent.cross_entropy` takes.
    megabytes : int
        Of 2**20 bytes: the size of the array that is read, and of the one it is copied to. What fits into a cache gives
        the speed of the cache.
    rounds : int
        How often reading and copying are timed; the shortest time counts.
    classes : int
        The length of a row of those logits; rows of more than 32,768 count as so long.

    Returns
    -------
    Limits

    Raises
    ------
    TypeError
        If ``dtype`` is another.
    ValueError
        If ``rounds`` is not positive.

    Examples
    --------
    >>> from fastxent.bench import limits
    >>> limits.measure(megabytes=1).read > 0
    True
    """
    import fastxent

    # written, both: pages that never were are all one page of zeros, which is read from the cache
    array, out = (np.ones(megabytes << 20, np.uint8) for _ in range(2))
    return Limits(
        array.nbytes / _least(lambda: read(array), rounds),
        2 * array.nbytes / _least(lambda: copy(array, out), rounds),
        elements(dtype, classes),
        np.dtype(dtype).name,
        fastxent.get_num_threads(),
    )


def elements(dtype, classes=_USUAL_CLASSES, rounds=25):
    """Elements a second of our own loss of so many classes in the cache: the ceiling that is arithmetic.

    It is the difference of two numbers of rows, so what a call and its threads cost is left out. Rows of more than
    `_MOST_CLASSES` take no less an element.
    """
    import fastxent

    classes = min(classes, _MOST_CLASSES)
    rows = min(_MOST_ROWS, _IN_CACHE // (classes * np.dtype(dtype).itemsize))
    logits, targets = np.zeros((rows, classes), dtype), np.zeros(rows, np.int64)
    logits[:] = np.linspace(-8, 8, classes)

    def loss_of(rows):
        return lambda: fastxent.cross_entropy(logits[:rows], targets[:rows], reduction="none", backend="cpu")

    whole, half = (_least(loss_of(rows), rounds) for rows in (rows, rows // 2))
    return (rows - rows // 2) * classes / max(whole - half, whole / 4)


def _least(run, rounds):
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
