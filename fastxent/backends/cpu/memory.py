"""Vectors to and from memory: whole, masked, sixteen rows at once, and a hint of what comes next.

Lanes outside a row are read as a given fill and never written, so a ragged tail needs no padding. What is stored in a
format that Numba does not know is decoded on the way in and encoded on the way out (`formats`).
"""

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from fastxent.backends.cpu.formats import decode, encode, real
from fastxent.backends.cpu.vector import INT32, LANES, Vector, call, cast, splat, suffix


def _address(context, builder, kind, args):
    """Where ``array[index]`` lies, ``args`` beginning with the two."""
    if kind.layout != "C":
        raise TypingError(f"vectors lie in C-contiguous arrays, not in {kind}")
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
def some_lanes(typing, value, count, but):
    """``value`` in the lanes below ``count`` except lane ``but``, 0 in the others."""

    def lower(context, builder, sig, args):
        lanes = splat(builder, args[0])
        return builder.select(_mask(builder, args[1], args[2]), lanes, ir.Constant(lanes.type, None))

    return Vector(value)(value, types.int64, types.int64), lower


def on_stack(size):
    """A function of an array that gives ``size`` numbers on the stack, of the type kernels compute with for it."""

    @intrinsic
    def scratch(typing, like):
        kind = types.Array(real(like.dtype), 1, "C")

        def lower(context, builder, sig, args):
            element, width = context.get_value_type(kind.dtype), kind.dtype.bitwidth // 8
            with builder.goto_entry_block():
                space = builder.alloca(ir.ArrayType(element, size))  # cgutils.alloca_once would fill it with zeros
            space.align = 64
            array, data = context.make_array(kind)(context, builder), builder.bitcast(space, element.as_pointer())
            shape, strides = ([context.get_constant(types.intp, number)] for number in (size, width))
            context.populate_array(array, data=data, shape=shape, strides=strides, itemsize=strides[0], meminfo=None)
            return array._getvalue()

        return kind(like), lower

    return scratch


@intrinsic
def read_only(typing, array):
    """The same array as one that cannot be written: the kind that logits are, for which functions are compiled."""
    return array.copy(readonly=True)(array), lambda context, builder, sig, args: args[0]


@intrinsic
def row_of(typing, matrix, i, classes):
    """The first ``classes`` elements of row ``i``: what lies between them and the next row is never touched."""
    kind = types.Array(matrix.dtype, 1, "C", readonly=not matrix.mutable)

    def lower(context, builder, sig, args):
        source = context.make_array(matrix)(context, builder, args[0])
        start = builder.mul(args[1], builder.extract_value(source.shape, 1))
        array, data = context.make_array(kind)(context, builder), builder.gep(source.data, [start], inbounds=True)
        width = context.get_constant(types.intp, matrix.dtype.bitwidth // 8)
        context.populate_array(array, data=data, shape=[args[2]], strides=[width], itemsize=width, meminfo=None)
        return array._getvalue()

    return kind(matrix, i, types.int64), lower


_QUARTERS = range(0, LANES, 4)
# Steps of a transposition: how far the other vector of a pair is, and what becomes of lanes a (0 to 15) and b (16 to
# 31) of the two. Numbers, then pairs of them, are interleaved within each quarter, then quarters are exchanged: the
# shuffles that x86 has for two registers, without masks.
_STEPS = {
    1: [[lane for q in _QUARTERS for lane in (q + i, 16 + q + i, q + i + 1, 17 + q + i)] for i in (0, 2)],
    2: [[lane for q in _QUARTERS for lane in (q + i, q + i + 1, 16 + q + i, 17 + q + i)] for i in (0, 2)],
    4: [[lane for q in (i, i + 8) for start in (q, 16 + q) for lane in range(start, start + 4)] for i in (0, 4)],
    8: [[lane for start in (i, 16 + i) for lane in range(start, start + 8)] for i in (0, 8)],
}


def transposed(builder, vectors):
    """Sixteen vectors, the rows of a matrix -> its columns."""
    for distance, choices in _STEPS.items():
        low, high = (ir.Constant(ir.VectorType(INT32, LANES), lanes) for lanes in choices)
        done = list(vectors)
        for i in range(LANES):
            if not i & distance:
                pair = vectors[i], vectors[i + distance]
                done[i], done[i + distance] = builder.shuffle_vector(*pair, low), builder.shuffle_vector(*pair, high)
        vectors = done
    return [vectors[i & ~3 | (i & 1) << 1 | (i & 2) >> 1] for i in range(LANES)]


def _rows_of_tile(context, builder, kind, args):
    """For each of sixteen rows of a C-contiguous matrix, from the row and column in ``args`` on, whether it comes after
    the last, and the address of its sixteen classes; rows after the last repeat it.
    """
    matrix = context.make_array(kind)(context, builder, args[0])
    width = builder.extract_value(matrix.shape, 1)
    for lane in range(LANES):
        row = builder.add(args[1], args[1].type(lane))
        inside = builder.icmp_signed("<=", row, args[3])
        at = builder.add(builder.mul(builder.select(inside, row, args[3]), width), args[2])
        pointer = builder.gep(matrix.data, [at], inbounds=True)
        yield inside, builder.bitcast(pointer, context.get_value_type(Vector(kind.dtype)).as_pointer())


def _classes_of_tile(context, builder, kind, args):
    matrix = context.make_array(kind)(context, builder, args[0])
    return _mask(builder, builder.sub(builder.extract_value(matrix.shape, 1), args[2]), None)


def _addresses_in(context, builder, kind, array, index):
    """Where sixteen vectors lie, one after another, from ``array[index]`` on."""
    for lane in range(LANES):
        yield _address(context, builder, kind, [array, builder.add(index, index.type(LANES * lane))])


@intrinsic
def load_tile(typing, matrix, row, column, last, tile):
    """Sixteen rows by sixteen classes of a C-contiguous matrix, written to ``tile`` class by class, as many lanes each.

    Class ``column`` goes to tile[16 column:]; rows after ``last`` repeat it, classes that do not exist are anything.
    """
    stored = Vector(matrix.dtype)

    def lower(context, builder, sig, args):
        mask, rows = _classes_of_tile(context, builder, matrix, args), []
        nothing = ir.Constant(context.get_value_type(stored), None)
        for _, address in _rows_of_tile(context, builder, matrix, args):
            arguments = [address, INT32(matrix.dtype.bitwidth // 8), mask, nothing]
            value = call(builder, f"llvm.masked.load.{suffix(stored)}.p0", nothing.type, arguments)
            rows.append(decode(builder, value, matrix.dtype))
        index = builder.mul(args[2], args[2].type(LANES))
        addresses = _addresses_in(context, builder, tile, args[4], index)
        for column_of_rows, address in zip(transposed(builder, rows), addresses, strict=True):
            builder.store(column_of_rows, address).align = tile.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(matrix, types.intp, types.intp, types.intp, tile), lower


@intrinsic
def store_tile(typing, matrix, row, column, last, tile):
    """The way back of `load_tile`; rows after ``last`` and classes that do not exist are not written."""

    def lower(context, builder, sig, args):
        mask, columns = _classes_of_tile(context, builder, matrix, args), []
        index = builder.mul(args[2], args[2].type(LANES))
        for address in _addresses_in(context, builder, tile, args[4], index):
            columns.append(value := builder.load(address))
            value.align = tile.dtype.bitwidth // 8
        destinations = _rows_of_tile(context, builder, matrix, args)
        for value, (inside, address) in zip(transposed(builder, columns), destinations, strict=True):
            lanes = _encoded(builder, value, Vector(tile.dtype), matrix)
            with builder.if_then(inside):
                arguments = [lanes, address, INT32(matrix.dtype.bitwidth // 8), mask]
                call(builder, f"llvm.masked.store.{suffix(Vector(matrix.dtype))}.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(matrix, types.intp, types.intp, types.intp, tile), lower


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
