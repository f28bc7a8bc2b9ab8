"""What every source of numbers on disk has in common.

A source has ``shape`` and ``dtype``, and gives its elements piece by piece in C order: `Source.block`. Flat elements
suit every format and every number of axes: whole rows of logits are a block whose ends are multiples of V, targets of
any shape are a block of as many elements. Pieces are taken mostly in ascending order, and a source may be slow
otherwise. Nothing is believed beyond what the file holds, and no pickle is ever loaded.
"""

import contextlib
import importlib
import math
from pathlib import Path

import numpy as np

_AXES = 64  # as many as NumPy's arrays have
_LARGEST = 1 << 50  # bytes: some file systems let a file of nothing claim more


class SourceError(ValueError):
    """An input that cannot be read as what it should be; the message names the file and the reason."""


class Source(contextlib.AbstractContextManager):
    """An array on disk.

    Attributes
    ----------
    name : str
        What messages call it.
    shape : tuple of int
    dtype : dtype
    piece_bytes : int
        Memory that the smallest piece takes while it is decoded, beside the block it becomes; 0 for what is mapped.
    mapped : bool
        Whether blocks are memory maps, which take no memory of the process.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _stamp: list
    piece_bytes = 0
    mapped = False

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order, one-dimensional and not to be written.

        Raises
        ------
        SourceError
            If they can no longer be read, or the file is not the one that was opened.
        """
        raise NotImplementedError

    def stamp(self):
        """What tells the files behind this source from changed ones: a list of JSON values."""
        raise NotImplementedError

    def check_unchanged(self):
        """The files are still those that were opened, or a SourceError says which is not; even after `close`."""
        if self.stamp() != self._stamp:
            raise SourceError(f"{self.name}: changed while it was read")

    def paths(self):
        """The local files and folders behind this source."""
        raise NotImplementedError

    def close(self):
        """Give back what is open; blocks already taken stay."""

    def __exit__(self, kind, error, trace):
        self.close()

    def read_as(self, dtype):
        """Take the elements for ``dtype``, which their file cannot name."""
        if self.dtype == dtype:
            return
        if self.dtype.names or self.dtype.kind not in "Vui" or self.dtype.itemsize != dtype.itemsize:
            raise SourceError(f"{self.name}: holds {self.dtype}, which cannot be read as {dtype}")
        self.dtype = dtype


def stamp_of(path):
    """Path, size and time of change of a local file."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    return [str(Path(path).absolute()), status.st_size, status.st_mtime_ns]


def check_claim(name, shape, dtype):
    """A SourceError where no file holds an array of this ``shape`` and ``dtype``: a header is not believed."""
    whole = all(type(size) is int and size >= 0 for size in shape)
    if not whole or len(shape) > _AXES or not dtype.itemsize or dtype.subdtype:
        raise SourceError(f"{name}: claims a shape of {shape!r:.80} and {dtype}, which no array has")
    claimed = math.prod(max(1, size) for size in shape) * dtype.itemsize
    if claimed > _LARGEST:
        raise SourceError(f"{name}: claims {shape!r:.80} of {dtype}, {claimed:,} bytes; at most {_LARGEST:,} are read")


def package(name, what):
    """The optional package ``name``, or a SourceError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(
            f"{what}: needs the package {name.partition('.')[0]}, which pip install fastxent[io] brings ({error})"
        ) from error


def line(error):
    """An exception's message on one line."""
    return plain(" ".join(str(error).split())) or type(error).__name__


def plain(name):
    """What a file says, as a message has it: characters that speak to a terminal, or end a line, are spelled out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def pick(name, wanted, names, what):
    """The one of ``names`` that a file's ``::NAME`` asks for; the only one where it asks for none."""
    known = ", ".join(map(plain, names))
    if wanted is None:
        if len(names) == 1:
            return names[0]
        if not names:
            raise SourceError(f"{name}: holds no {what}")
        raise SourceError(f"{name}: holds {len(names)} {what}s; pick one with {name}::NAME, one of {known}")
    if wanted not in names:
        raise SourceError(f"{name}: has no {what} {wanted!r}, but {known or 'none'}")
    return wanted
