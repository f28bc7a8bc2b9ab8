"""Short vectors as values of numba-cuda: the numbers of one or a few 16-byte words, in one thread's registers.

The counterpart of `fastxent.backends.cpu.vector` for another compiler. A GPU has no vector instructions, so the lanes
become separate instructions; what matters is that `fastxent.rowmath` and the kernels are written once, without a word
of how many lanes there are. Only arithmetic is here; `primitives` loads and stores.
"""

import functools
import operator

from llvmlite import ir
from numba.cuda import types
from numba.cuda.cudadecl import registry as typing_registry
from numba.cuda.cudaimpl import registry as lowering_registry
from numba.cuda.extending import core_models, intrinsic, register_model
from numba.cuda.typing import signature
from numba.cuda.typing.templates import AbstractTemplate

INT32 = ir.IntType(32)


class Lanes(types.Type):
    """``count`` numbers of type ``element``, or truth values."""

    def __init__(self, element, count):
        self.element, self.count = element, count
        super().__init__(name=f"Lanes({element} x {count})")


@register_model(Lanes)
class _LanesModel(core_models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        element = ir.IntType(1) if fe_type.element == types.boolean else dmm[fe_type.element].get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


def _lanes_among(*kinds):
    return next((kind for kind in kinds if isinstance(kind, Lanes)), None)


def split(builder, value):
    """The lanes of a vector as a list, in LLVM's terms."""
    return [builder.extract_element(value, INT32(k)) for k in range(value.type.count)]


def joined(builder, values):
    """A vector of such a list."""
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for k, value in enumerate(values):
        vector = builder.insert_element(vector, value, INT32(k))
    return vector


def lanewise(context, builder, body, kinds, values, like):
    """``body`` on the lanes of each value, a scalar converted to ``like`` 's element and taken for every lane."""
    columns = [
        split(builder, value)
        if isinstance(kind, Lanes)
        else [context.cast(builder, value, kind, like.element)] * like.count
        for kind, value in zip(kinds, values, strict=True)
    ]
    return joined(builder, [body(*lane) for lane in zip(*columns, strict=True)])


def _define(symbol, result_of, body_for):
    """``symbol`` for two operands of which one is `Lanes`."""

    @typing_registry.register_global(symbol)
    class _Typing(AbstractTemplate):
        key = symbol

        def generic(self, args, kws):
            like = _lanes_among(*args)
            if like is not None and len(args) == 2:
                return signature(result_of(like), *args)
            return None

    def lower(context, builder, sig, args):
        like = _lanes_among(*sig.args)
        body = body_for(builder, isinstance(like.element, types.Float))
        return lanewise(context, builder, body, sig.args, args, like)

    for kinds in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lowering_registry.lower(symbol, *kinds)(lower)


for _symbol, _for_floats, _for_integers in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None),
    (operator.lshift, None, "shl"),
    (operator.rshift, None, "ashr"),
):
    _define(
        _symbol,
        lambda like: like,
        lambda builder, is_float, f=_for_floats, i=_for_integers: getattr(builder, f if is_float else i),
    )

for _symbol, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
):
    _define(
        _symbol,
        lambda like: Lanes(types.boolean, like.count),
        lambda builder, is_float, s=_sign: (
            lambda a, b: builder.fcmp_ordered(s, a, b) if is_float else builder.icmp_signed(s, a, b)
        ),
    )


@intrinsic
def where(typing, condition, yes, no):
    """``yes`` in the lanes where the condition holds, else ``no``; a scalar condition chooses for all."""
    like = _lanes_among(yes, no)
    if like is None and isinstance(condition, Lanes):
        like = Lanes(types.float64, condition.count)
    result = like or typing.unify_types(yes, no)

    def lower(context, builder, sig, args):
        if like is None:
            values = [context.cast(builder, v, k, result) for v, k in zip(args[1:], sig.args[1:], strict=True)]
            return builder.select(args[0], *values)
        kinds = [condition if isinstance(condition, Lanes) else None, *sig.args[1:]]
        chosen = args[0] if kinds[0] is not None else joined(builder, [args[0]] * like.count)
        kinds[0] = Lanes(types.boolean, like.count)
        return lanewise(context, builder, builder.select, kinds, [chosen, *args[1:]], like)

    return result(condition, yes, no), lower


def _elementwise(name, arity, body, doc):
    """An intrinsic of one to three floating operands, scalars or lanes, which gives their kind."""

    def type_and_lower(*kinds):
        like = _lanes_among(*kinds)
        result = like or kinds[0]

        def lower(context, builder, sig, args):
            def lane(*values):
                return body(context, builder, result.element if like else result, *values)

            if like is None:
                return lane(*[context.cast(builder, v, k, result) for v, k in zip(args, sig.args, strict=True)])
            return lanewise(context, builder, lane, sig.args, args, like)

        return result(*kinds), lower

    by_arity = {
        1: lambda typing, x: type_and_lower(x),
        2: lambda typing, x, y: type_and_lower(x, y),
        3: lambda typing, x, y, z: type_and_lower(x, y, z),
    }
    function = by_arity[arity]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return intrinsic(function)


def assembly(builder, result, text, constraints, values, side_effect=False):
    """Inline PTX."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=side_effect), values)


def _letter(kind):
    return {32: "f", 64: "d"}[kind.bitwidth]


def _exp2(context, builder, kind, x):
    return assembly(builder, x.type, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x])


def _reciprocal(context, builder, kind, x):
    return assembly(builder, x.type, "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x])


def _absolute(context, builder, kind, x):
    letter = _letter(kind)
    return assembly(builder, x.type, f"abs.f{kind.bitwidth} $0, $1;", f"={letter},{letter}", [x])


def _copysign(context, builder, kind, size, x):
    letter = _letter(kind)
    text = f"copysign.f{kind.bitwidth} $0, $2, $1;"
    return assembly(builder, x.type, text, f"={letter},{letter},{letter}", [size, x])


def _rint(context, builder, kind, x):
    letter = _letter(kind)
    return assembly(builder, x.type, f"cvt.rni.f{kind.bitwidth}.f{kind.bitwidth} $0, $1;", f"={letter},{letter}", [x])


def _at_least(context, builder, kind, x, floor):
    if kind.bitwidth == 32:
        return assembly(builder, x.type, "max.NaN.f32 $0, $1, $2;", "=f,f,f", [x, floor])
    return builder.select(builder.fcmp_ordered(">", floor, x), floor, x)


def larger_of(context, builder, kind, x, y):
    """The larger of two numbers, in LLVM's terms; a NaN is passed over."""
    letter = _letter(kind)
    return assembly(builder, x.type, f"max.f{kind.bitwidth} $0, $1, $2;", f"={letter},{letter},{letter}", [x, y])


def _weighted(context, builder, kind, weight, x):
    zero = ir.Constant(weight.type, 0.0)
    return builder.select(builder.fcmp_unordered("!=", weight, zero), builder.fmul(weight, x), zero)


def _less_the_base(context, builder, kind, x, base):
    # as a plain subtraction it would be made for every row, and thrown away for nearly all
    letter = _letter(kind)
    text = f"sub.rn.f{kind.bitwidth} $0, $1, $2;"
    return assembly(builder, x.type, text, f"={letter},{letter},{letter}", [x, base], side_effect=True)


def _flushed_product(context, builder, kind, x, y):
    return assembly(builder, x.type, "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y])


fma = _elementwise("fma", 3, lambda context, builder, kind, *xyz: builder.fma(*xyz), "x y + z, rounded once.")
rint = _elementwise(
    "rint",
    1,
    _rint,
    "The nearest whole number, ties to even.",
)
exp2 = _elementwise(
    "exp2", 1, _exp2, "2**x of a float32, within two units of the last place; below the smallest normal it is 0."
)
absolute = _elementwise("absolute", 1, _absolute, "Without its sign.")
copysign = _elementwise("copysign", 2, _copysign, "A number of this size with the sign of x.")
reciprocal = _elementwise(
    "reciprocal", 1, _reciprocal, "1 / x of a float32, within 2**-23 times it; below the smallest normal it is 0."
)
at_least = _elementwise("at_least", 2, _at_least, "The larger of x and a floor; NaN in x stays.")
less_the_base = _elementwise("less_the_base", 2, _less_the_base, "x - base, only where control comes by.")
flushed_product = _elementwise(
    "flushed_product", 2, _flushed_product, "x y in float32, and 0 where x, y or that is below the smallest normal."
)
larger = _elementwise("larger", 2, larger_of, "The larger of the two; a NaN is passed over.")
weighted = _elementwise("weighted", 2, _weighted, "weight x, and 0 where the weight is 0 even if x is infinite.")

_SAME_BITS = {
    types.float32: types.int32,
    types.float64: types.int64,
    types.int32: types.float32,
    types.int64: types.float64,
}


@intrinsic
def bits(typing, x):
    """The bits of a floating number as an integer of the same width, and the way back."""
    result = Lanes(_SAME_BITS[x.element], x.count) if isinstance(x, Lanes) else _SAME_BITS[x]
    return result(x), lambda context, builder, sig, args: builder.bitcast(args[0], context.get_value_type(result))


@intrinsic
def shifted(typing, x, places):
    """A floating number whose bits are those of x, moved to the left."""
    element = x.element if isinstance(x, Lanes) else x
    integer = ir.IntType(element.bitwidth)

    def lower(context, builder, sig, args):
        kind = args[0].type.element if isinstance(x, Lanes) else args[0].type
        amount = context.cast(builder, args[1], sig.args[1], _SAME_BITS[element])

        def lane(value):
            return builder.bitcast(builder.shl(builder.bitcast(value, integer), amount), kind)

        if isinstance(x, Lanes):
            return joined(builder, [lane(value) for value in split(builder, args[0])])
        return lane(args[0])

    return x(x, places), lower


@intrinsic
def shifted_onto(typing, x, places, low):
    """The same, with the bits of an int32 added."""

    def lower(context, builder, sig, args):
        places, low = (context.cast(builder, args[k], sig.args[k], types.int32) for k in (1, 2))

        def lane(value):
            moved = builder.shl(builder.bitcast(value, INT32), places)
            return builder.bitcast(builder.add(moved, low), ir.FloatType())

        return joined(builder, [lane(value) for value in split(builder, args[0])])

    return x(x, places, low), lower


def caster(target):
    """An intrinsic that converts a number, or lanes, to ``target``."""

    @intrinsic
    def convert(typing, x):
        result = Lanes(target, x.count) if isinstance(x, Lanes) else target

        def lower(context, builder, sig, args):
            if x == types.float64 and target == types.float32:
                # as a plain conversion it would be made again and again where it is used, in loops too
                return assembly(builder, ir.FloatType(), "cvt.rn.f32.f64 $0, $1;", "=f,d", args)
            if not isinstance(x, Lanes):
                return context.cast(builder, args[0], x, target)
            return joined(builder, [context.cast(builder, v, x.element, target) for v in split(builder, args[0])])

        return result(x), lower

    return convert


to_float64 = caster(types.float64)


def filler(element, count):
    """An intrinsic that gives ``count`` lanes, all of the number it is given."""
    result = Lanes(element, count)

    @intrinsic
    def lanes_of(typing, value):
        def lower(context, builder, sig, args):
            return joined(builder, [context.cast(builder, args[0], value, element)] * count)

        return result(value), lower

    return lanes_of


@intrinsic
def first_numbers(typing, like):
    """0, 1, 2 ... in as many lanes as ``like`` has, int32."""
    result = Lanes(types.int32, like.count)

    def lower(context, builder, sig, args):
        return ir.Constant(ir.VectorType(INT32, like.count), list(range(like.count)))

    return result(like), lower


def _folded(name, combine):
    def fold(typing, x):
        def lower(context, builder, sig, args):
            values = split(builder, args[0])
            while len(values) > 1:
                half = len(values) // 2
                pairs = zip(values[:half], values[half:], strict=True)
                values = [combine(context, builder, x.element, a, b) for a, b in pairs]
            return values[0]

        return x.element(x), lower

    fold.__name__ = fold.__qualname__ = name
    return intrinsic(fold)


sum_lanes = _folded("sum_lanes", lambda context, builder, kind, a, b: builder.fadd(a, b))
peak_of_lanes = _folded("peak_of_lanes", larger_of)


@intrinsic
def lane(typing, x, k):
    """Lane ``k``, a compile-time or a run-time number, without going through memory."""

    def lower(context, builder, sig, args):
        values = split(builder, args[0])
        index = context.cast(builder, args[1], sig.args[1], types.int32)
        chosen = values[0]
        for number, value in enumerate(values[1:], 1):
            chosen = builder.select(builder.icmp_signed("==", index, INT32(number)), value, chosen)
        return chosen

    return x.element(x, k), lower


@intrinsic
def everywhere(typing, condition):
    """Whether the condition holds in all lanes; of a scalar, whether it holds."""

    def lower(context, builder, sig, args):
        if condition == types.boolean:
            return args[0]
        return functools.reduce(builder.and_, split(builder, args[0]))

    return types.boolean(condition), lower


def _half(name, of):
    def half(typing, x):
        result = Lanes(x.element, x.count // 2)
        return result(x), lambda context, builder, sig, args: joined(builder, of(split(builder, args[0])))

    half.__name__ = half.__qualname__ = name
    return intrinsic(half)


first_half = _half("first_half", lambda values: values[: len(values) // 2])
second_half = _half("second_half", lambda values: values[len(values) // 2 :])


@intrinsic
def concatenated(typing, x, y):
    """The lanes of both."""
    result = Lanes(x.element, x.count + y.count)
    return result(x, y), lambda context, builder, sig, args: joined(
        builder, split(builder, args[0]) + split(builder, args[1])
    )
