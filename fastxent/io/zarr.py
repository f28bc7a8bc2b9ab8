"""Arrays in zarr stores, local or behind any URL that fsspec knows.

zarr reads a chunk that is not there as its fill value, so a store that goes away would read as zeros: every block is
followed by a look whether the array's own metadata is still there and the same.
"""

import hashlib
import math
from pathlib import Path

import numpy as np

from fastxent.io.source import Source, SourceError, line, package, pick


class ZarrSource(Source):
    """An array of a zarr store: the store's own, or the one at the path ``array`` in its group.

    Chunks are decoded whole. A block that ends within a chunk of rows keeps these rows for the next block, so each
    chunk is decoded once where rows are chunked along the last of their axes.
    """

    def __init__(self, path, array=None):
        self.name = self._path = str(path)
        self._library = package("zarr", self.name)
        try:
            self._array = self._open(array)
        except SourceError:
            raise
        except Exception as error:  # a store fails as its own library does: files, HTTP, clouds
            raise SourceError(f"{self.name}: not a readable zarr array: {line(error)}") from error
        self.shape, self.dtype = self._array.shape, self._array.dtype
        self._chunks = self._array.chunks
        self._kept = (), 0, np.empty(0)
        slab = (self._chunks[-2] * self.shape[-1],) if len(self.shape) > 1 else self._chunks
        self.piece_bytes = (math.prod(self._chunks) + math.prod(slab)) * self.dtype.itemsize
        self._stamp = self.stamp()

    def _open(self, wanted):
        found = self._library.open(self._path, mode="r")
        if isinstance(found, self._library.Array):
            if wanted is not None:
                raise SourceError(f"{self.name}: is an array itself; there is no {wanted!r} in it")
            return found
        names = [wanted] if wanted is not None and "/" in wanted else sorted(name for name, _ in found.arrays())
        chosen = pick(self.name, wanted, names, "array")
        self.name = f"{self._path}::{chosen}"
        if not isinstance(found[chosen], self._library.Array):
            raise SourceError(f"{self.name}: is a group, not an array")
        return found[chosen]

    def paths(self):
        """The store's folder, if it is local."""
        return [] if "://" in self._path else [Path(self._path)]

    def stamp(self):
        """Metadata; and of a local store the number of files, their bytes and the newest time of change."""
        files = [file.stat() for path in self.paths() for file in path.rglob("*") if file.is_file()]
        newest = max((status.st_mtime_ns for status in files), default=0)
        return [self.name, _digest(self._array.metadata), len(files), sum(status.st_size for status in files), newest]

    def check_unchanged(self):
        """Raise a SourceError if the array is no longer there, or another."""
        try:
            number = self._array.metadata.zarr_format
            metadata = self._library.open_array(self._array.store_path, mode="r", zarr_format=number).metadata
        except Exception as error:
            raise SourceError(f"{self.name}: can no longer be read: {line(error)}") from error
        if _digest(metadata) != self._stamp[1]:
            raise SourceError(f"{self.name}: changed while it was read")

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order, decoded."""
        try:
            pieces = [self._rows(*box) for box in _boxes(self.shape, start, stop)]
        except Exception as error:
            raise SourceError(f"{self.name}: cannot be read: {line(error)}") from error
        self.check_unchanged()
        flat = [np.ascontiguousarray(piece).reshape(-1) for piece in pieces] or [np.empty(0, self._array.dtype)]
        return (flat[0] if len(flat) == 1 else np.concatenate(flat)).view(self.dtype)

    def _rows(self, index, start, stop):
        """``array[index][start:stop]``; of a chunk begun on the last axis but one, what is left is kept."""
        axis = len(index)
        if axis == len(self.shape):
            return self._array[index]
        last_rows = axis >= len(self.shape) - 2
        size = self._chunks[axis] if last_rows else 1
        place, first, kept = self._kept
        found = []
        if place == index and first <= start < first + len(kept):
            found.append(kept[start - first : stop - first])
            start += len(found[0])
        whole = stop if stop == self.shape[axis] else stop // size * size
        if start < whole:
            found.append(self._array[(*index, slice(start, whole))])
            start = whole
        if start < stop:
            kept = self._array[(*index, slice(whole, min(whole + size, self.shape[axis])))]
            self._kept = index, whole, kept
            found.append(kept[start - whole : stop - whole])
        return found[0] if len(found) == 1 else np.concatenate(found)


def _digest(metadata):
    return hashlib.sha256(repr(metadata).encode()).hexdigest()[:16]


def _boxes(shape, start, stop, index=()):
    """``index, start, stop`` on the axis after ``index``: few boxes that are flat elements ``start`` to ``stop``."""
    if start == stop:
        return
    if not shape:
        yield index, 0, 1
        return
    inner = math.prod(shape[1:])
    low, high = -(-start // inner), stop // inner
    if low > high:
        yield from _boxes(shape[1:], start - high * inner, stop - high * inner, (*index, high))
        return
    yield from _boxes(shape[1:], start - (low - 1) * inner, inner, (*index, low - 1)) if start < low * inner else ()
    if low < high:
        yield index, low, high
    yield from _boxes(shape[1:], 0, stop - high * inner, (*index, high)) if high * inner < stop else ()
