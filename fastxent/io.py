"""Sources and sinks of arrays on disk: .npy files read through short-lived memory maps, and files that appear whole.

Pickles are never loaded; a header is checked against the file's size before it is believed.
"""

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class SourceError(ValueError):
    """An input that cannot be read as what it should be; the message names the file and the reason."""


@dataclass(frozen=True, slots=True)
class NpySource:
    """An array in a .npy file, read piece by piece.

    Every piece is its own memory map, so the pages behind it are given back as soon as the piece is dropped; that
    costs about 2% over one long-lived map, where reading into a buffer costs several times as much.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @classmethod
    def open(cls, path):
        """Read the header of ``path``.

        Raises
        ------
        SourceError
            If it is missing, not a .npy file, holds Python objects, is in Fortran order, or is shorter than it says.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                shape, fortran, dtype = _read_header(file)
                offset, size = file.tell(), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        except (ValueError, EOFError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: not a readable .npy file: {error}") from error
        if dtype.hasobject:
            raise SourceError(f"{path}: holds pickled Python objects, which are never loaded")
        if fortran and len(shape) > 1:
            raise SourceError(f"{path}: is in Fortran order; save numpy.ascontiguousarray of it")
        source = cls(path, shape, dtype, offset)
        source._check_size(size)
        return source

    def _check_size(self, size):
        expected = self.offset + math.prod(self.shape) * self.dtype.itemsize
        if size < expected:
            raise SourceError(f"{self.path}: truncated: {size:,} bytes, where its header promises {expected:,}")

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order, a read-only memory map of their own.

        Raises
        ------
        SourceError
            If the file has vanished or become shorter since it was opened.
        """
        try:
            self._check_size(self.path.stat().st_size)
            return np.memmap(self.path, self.dtype, "r", self.offset + start * self.dtype.itemsize, (stop - start,))
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror or error}") from error


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
    removes it.
    """

    def __init__(self, path, dtype, rows):
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self._header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": rows}
        self._left = math.prod(rows)

    def __enter__(self):
        self._file = self.part.open("wb")
        np.lib.format.write_array_header_1_0(self._file, self._header)
        return self

    def append(self, records):
        """Write the next records."""
        self._left -= len(records)
        self._file.write(records.tobytes())

    def __exit__(self, kind, error, trace):
        try:
            with self._file:
                if error is None:
                    if self._left:
                        raise ValueError(f"{self.path}: {self._left} records were never written")
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if error is None:
                self.part.replace(self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.part.unlink()
