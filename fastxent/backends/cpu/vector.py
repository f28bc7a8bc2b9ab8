"""SIMD vectors as Numba values: sixteen lanes of one kind of number, lowered to LLVM vector instructions.

A kernel that says its lanes aloud does not depend on what a vectoriser makes of a loop: the same lanes are added in
the same order in every kernel, on every machine and at every vector width (LLVM splits sixteen lanes into as many
registers as the machine needs), and packed code is certain. Only arithmetic is here; `memory` loads and stores
vectors, `fastxent.rowmath` has the formulas.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

LANES = 16

INT32 = ir.IntType(32)


class Vector(types.Type):
    """``LANES`` numbers of type ``element``, or truth values."""

    def __init__(self, element):
        self.element = element
        super().__init__(name=f"Vector({element})")


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        element = dmm[fe_type.element].get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, LANES))


def _vector_among(*kinds):
    return next((kind for kind in kinds if isinstance(kind, Vector)), None)


def splat(builder, value):
    """``value`` in every lane, in LLVM's terms."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def _as_vectors(context, builder, values, kinds, vector):
    """Scalars among ``values`` converted to the vector's element and copied to every lane."""
    return [
        value if isinstance(kind, Vector) else splat(builder, context.cast(builder, value, kind, vector.element))
        for value, kind in zip(values, kinds, strict=True)
    ]


def call(builder, name, result, arguments):
    """Call the LLVM intrinsic ``name``."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def suffix(vector):
    """What LLVM appends to an intrinsic's name for this kind of vector."""
    return f"v{LANES}{'f' if isinstance(vector.element, types.Float) else 'i'}{vector.element.bitwidth}"


def _define_operator(symbol, for_floats, for_integers):
    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            vector = _vector_among(*args)
            if vector is not None and len(args) == 2:
                return signature(vector, *args)
            return None

    def lower(context, builder, sig, args):
        left, right = _as_vectors(context, builder, args, sig.args, sig.return_type)
        is_float = isinstance(sig.return_type.element, types.Float)
        return getattr(builder, for_floats if is_float else for_integers)(left, right)

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *kinds)(lower)


_define_operator(operator.add, "fadd", "add")
_define_operator(operator.sub, "fsub", "sub")
_define_operator(operator.mul, "fmul", "mul")
_define_operator(operator.truediv, "fdiv", None)
_define_operator(operator.lshift, None, "shl")
_define_operator(operator.rshift, None, "ashr")


def _define_comparison(symbol, sign):
    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and _vector_among(*args) is not None:
                return signature(Vector(types.boolean), *args)
            return None

    def lower(context, builder, sig, args):
        vector = _vector_among(*sig.args)
        left, right = _as_vectors(context, builder, args, sig.args, vector)
        if isinstance(vector.element, types.Float):
            return builder.fcmp_ordered(sign, left, right)
        return builder.icmp_signed(sign, left, right)

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *kinds)(lower)


_define_comparison(operator.lt, "<")
_define_comparison(operator.le, "<=")
_define_comparison(operator.gt, ">")
_define_comparison(operator.ge, ">=")
_define_comparison(operator.eq, "==")


@intrinsic
def where(typing, condition, yes, no):
    """``yes`` in the lanes where the condition holds, else ``no``; a scalar condition chooses for all."""
    vector = _vector_among(yes, no)
    if vector is None and isinstance(condition, Vector):
        vector = Vector(types.float64)
    result = vector or typing.unify_types(yes, no)

    def lower(context, builder, sig, args):
        kinds = sig.args[1:]
        if vector is None:
            values = [context.cast(builder, value, kind, result) for value, kind in zip(args[1:], kinds, strict=True)]
        else:
            values = _as_vectors(context, builder, args[1:], kinds, vector)
        return builder.select(args[0], *values)

    return result(condition, yes, no), lower


def _of_llvm(name, kind):
    """What lowers to an intrinsic of LLVM, all of whose operands are of one kind, a vector or a scalar."""

    def lower(context, builder, sig, args):
        symbol = f"llvm.{name}.{suffix(kind) if isinstance(kind, Vector) else f'f{kind.bitwidth}'}"
        return call(builder, symbol, args[0].type, args)

    return lower


@intrinsic
def rint(typing, x):
    """The nearest whole number, ties to even."""
    return x(x), _of_llvm("rint", x)


@intrinsic
def absolute(typing, x):
    """Without its sign."""
    return x(x), _of_llvm("fabs", x)


@intrinsic
def copysign(typing, size, x):
    """A number of this size with the sign of ``x``."""
    return x(x, x), _of_llvm("copysign", x)


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once; scalars take part in every lane."""
    vector = _vector_among(a, b, c)

    def lower(context, builder, sig, args):
        if vector is None:
            return builder.fma(*args)
        args = _as_vectors(context, builder, args, sig.args, vector)
        return call(builder, f"llvm.fma.{suffix(vector)}", args[0].type, args)

    if vector is None and not (isinstance(a, types.Float) and a == b == c):
        return None
    return (vector or a)(a, b, c), lower


@intrinsic
def at_least(typing, x, floor):
    """The larger of the two; NaN in ``x`` stays. One instruction: max(floor, x) returns x when it is NaN."""
    result = _vector_among(x, floor) or x

    def lower(context, builder, sig, args):
        if isinstance(result, Vector):
            args = _as_vectors(context, builder, args, sig.args, result)
        return builder.select(builder.fcmp_ordered(">", args[1], args[0]), args[1], args[0])

    return result(x, floor), lower


@intrinsic
def larger(typing, x, peak):
    """The larger of the two lane by lane; NaN in ``x`` is passed over."""

    def lower(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return x(x, peak), lower


@intrinsic
def weighted(typing, weight, x):
    """weight * x, and 0 where the weight is 0 even if x is infinite."""

    def lower(context, builder, sig, args):
        zero = ir.Constant(args[0].type, None)
        product = builder.fmul(args[0], args[1])
        return builder.select(builder.fcmp_unordered("!=", args[0], zero), product, zero)

    return x(weight, x), lower


_SAME_BITS = {
    types.float32: types.int32,
    types.float64: types.int64,
    types.int32: types.float32,
    types.int64: types.float64,
}


@intrinsic
def bits(typing, x):
    """The bits of a floating number as an integer of the same width, and the way back."""
    result = Vector(_SAME_BITS[x.element]) if isinstance(x, Vector) else _SAME_BITS[x]

    def lower(context, builder, sig, args):
        return builder.bitcast(args[0], context.get_value_type(result))

    return result(x), lower


@intrinsic
def lanes_of(typing, value):
    """``value`` in every lane."""
    return Vector(value)(value), lambda context, builder, sig, args: splat(builder, args[0])


@intrinsic
def to_float64(typing, x):
    """Every lane as a float64; a scalar too."""
    result = Vector(types.float64) if isinstance(x, Vector) else types.float64
    element = x.element if isinstance(x, Vector) else x

    def lower(context, builder, sig, args):
        if x == result:
            return args[0]
        widen = builder.fpext if isinstance(element, types.Float) else builder.sitofp
        return widen(args[0], context.get_value_type(result))

    return result(x), lower


def cast(builder, value, kind, result):
    """Lanes of the floating ``kind`` as those of ``result``, in LLVM's terms."""
    if kind == result:
        return value
    change = builder.fptrunc if result.element.bitwidth < kind.element.bitwidth else builder.fpext
    return change(value, ir.VectorType(ir.FloatType() if result.element.bitwidth == 32 else ir.DoubleType(), LANES))


def _halves(builder, value):
    half = value.type.count // 2
    undefined = ir.Constant(value.type, ir.Undefined)

    def part(first):
        mask = ir.Constant(ir.VectorType(INT32, half), list(range(first, first + half)))
        return builder.shuffle_vector(value, undefined, mask)

    return part(0), part(half)


@intrinsic
def sum_lanes(typing, x):
    """The sum of the lanes, halves added to halves: a fixed order."""

    def lower(context, builder, sig, args):
        value = args[0]
        while value.type.count > 1:
            value = builder.fadd(*_halves(builder, value))
        return builder.extract_element(value, INT32(0))

    return x.element(x), lower


@intrinsic
def bits_of_lanes(typing, condition):
    """A bit for each lane where the condition holds, the first lane's lowest."""

    def lower(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(condition), lower


@intrinsic
def everywhere(typing, condition):
    """Whether the condition holds in all lanes; of a scalar, whether it holds."""

    def lower(context, builder, sig, args):
        if condition == types.boolean:
            return args[0]
        lanes = builder.bitcast(args[0], ir.IntType(LANES))
        return builder.icmp_signed("==", lanes, ir.Constant(lanes.type, -1))

    return types.boolean(condition), lower


@intrinsic
def lowest_bit(typing, number):
    """Which is the lowest bit that is set; ``number`` is not 0."""

    def lower(context, builder, sig, args):
        return call(builder, "llvm.cttz.i64", ir.IntType(64), [args[0], ir.IntType(1)(1)])

    return types.int64(types.int64), lower


@intrinsic
def first_lane(typing, x):
    """The first lane."""
    return x.element(x), lambda context, builder, sig, args: builder.extract_element(args[0], INT32(0))


@intrinsic
def peak_of_lanes(typing, x):
    """The largest lane; there is no NaN in a result of `larger`."""

    def lower(context, builder, sig, args):
        value = args[0]
        while value.type.count > 1:
            low, high = _halves(builder, value)
            value = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(value, INT32(0))

    return x.element(x), lower


@intrinsic
def widest_registers(typing):
    """Let the calling function use 512-bit registers where the machine has them; LLVM keeps to 256 otherwise."""

    def lower(context, builder, sig, args):
        # the set of attributes refuses what LLVM's list does not name, so the string goes in beneath it
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), lower
