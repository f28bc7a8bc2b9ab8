"""How much memory one call takes beyond what the process has, as the Linux kernel counts resident pages.

tracemalloc sees neither what C++ libraries allocate nor Numba's own arrays, so it cannot compare them.
"""

import contextlib
import ctypes
import gc
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra(run):
    """``bytes, result`` of one call of ``run``: its highest resident memory above that before it.

    None for the bytes where the kernel does not tell. What an allocator has kept from earlier calls is given back
    first where the C library knows of it.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
        before = _kilobytes("VmRSS")
    except (OSError, KeyError):
        return None, run()
    result = run()
    return max(0, _kilobytes("VmHWM") - before) * 1024, result


def _kilobytes(name):
    lines = (line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(dict(lines)[name].split()[0])
