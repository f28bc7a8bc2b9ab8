"""Arrays in zarr stores, local or behind any URL that fsspec knows.

zarr reads a chunk that is not there as its fill value, so a store that goes away would read as zeros: every block is
followed by a look whether the array's own metadata is still there and the same.
"""

import hashlib
import math
from pathlib import Path

import numpy as np

from fastxent.io.source import Source, SourceError, check_claim, line, package, pick, plain

_REQUEST = 8 << 20  # bytes asked for at a time, where chunks are smaller


class ZarrSource(Source):
    """An array of a zarr store: the store's own, or the one at the path ``array`` in its group.

    Chunks are decoded whole, and what was decoded last is kept for the next block, so each chunk is decoded once where
    rows are chunked along the last of their axes only.
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
        check_claim(self.name, self.shape, self.dtype)
        check_claim(f"{self.name}: a chunk", self._chunks, self.dtype)
        if 0 in self._chunks:
            raise SourceError(f"{self.name}: claims chunks of shape {self._chunks}, which hold nothing")
        self._kept: tuple[tuple[int, ...], int, np.ndarray] = (), 0, np.empty(0)
        self.piece_bytes = self._memory_of_a_request()
        self._stamp = self.stamp()

    def _memory_of_a_request(self):
        """The rows of a chunk, and what a request takes while its chunks are raw and decoded."""
        chunk = math.prod(self._chunks) * self.dtype.itemsize
        rows = self._chunks[-2] * self.shape[-1] * self.dtype.itemsize if len(self.shape) > 1 else chunk
        return max(_REQUEST, rows) + 4 * max(_REQUEST, chunk)

    def _open(self, wanted):
        found = self._library.open(self._path, mode="r")
        if isinstance(found, self._library.Array):
            if wanted is not None:
                raise SourceError(f"{self.name}: is an array itself; there is no {wanted!r} in it")
            return found
        names = [wanted] if wanted is not None and "/" in wanted else sorted(name for name, _ in found.arrays())
        chosen = pick(self.name, wanted, names, "array")
        self.name = f"{self._path}::{plain(chosen)}"
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
        found, filled = np.empty(stop - start, self._array.dtype), 0
        limit = _REQUEST // self.dtype.itemsize
        try:
            for index, first, last in _boxes(self.shape, start, stop, limit):
                for rows in self._rows(index, first, last):
                    found[filled : filled + rows.size] = rows.reshape(-1)
                    filled += rows.size
        except Exception as error:
            raise SourceError(f"{self.name}: cannot be read: {line(error)}") from error
        self.check_unchanged()
        return found.view(self.dtype)

    def _rows(self, index, start, stop):
        """``array[index][start:stop]`` piece by piece, from whole chunks."""
        axis = len(index)
        if axis == len(self.shape):
            yield np.asarray(self._array[index])
            return
        size = self._chunks[axis]
        row = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        if size * row < _REQUEST:
            size *= _REQUEST // (size * max(1, row))
        elif axis < len(self.shape) - 2:
            size = 1  # chunks of several sequences: one at a time, each decoded again
        while start < stop:
            place, first, kept = self._kept
            if place != index or not first <= start < first + len(kept):
                del kept
                self._kept = (), 0, np.empty(0)  # before the next is there
                first = start // size * size
                kept = self._decode((*index, slice(first, min(first + size, self.shape[axis]))))
                self._kept = index, first, kept
            rows = kept[start - first : stop - first]
            yield rows
            start += len(rows)

    def _decode(self, index):
        """``array[index]``, rows of classes by some columns of chunks at a time."""
        if len(index) != len(self.shape) - 1:
            return self._array[index]
        found = np.empty((index[-1].stop - index[-1].start, self.shape[-1]), self._array.dtype)
        width = max(1, _REQUEST // (len(found) * self._chunks[-1] * self.dtype.itemsize)) * self._chunks[-1]
        for start in range(0, self.shape[-1], width):
            found[:, start : start + width] = self._array[(*index, slice(start, start + width))]
        return found


def _digest(metadata):
    return hashlib.sha256(repr(metadata).encode()).hexdigest()[:16]


def _boxes(shape, start, stop, limit, index=()):
    """``index, start, stop`` on the axis after ``index``: few boxes that are flat elements ``start`` to ``stop``.

    Along the axes before the last two, only what has at most ``limit`` elements is taken whole.
    """
    if start == stop:
        return
    if not shape:
        yield index, 0, 1
        return
    inner = math.prod(shape[1:])
    whole = len(shape) <= 2 or inner <= limit
    while start < stop:
        first, begun = divmod(start, inner)
        end = min(stop, (first + 1) * inner)
        if whole and not begun and stop - start >= inner:
            end = stop // inner * inner
            yield index, first, end // inner
        else:
            yield from _boxes(shape[1:], begun, end - first * inner, limit, (*index, first))
        start = end
