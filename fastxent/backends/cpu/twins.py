"""A kernel's two compiled forms, and which of them may run now.

Two threads in a parallel kernel at once end the process on Numba's workqueue layer, and GNU OpenMP dies in a forked
child; so the parallel twin runs only where that cannot happen, and where there is enough to do to pay for waking
threads. Both twins give the same bits. Each is compiled when first needed.
"""

import os
import threading
from pathlib import Path

import numba

from fastxent.backends.cpu import cache

# elements below which waking the threads costs more than it saves: about 20 us of work
PARALLEL_FROM = 1 << 18


def _lost_before():
    """Whether this is the child of a process with Numba's threads, forked before anything here could see it."""
    try:
        numba.threading_layer()
    except ValueError:  # none was started
        return False
    tasks = Path("/proc/self/task")
    return tasks.exists() and numba.config.NUMBA_NUM_THREADS > 1 and sum(1 for _ in tasks.iterdir()) == 1


_threads_lost = _lost_before()


def _after_fork():
    """Numba's threads, whoever started them, do not live on in the child."""
    global _threads_lost
    try:
        numba.threading_layer()
        _threads_lost = True
    except ValueError:  # none was started
        pass


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_for(work):
    """How many threads a kernel with ``work`` elements gets, called from this thread of this process."""
    if work < PARALLEL_FROM or _threads_lost:
        return 1
    threads = numba.get_num_threads()
    at_once = threading.current_thread() is threading.main_thread() or numba.threading_layer() in ("omp", "tbb")
    return threads if at_once else 1


class Twins:
    """``kernel(work, *arguments)``: the function compiled parallel for much work, serial otherwise."""

    def __init__(self, function):
        options = {"error_model": "numpy", "nogil": True}
        self.serial = numba.njit(**options)(function)
        self.parallel = numba.njit(parallel=True, **options)(function)
        cache.enable(self.serial, "serial")
        cache.enable(self.parallel, "parallel")

    def __call__(self, work, *arguments):
        twin = self.serial if threads_for(work) == 1 else self.parallel
        return twin(*arguments)
