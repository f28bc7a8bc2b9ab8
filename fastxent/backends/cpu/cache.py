"""Where compiled kernels are kept between runs.

Numba keys a cached kernel by its own file alone; here the folder is named by a digest of every source of the package,
so a kernel is never older than the formulas it inlines. What cannot be read is compiled again; where nothing can be
written, kernels live in memory.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path

import numba
from numba.core import caching

import fastxent


@functools.cache
def folder():
    """The folder of this version's kernels, or None where none can be written."""
    root = os.environ.get("FASTXENT_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR")
    try:
        base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = base / "fastxent" / _digest()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError):
        return None


def _digest():
    package = Path(fastxent.__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode() + source.read_bytes())
    return digest.hexdigest()[:16]


class _Locator(caching._CacheLocator):
    def __init__(self, twin):
        self._twin = twin
        self._py_file = __file__

    def get_cache_path(self):
        return str(folder())

    def get_source_stamp(self):
        return self._twin

    def get_disambiguator(self):
        return self._twin


class _Locators:
    """What Numba asks for a locator: here there is one, whatever the function's file."""

    def __init__(self, twin):
        self._twin = twin

    def from_function(self, py_func, py_file):
        return _Locator(self._twin)


def _function_cache(py_func, twin):
    class Implementation(caching.CompileResultCacheImpl):
        _locator_classes = (_Locators(twin),)

    class KernelCache(caching.FunctionCache):
        _impl_class = Implementation

        def load_overload(self, sig, target_context):
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # a torn or foreign file: anything may come out of it
                with contextlib.suppress(OSError):
                    self.flush()
                return None

        def save_overload(self, sig, data):
            with contextlib.suppress(OSError):
                super().save_overload(sig, data)

    return KernelCache(py_func)


def enable(dispatcher, twin):
    """Let ``dispatcher`` load and save its kernels; ``twin`` tells the parallel one of a function from the serial."""
    if folder() is not None:
        dispatcher._cache = _function_cache(dispatcher.py_func, twin)
