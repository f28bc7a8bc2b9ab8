"""The formulas of `fastxent.rowmath` compiled for the CPU, over vectors and scalars, and how kernels are compiled."""

from numba import njit, types
from numba.core.errors import TypingError
from numba.extending import overload

from fastxent import rowmath
from fastxent.backends.cpu.vector import (
    Vector,
    absolute,
    at_least,
    bits,
    copysign,
    everywhere,
    fma,
    rint,
    to_float64,
    where,
)

# "numpy": division by zero gives inf; no fastmath anywhere: the kernels ask for each fused multiply-add by name.
# Without _nrt=False every call that takes a row counts references to its array, with a call and spills in the loops:
# 1.5 to 2.5 x the time. Nothing here owns an array. And nothing here is called from Python: the wrappers for that were
# a third of the time it takes to compile.
compiled = njit(error_model="numpy", nogil=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
# a call hands vectors over in memory: a block's work at most, 13 ns where 3 would do
inlined = njit(
    error_model="numpy", nogil=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True
)


_OPS = rowmath.Table(
    function=inlined, fma=fma, at_least=at_least, bits=bits, where=where, rint=rint, to_float64=to_float64,
    absolute=absolute, copysign=copysign, everywhere=everywhere,
)  # fmt: skip
_TERMS = {
    types.float32: rowmath.build_terms(_OPS, rowmath.FLOAT32),
    types.float64: rowmath.build_terms(_OPS, rowmath.FLOAT64),
}
_ROWS = rowmath.build_rows(_OPS)
add, add_gap, rebase = _ROWS.add, _ROWS.add_gap, _ROWS.rebase
nll_of, excess, whole_gap, with_target = _ROWS.nll, _ROWS.excess, _ROWS.whole_gap, _ROWS.with_target
power_of_two, exp_split, lse_of, at_target = _ROWS.power_of_two, _ROWS.exp_split, _ROWS.lse, _ROWS.at_target
binary_loss_and_slope, entropy = _ROWS.binary_loss_and_slope, _ROWS.entropy


def exp_parts(x, rate, magic, floor):
    """`fastxent.rowmath` for the kind of ``x``, a vector or a scalar, float32 or float64."""
    raise NotImplementedError


def reference(peak, rate):
    """`fastxent.rowmath` for the kind of ``peak``."""
    raise NotImplementedError


def exp_of_minus(size):
    """`fastxent.rowmath` for the kind of ``size``."""
    raise NotImplementedError


def tanh_parts(y):
    """`fastxent.rowmath` for the kind of ``y``."""
    raise NotImplementedError


def divergence_terms(p, q, u):
    """`fastxent.rowmath` for the kind of ``p``."""
    raise NotImplementedError


def _terms_of(kind):
    element = kind.element if isinstance(kind, Vector) else kind
    if element not in _TERMS:
        raise TypingError(f"no exponential for {element}")
    return _TERMS[element]


@overload(exp_parts)
def _exp_parts_by_kind(x, rate, magic, floor):
    built = _terms_of(x).exp_parts
    return lambda x, rate, magic, floor: built(x, rate, magic, floor)


@overload(reference)
def _reference_by_kind(peak, rate):
    built = _terms_of(peak).reference
    return lambda peak, rate: built(peak, rate)


@overload(exp_of_minus)
def _exp_of_minus_by_kind(size):
    built = _terms_of(size).exp_of_minus
    return lambda size: built(size)


@overload(tanh_parts)
def _tanh_parts_by_kind(y):
    built = _terms_of(y).tanh_parts
    return lambda y: built(y)


@overload(divergence_terms)
def _divergence_terms_by_kind(p, q, u):
    built = _terms_of(p).divergence_terms
    return lambda p, q, u: built(p, q, u)
