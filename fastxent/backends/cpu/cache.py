"""Where compiled kernels are kept between runs.

Numba keys a cached kernel by its own file alone; here the folder is named by a digest of every source a kernel can be
made of, so it is never older than the formulas it inlines, and an edit elsewhere compiles nothing anew; and of whether
indices are checked (NUMBA_BOUNDSCHECK). What cannot be read is compiled again; where nothing can be written, kernels
live in memory. A kernel is machine code, so a folder that others can write is not used, and writers take turns: Numba
numbers the files of an index it has read, and two writers at once would pick the same number.
"""

import contextlib
import functools
import hashlib
import os
import re
import time
from pathlib import Path

import numba
from filelock import FileLock
from numba.core import caching

_HERE = Path(__file__).parent
_PACKAGE = _HERE.parents[1]
_NO_KERNELS = "__init__.py", "warmup.py"  # of this folder: they call kernels, and no kernel calls them

_KEPT_FOR = 30 * 24 * 3600  # seconds without a change after which another version's kernels go


def path(version=None):
    """Where the kernels of a version belong, of this one of the CPU's by default; RuntimeError without a home. Those
    beside it are of other versions, and go when they are old.
    """
    root = os.environ.get("FASTXENT_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fastxent" / (version or _digest())


@functools.cache
def folder(version=None):
    """The folder of a version's kernels, see `path`, or None where there is none to read or write."""
    try:
        kernels = path(version)
        if not kernels.exists():
            kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_old(kernels.parent)
        status = kernels.stat()
    except (OSError, RuntimeError):
        return None
    posix = hasattr(os, "getuid")  # elsewhere a home is its owner's alone, and modes say nothing
    trusted = not posix or (status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022)
    return kernels if trusted and os.access(kernels, os.R_OK | os.X_OK) else None


def _remove_old(versions):
    """Remove folders of kernels not written to for long; nothing else that may lie beside them."""
    for version in versions.iterdir():
        ours = re.fullmatch("[0-9a-f]{16}", version.name) and version.is_dir() and not version.is_symlink()
        if ours and time.time() - version.stat().st_mtime > _KEPT_FOR:
            for kernel in [*version.glob("*.nb[ci]"), *version.glob("*.cubin"), version / "lock"]:
                kernel.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it
                version.rmdir()


def sources():
    """The files a kernel can be made of."""
    ours = (source for source in _HERE.glob("*.py") if source.name not in _NO_KERNELS)
    return sorted([*ours, _PACKAGE / "rowmath.py", _PACKAGE / "state.py"])


def _digest():
    digest = hashlib.sha256(f"{numba.__version__} {numba.config.BOUNDSCHECK}".encode())
    for source in sources():
        digest.update(source.name.encode() + source.read_bytes())
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


def _one_writer(kernels):
    return FileLock(Path(kernels) / "lock")


def _function_cache(py_func, twin):
    class Implementation(caching.CompileResultCacheImpl):
        _locator_classes = (_Locators(twin),)

    class KernelCache(caching.FunctionCache):
        _impl_class = Implementation

        def load_overload(self, sig, target_context):
            try:
                kernel = super().load_overload(sig, target_context)
                if kernel is None or kernel.signature.args == tuple(sig):
                    return kernel
            except Exception:  # noqa: S110, a torn or foreign file: anything may come out of it
                pass
            with contextlib.suppress(OSError), _one_writer(self.cache_path):
                self.flush()
            return None

        def save_overload(self, sig, data):
            with contextlib.suppress(OSError), _one_writer(self.cache_path):
                super().save_overload(sig, data)

    return KernelCache(py_func)


def enable(dispatcher, twin):
    """Let ``dispatcher`` load and save its kernels; ``twin`` tells the parallel one of a function from the serial."""
    if folder() is not None:
        dispatcher._cache = _function_cache(dispatcher.py_func, twin)
