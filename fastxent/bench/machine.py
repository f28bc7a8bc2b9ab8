"""The machine a table of times was made on, and its threads."""

import contextlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import threadpoolctl

import fastxent

_LIBRARIES = ("numba", "numpy", "torch", "jax", "optax", "onnxruntime", "scipy", "scikit-learn")


def describe():
    """What a table of times must say beside them: the processor, its cores, and versions."""
    import numba

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in info if ":" in line)
        names = {name.strip(): value.strip() for name, value in lines.items()}
        model = f"{names['model name']} (family {names['cpu family']}, model {names['model']})"
    except (OSError, KeyError):
        pass
    found = {"processor": model, "cores": numba.config.NUMBA_NUM_THREADS, "fastxent": fastxent.__version__}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def threads(number):
    """``number`` threads for Numba, BLAS and torch; other candidates ask `fastxent.get_num_threads`.

    torch is told where it is loaded; whoever loads it in here calls `tell_torch` after that.
    """
    before = fastxent.get_num_threads()
    fastxent.set_num_threads(number)
    tell_torch()
    try:
        with threadpoolctl.threadpool_limits(number, user_api="blas"):
            yield
    finally:
        fastxent.set_num_threads(before)
        tell_torch()


def tell_torch():
    """Give torch, where it is loaded, as many threads as our kernels have."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(fastxent.get_num_threads())
