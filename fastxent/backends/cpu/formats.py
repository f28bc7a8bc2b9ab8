"""The number formats Numba has no type for: which integers stand for them, and the way to float32 and back.

float16, bfloat16 and the two float8 formats reach the kernels as integers of the same width, the pair of a width told
apart by the integer's sign. `memory` decodes what it loads and encodes what it stores, so the kernels see float32.
"""

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from fastxent.backends.cpu.vector import INT32, LANES, Vector, cast

STAND_INS = {
    np.dtype(np.float16): np.dtype(np.uint16),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.int16),
    np.dtype(ml_dtypes.float8_e4m3fn): np.dtype(np.uint8),
    np.dtype(ml_dtypes.float8_e5m2): np.dtype(np.int8),
}
_INT16 = ir.VectorType(ir.IntType(16), LANES)
_INT32 = ir.VectorType(INT32, LANES)
_HALF = ir.VectorType(ir.HalfType(), LANES)
_FLOAT = ir.VectorType(ir.FloatType(), LANES)


def viewed(array):
    """A view of ``array`` as the integers that stand for its dtype; the array itself where Numba knows the dtype."""
    stand_in = STAND_INS.get(array.dtype)
    return array if stand_in is None else array.view(stand_in)


def _all_lanes(kind, number):
    return ir.Constant(kind, [number] * LANES)


def _from_float16(builder, value):
    return builder.fpext(builder.bitcast(value, _HALF), _FLOAT)


def _from_bfloat16(builder, value):
    wide = builder.zext(value, _INT32)
    return builder.bitcast(builder.shl(wide, _all_lanes(_INT32, 16)), _FLOAT)


def _from_float8_e5m2(builder, value):
    """The upper half of a float16."""
    return _from_float16(builder, builder.shl(builder.zext(value, _INT16), _all_lanes(_INT16, 8)))


def _from_float8_e4m3fn(builder, value):
    """A float16 whose exponent is 8 too small; all ones is NaN, there is no infinity."""
    wide = builder.zext(value, _INT16)
    magnitude = builder.and_(wide, _all_lanes(_INT16, 0x7F))
    sign = builder.shl(builder.and_(wide, _all_lanes(_INT16, 0x80)), _all_lanes(_INT16, 8))
    half = builder.or_(sign, builder.shl(magnitude, _all_lanes(_INT16, 7)))
    number = builder.fmul(_from_float16(builder, half), _all_lanes(_FLOAT, 256.0))
    is_nan = builder.icmp_unsigned("==", magnitude, _all_lanes(_INT16, 0x7F))
    return builder.select(is_nan, _all_lanes(_FLOAT, float("nan")), number)


def _to_float16(builder, value):
    return builder.bitcast(builder.fptrunc(value, _HALF), _INT16)


def _to_bfloat16(builder, value):
    """To nearest, ties to even; adding that rounding to a NaN could carry it into infinity."""
    bits = builder.bitcast(value, _INT32)
    high = builder.lshr(bits, _all_lanes(_INT32, 16))
    odd = builder.and_(high, _all_lanes(_INT32, 1))
    rounded = builder.add(bits, builder.add(odd, _all_lanes(_INT32, 0x7FFF)))
    quiet = builder.or_(high, _all_lanes(_INT32, 0x40))
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, quiet, builder.lshr(rounded, _all_lanes(_INT32, 16)))
    return builder.trunc(chosen, _INT16)


_DECODE = {
    types.uint16: _from_float16,
    types.int16: _from_bfloat16,
    types.uint8: _from_float8_e4m3fn,
    types.int8: _from_float8_e5m2,
}
_ENCODE = {types.uint16: _to_float16, types.int16: _to_bfloat16}


def real(element):
    """The Numba type the kernels compute with for logits stored as ``element``."""
    return types.float32 if element in _DECODE else element


def decode(builder, value, element):
    """Lanes as they are stored -> lanes of `real`, in LLVM's terms."""
    return _DECODE[element](builder, value) if element in _DECODE else value


def encode(builder, value, element):
    """Lanes of `real` -> lanes as they are stored."""
    return _ENCODE[element](builder, value) if element in _ENCODE else value


@intrinsic
def as_real(typing, array, value):
    """A scalar, or floating lanes, in the type the kernels compute with for ``array``."""
    element = real(array.dtype)
    result = Vector(element) if isinstance(value, Vector) else element

    def lower(context, builder, sig, args):
        if isinstance(value, Vector):
            return cast(builder, args[1], value, result)
        return context.cast(builder, args[1], value, result)

    return result(array, value), lower


def waiting_room(row, out):
    """``out`` where it stores what the kernels compute with, so that terms of ``row`` can wait there; else None."""
    raise NotImplementedError


@overload(waiting_room, inline="always")
def _waiting_room_by_kind(row, out):
    if real(row.dtype) == out.dtype:
        return lambda row, out: out
    return lambda row, out: None


def rounding(array):
    """The distance from 1 to the next number of what the kernels compute with for ``array``."""
    raise NotImplementedError


@overload(rounding)
def _rounding_by_kind(array):
    epsilon = float(np.finfo(str(real(array.dtype))).eps)
    return lambda array: epsilon
