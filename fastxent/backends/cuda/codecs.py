"""The number formats in a GPU's registers: a word of 16 bytes as the numbers that are computed with, and back.

Logits of 8 or 16 bits are taken from the bits of whole words, so no kernel needs a type that numba-cuda may not have.
"""

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.lanes import INT32, Lanes, assembly, joined, larger_of, split

WORD = Lanes(types.int32, 4)
_WORD = ir.VectorType(INT32, 4)
_INT16, _HALF, _FLOAT, _DOUBLE = ir.IntType(16), ir.HalfType(), ir.FloatType(), ir.DoubleType()
_DOUBLES = ir.VectorType(_DOUBLE, 2)


def _floats_of_halves(builder, word):
    pair = builder.bitcast(word, ir.VectorType(_HALF, 2))
    return [builder.fpext(value, _FLOAT) for value in split(builder, pair)]


def _decode_float32(builder, word):
    return [builder.bitcast(word, _FLOAT)]


def _decode_bfloat16(builder, word):
    high = builder.and_(word, INT32(0xFFFF0000))
    return [builder.bitcast(builder.shl(word, INT32(16)), _FLOAT), builder.bitcast(high, _FLOAT)]


def _decode_float8_e5m2(builder, word):
    """Each is the upper half of a float16."""
    low = builder.or_(
        builder.shl(builder.and_(word, INT32(0xFF)), INT32(8)),
        builder.shl(builder.and_(word, INT32(0xFF00)), INT32(16)),
    )
    high = builder.or_(builder.and_(builder.lshr(word, INT32(8)), INT32(0xFF00)), builder.and_(word, INT32(0xFF000000)))
    return _floats_of_halves(builder, low) + _floats_of_halves(builder, high)


def _decode_float8_e4m3fn(builder, word):
    """A float16 whose exponent is 8 too small; all ones is NaN, there is no infinity."""
    values = []
    for k in range(4):
        code = builder.and_(builder.lshr(word, INT32(8 * k)), INT32(0xFF))
        magnitude = builder.and_(code, INT32(0x7F))
        sign = builder.shl(builder.and_(code, INT32(0x80)), INT32(8))
        half = builder.trunc(builder.or_(sign, builder.shl(magnitude, INT32(7))), _INT16)
        number = builder.fmul(builder.fpext(builder.bitcast(half, _HALF), _FLOAT), ir.Constant(_FLOAT, 256.0))
        is_nan = builder.icmp_signed("==", magnitude, INT32(0x7F))
        values.append(builder.select(is_nan, ir.Constant(_FLOAT, float("nan")), number))
    return values


def _encode_pairs(name):
    text = f"cvt.rn.{name}x2.f32 $0, $1, $2;"

    def encode(builder, numbers):
        pairs = zip(numbers[1::2], numbers[::2], strict=True)
        return [assembly(builder, INT32, text, "=r,f,f", [high, low]) for high, low in pairs]

    return encode


def _bitcasts(builder, numbers):
    return [builder.bitcast(number, INT32) for number in numbers]


_DECODE = {
    "float32": _decode_float32,
    "bfloat16": _decode_bfloat16,
    "float16": _floats_of_halves,
    "float8_e4m3fn": _decode_float8_e4m3fn,
    "float8_e5m2": _decode_float8_e5m2,
}
_PAIRS = {"bfloat16": "bf16x2", "float16": "f16x2"}
_ENCODE = {"float32": _bitcasts, "bfloat16": _encode_pairs("bf16"), "float16": _encode_pairs("f16")}


def codec(name):
    """``decode`` and ``encode`` of a format: a word as numbers of the kind that is computed with, and back."""
    real = types.float64 if name == "float64" else types.float32
    numbers = Lanes(real, FORMS[name].lanes)

    @intrinsic
    def decode(typing, word):
        def lower(context, builder, sig, args):
            if name == "float64":
                return builder.bitcast(args[0], _DOUBLES)
            return joined(builder, [value for w in split(builder, args[0]) for value in _DECODE[name](builder, w)])

        return numbers(word), lower

    @intrinsic
    def encode(typing, x):
        def lower(context, builder, sig, args):
            if name == "float64":
                return builder.bitcast(args[0], _WORD)
            return joined(builder, _ENCODE[name](builder, split(builder, args[0])))

        return WORD(x), lower

    return decode, encode


def highest_of(name):
    """The largest number of four words, NaN left aside, in what is computed with; of two bytes, two at a time."""
    real, pairs = types.float64 if name == "float64" else types.float32, _PAIRS.get(name)

    @intrinsic
    def highest(typing, a, b, c, d):
        def lower(context, builder, sig, args):
            if name == "float64":
                found = [value for word in args for value in split(builder, builder.bitcast(word, _DOUBLES))]
                return _largest(found, lambda x, y: larger_of(context, builder, real, x, y))
            words = [word for arg in args for word in split(builder, arg)]
            if pairs is not None:
                text = f"max.{pairs} $0, $1, $2;"
                words = [_largest(words, lambda x, y: assembly(builder, INT32, text, "=r,r,r", [x, y]))]
            found = [value for word in words for value in _DECODE[name](builder, word)]
            return _largest(found, lambda x, y: larger_of(context, builder, real, x, y))

        return real(a, b, c, d), lower

    return highest


def _largest(values, of_two):
    while len(values) > 1:
        values = [of_two(*values[k : k + 2]) if k + 1 < len(values) else values[k] for k in range(0, len(values), 2)]
    return values[0]
