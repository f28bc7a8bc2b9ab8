"""Rows that are on the device already: the verbs take them in place of arrays, and neither copy nor gather them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastxent.backends.cuda.arrays import in_line


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """``rows`` x ``classes`` numbers of ``dtype`` from ``address`` on, ``stride`` numbers from row to row.

    ``owner`` is held so that the memory stays. What they hold, and what is written to them, is complete before a verb
    begins and when it returns: a verb waits for the device.
    """

    address: int
    rows: int
    classes: int
    stride: int
    dtype: np.dtype
    owner: Any = None

    @property
    def shape(self):
        """As of an array."""
        return self.rows, self.classes

    @property
    def end(self):
        """Where the last of them ends."""
        last = self.address + (self.rows - 1) * self.stride * self.dtype.itemsize
        return last + self.classes * self.dtype.itemsize if self.rows else self.address

    def __len__(self):
        return self.rows

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.rows)
        address = self.address + start * self.stride * self.dtype.itemsize
        return DeviceRows(address, stop - start, self.classes, self.stride, self.dtype, self.owner)


def as_rows(view):
    """`DeviceRows` of a `fastxent.backends.cuda.arrays.View` of an array (..., V).

    Raises
    ------
    ValueError
        If the classes do not lie side by side, the rows not at one distance, or a number at no multiple of its size.
    """
    classes, each, rows = view.shape[-1], view.dtype.itemsize, math.prod(view.shape[:-1])
    if rows and classes > 1 and view.steps[-1] != each:
        raise ValueError("the classes of rows on a device must lie side by side")
    apart = in_line(view._replace(shape=view.shape[:-1], steps=view.steps[:-1]), "rows") if rows > 1 else classes * each
    if apart % each or apart < classes * each:
        raise ValueError("rows on a device must lie one after the other, whole numbers apart")
    if view.address % each:
        raise ValueError(f"rows on a device must begin at a multiple of {each} bytes; got address {view.address}")
    return DeviceRows(view.address, rows, classes, apart // each, view.dtype)


def lies_in_rows(view):
    """Whether `as_rows` takes it."""
    try:
        as_rows(view)
    except ValueError:
        return False
    return True


def rows_of(array, stream):
    """`DeviceRows` of anything with DLPack or the CUDA array interface, ready for a stream of cuda.core.

    Raises
    ------
    TypeError
        If it is not two-dimensional, on a device, and with the classes side by side.
    """
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_any_interface(array, stream_ptr=int(stream.handle))
    if not view.is_device_accessible:
        raise TypeError("the array is not on a device")
    if view.device_id > 0:
        raise NotImplementedError(f"arrays must be on the first GPU, not on GPU {view.device_id}")
    if len(view.shape) != 2:
        raise TypeError(f"rows on a device must have two dimensions, not shape {tuple(view.shape)}")
    rows, classes = view.shape
    stride, step = view.strides or (classes, 1)
    if step != 1 and classes > 1:
        raise TypeError("the classes of rows on a device must lie side by side")
    return DeviceRows(view.ptr, rows, classes, stride, np.dtype(view.dtype), array)
