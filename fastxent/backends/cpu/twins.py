"""A kernel's two compiled forms, and which of them may run now.

Two threads in a parallel kernel at once end the process on Numba's workqueue layer, and GNU OpenMP dies in a forked
child; so the parallel twin runs only where that cannot happen, and where there is enough to do to pay for waking
threads. Both twins give the same bits. Each is compiled when first needed.
"""

import os
import threading

import numba

from fastxent.backends.cpu import cache

# elements below which waking the threads costs more than it saves: about 20 us of work
PARALLEL_FROM = 1 << 18

_threads_started = False
_threads_lost = False


def _after_fork():
    global _threads_lost
    _threads_lost = _threads_started


os.register_at_fork(after_in_child=_after_fork)


def threads_may_run():
    """Whether a parallel kernel may be entered from this thread of this process."""
    global _threads_started
    if _threads_lost:
        return False
    _threads_started = True  # asking for their number starts them
    if numba.get_num_threads() == 1:
        return False
    return threading.current_thread() is threading.main_thread() or numba.threading_layer() in ("omp", "tbb")


class Twins:
    """``kernel(work, *arguments)``: the function compiled parallel for much work, serial otherwise."""

    def __init__(self, function):
        options = {"error_model": "numpy", "nogil": True}
        self.serial = numba.njit(**options)(function)
        self.parallel = numba.njit(parallel=True, **options)(function)
        cache.enable(self.serial, "serial")
        cache.enable(self.parallel, "parallel")

    def __call__(self, work, *arguments):
        twin = self.parallel if work >= PARALLEL_FROM and threads_may_run() else self.serial
        return twin(*arguments)
