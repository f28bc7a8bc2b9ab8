"""Copies between arrays of any strides: how rows that no kernel reads as they lie get into a buffer and out of one.

Classes along the first axis are the case that counts: sixteen by sixteen elements are transposed in registers.
"""

import functools
import itertools

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from fastxent.backends.cpu.formulas import compiled
from fastxent.backends.cpu.memory import transposed
from fastxent.backends.cpu.twins import Twins
from fastxent.backends.cpu.vector import LANES, call

_SPAN = 128  # elements of an axis that a task visits at each step of the other: a page is opened for several lines
_RUN = 1 << 16  # elements up to which neighbouring axes are seen as one: what is left is work for every thread


@intrinsic
def _copy_tile(typing, source, source_step, destination, destination_step, unit):
    """Sixteen by sixteen elements from one address to another, transposed: rows ``step`` bytes apart."""
    address = types.int64

    def lower(context, builder, sig, args):
        element = context.get_value_type(unit)
        pointer = ir.VectorType(element, LANES).as_pointer()

        def rows(start, step):
            for lane in range(LANES):
                yield builder.inttoptr(builder.add(start, builder.mul(step, step.type(lane))), pointer)

        vectors = []
        for row in rows(args[0], args[1]):
            vectors.append(value := builder.load(row))
            value.align = unit.bitwidth // 8
        for value, row in zip(transposed(builder, vectors), rows(args[2], args[3]), strict=True):
            builder.store(value, row).align = unit.bitwidth // 8
        return context.get_dummy_value()

    return types.void(address, address, address, address, unit), lower


@intrinsic
def _elements(typing, address, count, unit):
    """The ``count`` elements from ``address`` on as an array."""
    kind = types.Array(unit, 1, "C")

    def lower(context, builder, sig, args):
        array = context.make_array(kind)(context, builder)
        data = builder.inttoptr(args[0], context.get_data_type(unit).as_pointer())
        step = context.get_constant(types.intp, unit.bitwidth // 8)
        context.populate_array(array, data=data, shape=[args[1]], strides=[step], itemsize=step, meminfo=None)
        return array._getvalue()

    return kind(types.int64, types.int64, unit), lower


@intrinsic
def _swapped(typing, value):
    """The bytes of a whole number the other way round."""

    def lower(context, builder, sig, args):
        if value.bitwidth == 8:
            return args[0]
        return call(builder, f"llvm.bswap.i{value.bitwidth}", args[0].type, args)

    return value(value), lower


@compiled
def _copy_line(source, destination, axis, swap, unit, size):
    """The elements along an axis; the first two loops are packed."""
    count, source_step, destination_step = axis
    if abs(source_step) == size and destination_step == size:
        first = source if source_step > 0 else source - (count - 1) * size
        read, written = _elements(first, count, unit), _elements(destination, count, unit)
        if source_step > 0:
            for i in range(count):
                written[i] = _swapped(read[i]) if swap else read[i]
        else:
            for i in range(count):
                written[i] = _swapped(read[count - 1 - i]) if swap else read[count - 1 - i]
        return
    for i in range(count):
        value = _elements(source + i * source_step, 1, unit)[0]
        _elements(destination + i * destination_step, 1, unit)[0] = _swapped(value) if swap else value


@compiled
def _copy_tiles(source, destination, rows, columns, start, stop, unit):
    """Rows ``start`` to ``stop``, whose elements lie side by side in the source and columns in the destination; what is
    left at an end is covered by a tile that overlaps the one before.
    """
    for step in range(0, columns[0], LANES):
        column = min(step, columns[0] - LANES)
        for group in range(start, stop, LANES):
            row = min(group, rows[0] - LANES)
            _copy_tile(
                source + row * rows[1] + column * columns[1], columns[1],
                destination + row * rows[2] + column * columns[2], rows[2], unit,
            )  # fmt: skip


def copy_axes(source, destination, outer, rows, columns, swap, unit, size):
    """Three axes of elements like ``unit``, ``size`` bytes each, from one address to another.

    An axis is its length and the bytes from an element to the next in the source and in the destination.
    """
    spans = (rows[0] + _SPAN - 1) // _SPAN
    tiled = rows[1] == size and columns[2] == size and min(rows[0], columns[0]) >= LANES and not swap
    for task in prange(outer[0] * spans):
        i, start = task // spans, task % spans * _SPAN
        stop = min(rows[0], start + _SPAN)
        from_, to = source + i * outer[1], destination + i * outer[2]
        if tiled:
            _copy_tiles(from_, to, rows, columns, start, stop, unit)
        else:
            for row in range(start, stop):
                _copy_line(from_ + row * rows[1], to + row * rows[2], columns, swap, unit, size)


KERNEL = Twins(copy_axes)
_UNITS = {size: np.dtype(f"u{size}").type(0) for size in (1, 2, 4, 8)}


def copy(source, destination):
    """Write ``source`` to ``destination``, arrays of one shape and, but for the order of bytes, of one dtype.

    They must not overlap.
    """
    if not source.size:
        return
    if not (source.flags.aligned and destination.flags.aligned):
        destination[...] = source
        return
    size = source.dtype.itemsize
    swap = size > 1 and source.dtype.isnative != destination.dtype.isnative
    *others, columns = _axes(source.shape, source.strides, destination.strides)
    rows, outer, *rest = *sorted(others, key=lambda axis: abs(axis[1])), _ONE, _ONE
    start, end = (array.__array_interface__["data"][0] for array in (source, destination))
    for from_, to in _corners(start, end, [axis for axis in rest if axis is not _ONE]):
        KERNEL(source.size, from_, to, outer, rows, columns, swap, _UNITS[size], size)


_ONE = (1, 0, 0)


@functools.lru_cache
def _axes(shape, source_strides, destination_strides):
    """Length and steps of each axis, neighbours that are one in both arrays as one; the destination's closest last."""
    axes = [axis for axis in zip(shape, source_strides, destination_strides, strict=True) if axis[0] > 1]
    axes.sort(key=lambda axis: -abs(axis[2]))
    merged = axes[:1] or [_ONE]
    for axis in axes[1:]:
        count, *steps = merged[-1]
        if steps == [axis[0] * step for step in axis[1:]] and count * axis[0] <= _RUN:
            merged[-1] = (count * axis[0], *axis[1:])
        else:
            merged.append(axis)
    return merged


def _corners(source, destination, axes):
    """The addresses in both arrays of every element along ``axes``."""
    for place in itertools.product(*(range(count) for count, _, _ in axes)):
        yield (
            source + sum(i * axis[1] for i, axis in zip(place, axes, strict=True)),
            destination + sum(i * axis[2] for i, axis in zip(place, axes, strict=True)),
        )
