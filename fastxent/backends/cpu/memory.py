"""Vectors to and from memory: whole, masked, a column of a matrix, and a hint of what comes next.

Lanes outside a row are read as a given fill and never written, so a ragged tail needs no padding. What is stored in a
format that Numba does not know is decoded on the way in and encoded on the way out (`formats`).
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastxent.backends.cpu.formats import decode, encode, real
from fastxent.backends.cpu.vector import INT32, LANES, Vector, call, cast, splat, suffix


def _address(context, builder, kind, args):
    """Where ``array[index]`` lies, ``args`` beginning with the two."""
    data = context.make_array(kind)(context, builder, args[0]).data
    pointer = builder.gep(data, [args[1]], inbounds=True)
    return builder.bitcast(pointer, context.get_value_type(Vector(kind.dtype)).as_pointer())


def _encoded(builder, value, kind, array):
    """``value`` as the array stores it."""
    return encode(builder, cast(builder, value, kind, Vector(real(array.dtype))), array.dtype)


def _mask(builder, count, but):
    """Lanes below ``count`` except lane ``but`` (-1 for none)."""
    lane = ir.Constant(ir.VectorType(INT32, LANES), list(range(LANES)))
    inside = builder.icmp_signed("<", lane, splat(builder, builder.trunc(count, INT32)))
    if but is None:
        return inside
    return builder.and_(inside, builder.icmp_signed("!=", lane, splat(builder, builder.trunc(but, INT32))))


@intrinsic
def load(typing, array, index):
    """Sixteen numbers from ``array[index]`` on; any alignment of whole numbers."""

    def lower(context, builder, sig, args):
        value = builder.load(_address(context, builder, array, args))
        value.align = array.dtype.bitwidth // 8
        return decode(builder, value, array.dtype)

    return Vector(real(array.dtype))(array, index), lower


@intrinsic
def load_some(typing, array, index, count, but, fill):
    """As `load`, but lanes from ``count`` on and lane ``but`` are not read: they hold ``fill``."""
    stored, vector = Vector(array.dtype), Vector(real(array.dtype))

    def lower(context, builder, sig, args):
        address, mask = _address(context, builder, array, args), _mask(builder, args[2], args[3])
        filled = splat(builder, context.cast(builder, args[4], fill, vector.element))
        nothing = filled if stored == vector else ir.Constant(context.get_value_type(stored), None)
        arguments = [address, INT32(array.dtype.bitwidth // 8), mask, nothing]
        value = call(builder, f"llvm.masked.load.{suffix(stored)}.p0", nothing.type, arguments)
        return value if stored == vector else builder.select(mask, decode(builder, value, array.dtype), filled)

    return vector(array, index, types.int64, types.int64, fill), lower


@intrinsic
def load_column(typing, matrix, row, column, last):
    """Sixteen numbers of a column of a C-contiguous matrix from ``row`` on; rows after ``last`` repeat it."""
    stored, vector = Vector(matrix.dtype), Vector(real(matrix.dtype))

    def lower(context, builder, sig, args):
        value = context.make_array(matrix)(context, builder, args[0])
        width = builder.extract_value(value.shape, 1)
        lanes = ir.Constant(context.get_value_type(stored), ir.Undefined)
        for lane in range(LANES):
            at = builder.add(args[1], args[1].type(lane))
            at = builder.select(builder.icmp_signed("<", at, args[3]), at, args[3])
            element = builder.load(builder.gep(value.data, [builder.add(builder.mul(at, width), args[2])]))
            lanes = builder.insert_element(lanes, element, INT32(lane))
        return decode(builder, lanes, matrix.dtype)

    return vector(matrix, types.intp, types.intp, types.intp), lower


@intrinsic
def store_column(typing, matrix, row, column, last, value):
    """Write a column of a C-contiguous matrix from ``row`` to ``last``."""

    def lower(context, builder, sig, args):
        target = context.make_array(matrix)(context, builder, args[0])
        width = builder.extract_value(target.shape, 1)
        lanes = _encoded(builder, args[4], value, matrix)
        for lane in range(LANES):
            at = builder.add(args[1], args[1].type(lane))
            with builder.if_then(builder.icmp_signed("<=", at, args[3])):
                element = builder.extract_element(lanes, INT32(lane))
                builder.store(element, builder.gep(target.data, [builder.add(builder.mul(at, width), args[2])]))
        return context.get_dummy_value()

    return types.void(matrix, types.intp, types.intp, types.intp, value), lower


@intrinsic
def store(typing, array, index, value):
    """Write sixteen numbers from ``array[index]`` on."""

    def lower(context, builder, sig, args):
        lanes = _encoded(builder, args[2], value, array)
        instruction = builder.store(lanes, _address(context, builder, array, args))
        instruction.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, index, value), lower


@intrinsic
def store_some(typing, array, index, count, value):
    """Write the lanes below ``count``."""

    def lower(context, builder, sig, args):
        lanes = _encoded(builder, args[3], value, array)
        align = INT32(array.dtype.bitwidth // 8)
        arguments = [lanes, _address(context, builder, array, args), align, _mask(builder, args[2], None)]
        call(builder, f"llvm.masked.store.{suffix(Vector(array.dtype))}.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(array, index, types.int64, value), lower


@intrinsic
def store_one(typing, array, index, value):
    """``array[index] = value``, rounded to what the kernels compute with and then as it is stored.

    Not a masked store of one lane: LLVM 22 makes that a store of all bits from before the encoding's truncation.
    """

    def lower(context, builder, sig, args):
        element = context.cast(builder, args[2], value, real(array.dtype))
        lanes = encode(builder, splat(builder, element), array.dtype)
        data = context.make_array(array)(context, builder, args[0]).data
        builder.store(builder.extract_element(lanes, INT32(0)), builder.gep(data, [args[1]], inbounds=True))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), lower


@intrinsic
def prefetch(typing, array, index):
    """Ask for the cache line of ``array[index]``, which may lie beyond the array: nothing waits, nothing faults."""

    def lower(context, builder, sig, args):
        address = _address(context, builder, array, args)
        to_read, to_second_cache, data = INT32(0), INT32(2), INT32(1)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, to_read, to_second_cache, data])
        return context.get_dummy_value()

    return types.void(array, index), lower
