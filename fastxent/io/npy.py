"""Arrays that lie in one file as they are: .npy, and what `fastxent.io.safetensors` finds, through memory maps."""

import math
import os
from pathlib import Path

import numpy as np

from fastxent.io.source import Source, SourceError, check_claim, line, stamp_of


class MappedSource(Source):
    """Elements from some byte of a file on, read through one open descriptor.

    Every piece is its own memory map, so the pages behind it are given back as soon as the piece is dropped; that
    costs about 2% over one long-lived map, where reading into a buffer costs several times as much. The kernel is
    told of a piece when it is taken, so that a disk is at work on it before the first element is looked at.

    Raises
    ------
    SourceError
        If the file is missing, or not what it should be, or shorter than it says.
    """

    mapped = True

    def __init__(self, path):
        self._path = Path(path)
        self.name = str(path)
        self._offset = 0
        try:
            self._file = self._path.open("rb")
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        try:
            self._stamp = self.stamp()
            self._read_header()
            self._check_size()
            check_claim(self.name, self.shape, self.dtype)
        except BaseException:
            self.close()
            raise

    def _read_header(self):
        """Set shape, dtype and offset."""
        raise NotImplementedError

    def close(self):
        """Give the descriptor back; blocks already taken stay."""
        self._file.close()

    def _check_size(self):
        expected = self._offset + math.prod(self.shape) * self.dtype.itemsize
        size = os.fstat(self._file.fileno()).st_size
        if size < expected:
            raise SourceError(f"{self.name}: truncated: {size:,} bytes, where its header promises {expected:,}")

    def stamp(self):
        """Path, size and time of change."""
        return stamp_of(self._path)

    def paths(self):
        """The file."""
        return [self._path]

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order, a read-only memory map of their own."""
        self._check_size()
        if start == stop:
            return np.empty(0, self.dtype)
        first, size = self._offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), first, size, os.POSIX_FADV_WILLNEED)
        try:
            return np.memmap(self._file, self.dtype, "r", first, (stop - start,))
        except ValueError as error:  # the file has shrunk since its size was looked at
            raise SourceError(f"{self.name}: truncated while it was read: {line(error)}") from error


class NpySource(MappedSource):
    """An array in a .npy file."""

    def _read_header(self):
        try:
            self.shape, fortran, self.dtype = _read_header(self._file)
            self._offset = self._file.tell()
        except Exception as error:  # a damaged header fails in many ways, in NumPy and in Python's own parser
            # what NumPy writes for a float8 that it then cannot read
            hint = "; save its view('uint8')" if "'<f1'" in str(error) else ""
            raise SourceError(f"{self.name}: not a readable .npy file: {line(error)}{hint}") from error
        if self.dtype.hasobject:
            raise SourceError(f"{self.name}: holds pickled Python objects, which are never loaded")
        if fortran and len(self.shape) > 1:
            raise SourceError(f"{self.name}: is in Fortran order; save numpy.ascontiguousarray of it")


def _read_header(file):
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version in ((2, 0), (3, 0)):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the format is unknown")
