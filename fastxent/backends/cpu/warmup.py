"""Compiling every kernel ahead of time, so that no later call waits for a compiler."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numba
import numpy as np

from fastxent import checks
from fastxent.backends import cpu
from fastxent.backends.cpu import cache, strided
from fastxent.backends.cpu.formats import STAND_INS
from fastxent.backends.cpu.twins import PARALLEL_FROM
from fastxent.state import Coefficients

# a problem for the serial twins and one for the parallel ones
_SHAPES = ((1, 1), (-(-PARALLEL_FROM // 256), 256))


def compile_for(dtype):
    """Compile what logits of ``dtype`` may need, into the cache; how many specialisations that are, and how many of
    them had not been kept.
    """
    dtype = np.dtype(dtype)
    own = checks.loss_dtype(dtype)
    for shape in _SHAPES:
        logits, targets = np.zeros(shape).astype(dtype), np.zeros(shape[0], np.int64)
        coefficients = Coefficients(*(np.zeros(1) for _ in Coefficients._fields))
        cpu.statistics(logits, targets)
        state = cpu.accumulate(logits, targets)
        cpu.score(logits, targets)
        cpu.count(logits, np.zeros(shape[0]))
        cpu.divergences(logits, logits, np.zeros(shape[0]), np.zeros(shape[0]))
        if dtype == own:  # smaller formats come as float32
            flat, one = logits.reshape(-1), np.ones(1)
            cpu.binary(flat, flat, one, one, 0.0, one, np.empty(logits.size), flat.copy())
        for written in {own, dtype}:
            cpu.statistics_and_gradient(logits, targets, coefficients, np.empty(shape, written))
            cpu.gradient(logits, targets, state, coefficients, np.empty(shape, written))
            cpu.log_softmax(logits, np.empty(shape, written))
    stored = numba.from_dtype(STAND_INS.get(dtype, dtype))
    twins = [twin for kernel in cpu.KERNELS for twin in (kernel.serial, kernel.parallel)]
    found = [(twin, signature) for twin in twins for signature in twin.signatures if signature[0].dtype == stored]
    return len(found), sum(signature in twin.stats.cache_misses for twin, signature in found)


def compile_copies(sizes=(1, 2, 4, 8)):
    """Compile the copies between layouts of elements of ``sizes`` bytes; as `compile_for`."""
    for size in sizes:
        for rows, classes in _SHAPES:
            strided.copy(np.zeros((rows, classes), f"u{size}"), np.zeros((rows, classes), f"u{size}"))
    twins = strided.KERNEL.serial, strided.KERNEL.parallel
    return sum(len(twin.signatures) for twin in twins), sum(len(twin.stats.cache_misses) for twin in twins)


def compile_all(dtypes=checks.DTYPES):
    """Compile for each of ``dtypes``, several at a time; yields each with both numbers, and last the copies between
    layouts.

    Raises
    ------
    OSError
        If there is no folder to keep kernels in.
    """
    if cache.folder() is None:
        raise OSError("no folder can be written to keep kernels in; FASTXENT_CACHE_DIR names one")
    workers = min(len(dtypes), multiprocessing.cpu_count())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        copies = pool.submit(compile_copies)
        for dtype, numbers in zip(dtypes, pool.map(compile_for, dtypes), strict=True):
            yield dtype, *numbers
        yield "layouts", *copies.result()
