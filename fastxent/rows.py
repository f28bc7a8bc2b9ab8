"""Arrays seen as rows of classes: as a view where there is one, else gathered and scattered slice by slice.

What stands here for an array has its ``shape`` (N, V), ``dtype``, length and slices; nothing is ever copied whole.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 1 << 19  # elements taken at a time where NumPy does the work: 4 MB of float64


class Rows:
    """An array (..., V) as rows (N, V) that are gathered or scattered when they are sliced, where no view exists.

    The last ``class_axes`` axes together are the classes.
    """

    def __init__(self, array, class_axes=1):
        self._array, self._batch, self._classes = array, array.shape[:-class_axes], array.shape[-class_axes:]
        self.shape, self.dtype = (math.prod(self._batch), math.prod(self._classes)), array.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        block = np.empty((stop - start, self.shape[1]), self.dtype)
        for view, place in self.boxes(rows):
            block[place].reshape(view.shape)[...] = view
        return block

    def __setitem__(self, rows, values):
        values = np.reshape(values, (-1, self.shape[1]))
        for view, place in self.boxes(rows):
            view[...] = values[place].reshape(view.shape)

    def take(self, rows):
        """A copy of some rows, an array of their indices."""
        return self._array[self._places(rows)].reshape(-1, self.shape[1])

    def together(self, lying):
        """How many rows at a time are a view of which ``lying`` is true; 0 if not even one is."""
        view, count = self._array, len(self)
        for length in self._batch:
            if not count or lying(view):
                break
            view, count = view[0], count // length
        return count if lying(view) else 0

    def points(self, ids):
        """The elements ``ids`` (N, k)."""
        return self._array[(*(place[:, None] for place in self._places(slice(None))), ids)]

    def put(self, rows, ids, values):
        """Write elements ``ids`` of ``rows``, all one-dimensional."""
        self._array[(*self._places(rows), ids)] = values

    def boxes(self, rows):
        """Views of the array that together are the slice ``rows``, each with its place in that slice."""
        start, stop, _ = rows.indices(len(self))
        done = 0
        for view in _cut(self._array, self._batch, start, stop):
            count = view.size // self.shape[1]
            yield view, slice(done, done + count)
            done += count

    def _places(self, rows):
        if not self._batch:
            return ()
        return np.unravel_index(np.arange(len(self))[rows], self._batch)


def _cut(array, batch, start, stop):
    """Views of the elements ``start`` to ``stop`` of the axes ``batch`` in C order: a box each, as large as can be."""
    if start == stop:
        return
    if (start, stop) == (0, math.prod(batch)):
        yield array
        return
    inner = math.prod(batch[1:])
    first, last = -(-start // inner), stop // inner
    if start < min(first * inner, stop):
        yield from _cut(
            array[first - 1], batch[1:], start - (first - 1) * inner, min(inner, stop - (first - 1) * inner)
        )
    if first < last:
        yield array[first:last]
    if max(last, first) * inner < stop:
        yield from _cut(array[last], batch[1:], 0, stop - last * inner)


class Masked:
    """Rows of logits with -inf where the rows of a mask are False, in a dtype that has it."""

    def __init__(self, logits, mask, dtype):
        self._logits, self._mask = logits, mask
        self.shape, self.dtype = logits.shape, dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return np.where(self._mask[rows], self._logits[rows].astype(self.dtype), self.dtype.type(-np.inf))


def classes_last(array, axis):
    """A view with the classes moved from ``axis`` to the end."""
    return array if axis in (-1, array.ndim - 1) else np.moveaxis(array, axis, -1)


def as_rows(array, class_axes=1):
    """An array (..., V) as a view (N, V), or as `Rows`; never a copy."""
    if array.ndim == 2 and class_axes == 1:
        return array
    if array.flags.c_contiguous:
        batch, classes = array.shape[: array.ndim - class_axes], array.shape[array.ndim - class_axes :]
        return array.reshape(math.prod(batch), math.prod(classes))
    return Rows(array, class_axes)


@dataclass(frozen=True, slots=True)
class AxisRows:
    """An array of logits, and its rows (N, V) over some of its axes: -inf where a mask leaves a logit out."""

    array: np.ndarray
    axes: tuple[int, ...]
    logits: Any
    mask: Any

    def like(self, array):
        """The rows of another array of this shape."""
        return as_rows(np.moveaxis(array, self.axes, range(-len(self.axes), 0)), len(self.axes))

    def reduced_shape(self, keepdims):
        """The shape with the axes summed over left out, or of length 1."""
        kept = [(1 if axis in self.axes else size) for axis, size in enumerate(self.array.shape)]
        return tuple(kept if keepdims else (size for axis, size in enumerate(kept) if axis not in self.axes))

    def blocks(self):
        """Slices of rows, some megabytes of logits each."""
        return row_blocks(self.logits)

    def where_kept(self, rows, values):
        """``values`` in float64, 0 where the mask leaves their logit out."""
        values = values.astype(np.float64)
        return values if self.mask is None else np.where(self.mask[rows], values, 0.0)


def pitch(view, classes):
    """How many elements the rows of ``classes`` of an array are apart, where each lies in C order, all at one distance,
    and none over another; None where they do not.
    """
    if view.flags.c_contiguous:
        return classes
    together, apart = 1, None
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size == 1:
            continue
        if together < classes:
            if stride != together * view.itemsize:
                return None
            together *= size
        elif apart is None:
            apart, count = stride, size
        elif stride != apart * count:
            return None
        else:
            count *= size
    if apart is None:
        return classes
    return None if apart % view.itemsize or apart < classes * view.itemsize else apart // view.itemsize


def boxes(rows, part):
    """Views of an array that together are the slice ``part`` of ``rows`` (N, V), each with its place in that slice."""
    if isinstance(rows, Rows):
        return rows.boxes(part)
    return [(view := rows[part], slice(0, len(view)))]


def row_blocks(rows):
    """Slices of rows (N, V), some megabytes each."""
    step = max(1, _BLOCK // rows.shape[1])
    return (slice(start, min(len(rows), start + step)) for start in range(0, len(rows), step))


def take(rows, which):
    """The rows of (N, V) that ``which`` names: a slice, as a view where there is one, or an array of indices."""
    return rows.take(which) if isinstance(rows, Rows) and not isinstance(which, slice) else rows[which]


def points(rows, ids):
    """The elements ``ids`` (N, k) of rows (N, V)."""
    if isinstance(rows, Rows):
        return rows.points(ids)
    return rows[np.arange(len(rows))[:, None], ids]


def put(rows, ids, values, where):
    """Write ``values`` (N, k) to the elements ``ids`` of rows (N, V) where ``where`` holds."""
    each, place = np.nonzero(where)
    ids, values = ids[each, place], values[each, place]
    if isinstance(rows, Rows):
        rows.put(each, ids, values)
    else:
        rows[each, ids] = values
