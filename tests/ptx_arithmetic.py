"""What the instructions of PTX that compute give, by their full names: `ptx` runs them.

They mean what the PTX ISA says, for arrays of one number a thread; of its kinds of instruction only those that kernels
are made of are here. What the ISA leaves open, the last places of ``ex2`` and ``rcp``, is what the simulator takes.
"""

import ml_dtypes
import numpy as np

from fastxent.backends.cuda import simulated

KINDS = {f"{letter}{bits}": np.dtype(f"{kind}{bits // 8}") for letter, kind in (("s", "i"), ("u", "u"), ("b", "u"))
          for bits in (8, 16, 32, 64)}  # fmt: skip
KINDS |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")}


def _compare(sign, kind):
    """A comparison; with ``u`` behind it it holds of a NaN too."""
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
             "ge": np.greater_equal}  # fmt: skip

    def nan(a, b):
        return np.isnan(a) | np.isnan(b)

    if sign in plain:
        return plain[sign] if kind[0] != "f" or sign != "ne" else lambda a, b: (a != b) & ~nan(a, b)
    if sign == "nan":
        return nan
    if sign == "num":
        return lambda a, b: ~nan(a, b)
    return lambda a, b: plain[sign[:-1]](a, b) | nan(a, b)


def _shift(function, bits):
    """Of all bits or more nothing is left, or what an arithmetic shift leaves."""

    def shift(value, amount):
        if function is np.right_shift and value.dtype.kind == "i":
            return value >> np.minimum(amount, bits - 1).astype(value.dtype)
        moved = function(value, np.minimum(amount, bits - 1).astype(value.dtype))
        return np.where(amount < bits, moved, value.dtype.type(0))

    return shift


def _funnel(low, high, amount):
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return (both >> (amount & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _insert(field, into, start, length):
    """``bfi``: the low bits of a field in the place of some others."""
    kind = into.dtype.type
    mask = ((kind(1) << length.astype(kind)) - kind(1)) << start.astype(kind)
    return (into & ~mask) | ((field << start.astype(kind)) & mask)


def _pairs(kind, function):
    def of_pairs(a, b):
        halves = (np.atleast_1d(np.ascontiguousarray(x))[:, None].view(kind).astype(np.float32) for x in (a, b))
        return np.ascontiguousarray(function(*halves).astype(kind)).view(np.uint32)[:, 0]

    return of_pairs


def _packed(kind):
    def pack(high, low):
        return np.stack(np.broadcast_arrays(low, high), axis=-1).astype(kind).view(np.uint32)[..., 0]

    return pack


def _whole(kind):
    """Towards zero; what is beyond a kind becomes its largest or smallest number, and a NaN that too."""
    least, most = np.iinfo(kind).min, np.iinfo(kind).max

    def whole(x):
        inside = np.abs(x) < -float(least)
        beyond = np.where(x > 0, most, least).astype(kind)
        return np.where(inside, np.where(inside, x, 0).astype(kind), beyond)

    return whole


def _larger(x, y):
    """+0 is larger than -0, and any number than a NaN."""
    return np.where(x == y, np.where(np.signbit(x), y, x), np.fmax(x, y))


def _smaller(x, y):
    return np.where(x == y, np.where(np.signbit(x), x, y), np.fmin(x, y))


def _reciprocal(x):
    return x.dtype.type(1) / x


def _fma_of(kind):
    """Of float32 rounded once: a sum that is rounded twice is rounded to odd the first time. Of float64 as in the
    simulator, where the error of the product is added to that of the sum.
    """
    if kind == np.float64:
        return simulated.OPS.fma

    def fma(a, b, c):
        product, c = np.asarray(a, np.float64) * b, np.asarray(c, np.float64)
        total = product + c
        back = total - product
        lost = (product - (total - back)) + (c - back)
        bits = np.asarray(total).view(np.int64)
        towards = np.where((lost > 0) == (total > 0), 1, -1)
        odd = np.where((lost != 0) & (bits & 1 == 0) & np.isfinite(total), bits + towards, bits).view(np.float64)
        return odd.astype(np.float32)

    return fma


def _arithmetic():
    """What each instruction is given, what it gives, and the function, by its full name."""
    table = {}

    def define(name, given, result, function):
        table[name] = [KINDS[kind] for kind in given.split()], KINDS[result], function

    for f in ("f32", "f64"):
        for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)):
            define(f"{name}.rn.{f}", f"{f} {f}", f, function)
        define(f"fma.rn.{f}", f"{f} {f} {f}", f, _fma_of(KINDS[f]))
        define(f"rcp.rn.{f}", f, f, _reciprocal)
        define(f"neg.{f}", f, f, np.negative)
        define(f"abs.{f}", f, f, np.abs)
        define(f"min.{f}", f"{f} {f}", f, _smaller)
        define(f"max.{f}", f"{f} {f}", f, _larger)
        define(f"copysign.{f}", f"{f} {f}", f, lambda sign, size: np.copysign(size, sign))
        define(f"cvt.rni.{f}.{f}", f, f, np.rint)
    define("max.NaN.f32", "f32 f32", "f32", np.maximum)
    define("mul.rn.ftz.f32", "f32 f32", "f32", simulated.OPS.flushed_product)
    define("ex2.approx.ftz.f32", "f32", "f32", simulated.OPS.exp2)
    define("rcp.approx.ftz.f32", "f32", "f32", simulated.OPS.reciprocal)
    for bits in (32, 64):
        s, u = f"s{bits}", f"u{bits}"
        define(f"add.{s}", f"{s} {s}", s, np.add)
        define(f"sub.{s}", f"{s} {s}", s, np.subtract)
        define(f"mul.lo.{s}", f"{s} {s}", s, np.multiply)
        define(f"mad.lo.{s}", f"{s} {s} {s}", s, lambda a, b, c: a * b + c)
        define(f"neg.{s}", s, s, np.negative)
        for kind in (s, u):
            define(f"min.{kind}", f"{kind} {kind}", kind, np.minimum)
            define(f"max.{kind}", f"{kind} {kind}", kind, np.maximum)
    define("mul.wide.s32", "s32 s32", "s64", lambda a, b: np.multiply(a, b, dtype=np.int64))
    define("div.u32", "u32 u32", "u32", np.floor_divide)
    define("div.s64", "s64 s64", "s64", lambda a, b: a // b + ((a % b != 0) & ((a < 0) != (b < 0))))
    for kind in ("b16", "b32", "b64", "pred"):
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            define(f"{name}.{kind}", f"{kind} {kind}", kind, function)
        define(f"not.{kind}", kind, kind, np.invert)
    for bits in (16, 32, 64):
        define(f"shl.b{bits}", f"b{bits} u32", f"b{bits}", _shift(np.left_shift, bits))
        for kind in (f"s{bits}", f"u{bits}", f"b{bits}"):
            define(f"shr.{kind}", f"{kind} u32", kind, _shift(np.right_shift, bits))
        if bits > 16:
            define(f"bfi.b{bits}", f"b{bits} b{bits} u32 u32", f"b{bits}", _insert)
    define("shf.r.wrap.b32", "b32 b32 u32", "b32", _funnel)
    define("max.bf16x2", "b32 b32", "b32", _pairs(ml_dtypes.bfloat16, np.fmax))
    define("max.f16x2", "b32 b32", "b32", _pairs(np.float16, np.fmax))
    define("cvt.rn.bf16x2.f32", "f32 f32", "b32", _packed(ml_dtypes.bfloat16))
    define("cvt.rn.f16x2.f32", "f32 f32", "b32", _packed(np.float16))
    for kind in KINDS:
        for sign in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "nan", "num"):
            define(f"setp.{sign}.{kind}", f"{kind} {kind}", "pred", _compare(sign, kind))
        define(f"selp.{kind}", f"{kind} {kind} pred", kind, lambda yes, no, condition: np.where(condition, yes, no))
        define(f"mov.{kind}", kind, kind, np.asarray)
        for other in KINDS:
            if "f" not in kind + other and "pred" not in (kind, other):
                define(f"cvt.{kind}.{other}", other, kind, lambda x, to=KINDS[kind]: x.astype(to))
    for to, of in (("f32", "f64"), ("f32", "s32"), ("f32", "s64"), ("f64", "s32"), ("f64", "s64")):
        define(f"cvt.rn.{to}.{of}", of, to, lambda x, to=KINDS[to]: x.astype(to))
    for to, of in (("f64", "f32"), ("f32", "f16"), ("f64", "f16")):
        define(f"cvt.{to}.{of}", of, to, lambda x, to=KINDS[to]: x.astype(to))
    for kind in ("s32", "s64"):
        define(f"cvt.rzi.{kind}.f64", "f64", kind, _whole(KINDS[kind]))
    return table


ARITHMETIC = _arithmetic()
