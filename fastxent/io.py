"""Sources and sinks of arrays on disk: .npy files read through short-lived memory maps, and files that appear whole.

Pickles are never loaded; a header is checked against the file's size before it is believed.
"""

import contextlib
import fcntl
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


class SourceError(ValueError):
    """An input that cannot be read as what it should be; the message names the file and the reason."""


class NpySource:
    """An array in a .npy file, read piece by piece through one open descriptor.

    Every piece is its own memory map, so the pages behind it are given back as soon as the piece is dropped; that
    costs about 2% over one long-lived map, where reading into a buffer costs several times as much.

    Attributes
    ----------
    path : Path
    shape : tuple of int
    dtype : dtype

    Raises
    ------
    SourceError
        If the file is missing, not a .npy file, holds Python objects, is in Fortran order, or is shorter than it says.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror or error}") from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self):
        """Give the descriptor back; pieces already taken stay."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def _read_header(self):
        try:
            self.shape, fortran, self.dtype = _read_header(self._file)
            self._offset = self._file.tell()
        except Exception as error:  # a damaged header fails in many ways, in NumPy and in Python's own parser
            raise SourceError(f"{self.path}: not a readable .npy file: {_line(error)}") from error
        if self.dtype.hasobject:
            raise SourceError(f"{self.path}: holds pickled Python objects, which are never loaded")
        if fortran and len(self.shape) > 1:
            raise SourceError(f"{self.path}: is in Fortran order; save numpy.ascontiguousarray of it")
        self._check_size()

    def _check_size(self):
        expected = self._offset + math.prod(self.shape) * self.dtype.itemsize
        size = os.fstat(self._file.fileno()).st_size
        if size < expected:
            raise SourceError(f"{self.path}: truncated: {size:,} bytes, where its header promises {expected:,}")

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order, a read-only memory map of their own.

        Raises
        ------
        SourceError
            If the file has become shorter since it was opened.
        """
        self._check_size()
        if start == stop:
            return np.empty(0, self.dtype)
        return np.memmap(self._file, self.dtype, "r", self._offset + start * self.dtype.itemsize, (stop - start,))


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__


def _read_header(file):
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version in ((2, 0), (3, 0)):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the format is unknown")


class NpySink:
    """A .npy file of records that appears under its name only when it is whole.

    Records are appended to ``PATH.part``, which is renamed at the end; leaving the ``with`` block by an exception
    removes it. A part that no living process holds is started afresh.

    Parameters
    ----------
    path : path-like
    dtype : dtype
    shape : tuple of int
    replace : bool
        Whether a file that is already there gives way.
    inputs : sequence of path-like
        Files that must not be written over.

    Raises
    ------
    FileExistsError
        If ``path`` exists and may not be replaced, is no regular file, or is an input, or so is its part; or if
        another process is writing it.
    """

    def __init__(self, path, dtype, shape, replace=False, inputs=()):
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self._replace = replace
        self._header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        self._left = math.prod(shape)
        self._file: Any = None
        for mine in (self.path, self.part):
            if mine.exists() and any(mine.samefile(theirs) for theirs in inputs):
                raise FileExistsError(f"{mine} is an input of this run")
            if (mine.exists() or mine.is_symlink()) and not mine.is_file():
                raise FileExistsError(f"{mine} is not a regular file")
        if self.part.is_symlink():
            raise FileExistsError(f"{self.part} is a link")
        if self.path.exists() and not replace:
            raise FileExistsError(f"{self.path} exists")

    def __enter__(self):
        try:
            self._open()
            self._file.truncate(0)
            np.lib.format.write_array_header_1_0(self._file, self._header)
        except BaseException:
            self._abandon()
            raise
        return self

    def _open(self):
        """Take hold of the part; a lock tells whether a living process does already."""
        descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), self.part.stat()):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise FileExistsError(f"{self.part} is being written by another process") from None

    def append(self, records):
        """Write the next records."""
        self._left -= len(records)
        self._file.write(records.tobytes())

    def __exit__(self, kind, error, trace):
        try:
            if error is None:
                self._finish()
        finally:
            self._abandon()

    def _finish(self):
        if self._left:
            raise ValueError(f"{self.path}: {self._left} records were never written")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._replace:
            self.part.replace(self.path)
        else:
            self._link()

    def _link(self):
        """Give the part its name; unlike a rename, a link refuses a file that has appeared meanwhile."""
        try:
            os.link(self.part, self.path)
            self.part.unlink()  # while it is held: whoever takes the part next would write into the output
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            self.part.rename(self.path)

    def _abandon(self):
        """Let go of the part and remove it, unless another process holds it.

        An interrupt may come before this process knows that it made the part, so the lock is asked once more.
        """
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError), self.part.open("rb") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.part.unlink()
