"""Kernels over rows and classes: what is read when, and in which order it is added.

Goals: read the logits once from memory, at that speed; the same bits for any threads, batch split, row order, or
twin; no digit lost in a row's sum. How:

- A row is cut into strips of 4,096 classes (16 KB of float32). While a strip is summed the next strip's maximum is
  taken, so each strip has its own largest logit as reference before its first exponential, whatever stands in other
  strips: nothing is summed twice and no running maximum is rescaled.
- Two strips ahead, in the next rows too, the data are asked for: without that the arithmetic and the waiting for
  memory add up (2.0 x the time of reading), with it they overlap (1.05 x).
- A strip is cut into blocks of 256: float32 lanes run over a block, float64 lanes over a strip, a float64 pair over
  the row, strip after strip. The order is spelled out in lanes, so no compiler can change it.
- One class, the target, is left out of its row's sum: log1p(others / target) then has every digit however confident
  the row. The block that holds it and the block at the ragged end are read under a mask; -inf stands for what is left
  out, and costs nothing elsewhere.
- Every kernel exists twice, parallel and serial; both call the same row functions.

A target is a class index, or IGNORED (the row is not read), or ABSENT (no class is left out).
"""

from types import SimpleNamespace

import numpy as np
from numba import njit, prange, types
from numba.core.errors import TypingError
from numba.extending import overload

from fastxent import rowmath
from fastxent.backends.cpu.vector import (
    LANES,
    Vector,
    at_least,
    bits,
    fma,
    lanes_of,
    larger,
    load,
    load_some,
    narrow,
    peak_of_lanes,
    prefetch,
    rint,
    store,
    store_some,
    sum_lanes,
    to_float64,
    weighted,
    where,
    widest_registers,
)
from fastxent.state import ABSENT, IGNORED, STRIP

BLOCK = 256
PREFETCH = 2 * STRIP

# "numpy": division by zero gives inf; no fastmath anywhere: the kernels ask for each fused multiply-add by name.
# Without _nrt=False every call that takes a row counts references to its array, with a call and spills in the loops:
# 1.5 to 2.5 x the time. Nothing here owns an array.
_compiled = njit(error_model="numpy", nogil=True, _nrt=False)
# a call hands vectors over in memory: a block's work at most, 13 ns where 3 would do
_inlined = njit(error_model="numpy", nogil=True, _nrt=False, forceinline=True)


_OPS = SimpleNamespace(
    function=_inlined, fma=fma, at_least=at_least, bits=bits, where=where, rint=rint, to_float64=to_float64
)
_TERMS = {
    types.float32: rowmath.build_terms(_OPS, rowmath.FLOAT32),
    types.float64: rowmath.build_terms(_OPS, rowmath.FLOAT64),
}
_ROWS = rowmath.build_rows(_OPS)
_add, _add_gap, _rebase = _ROWS.add, _ROWS.add_gap, _ROWS.rebase
_nll, _excess, _whole_gap, _with_target = _ROWS.nll, _ROWS.excess, _ROWS.whole_gap, _ROWS.with_target
_power_of_two, _exp_split = _ROWS.power_of_two, _ROWS.exp_split


def _exp_parts(x, magic, floor):
    raise NotImplementedError


def _reference(peak):
    raise NotImplementedError


def _terms_of(kind):
    element = kind.element if isinstance(kind, Vector) else kind
    if element not in _TERMS:
        raise TypingError(f"no exponential for {element}")
    return _TERMS[element]


@overload(_exp_parts)
def _exp_parts_by_kind(x, magic, floor):
    exp_parts = _terms_of(x).exp_parts
    return lambda x, magic, floor: exp_parts(x, magic, floor)


@overload(_reference)
def _reference_by_kind(peak):
    reference = _terms_of(peak).reference
    return lambda peak: reference(peak)


@_inlined
def _whole(start, stop, but):
    """Whether a block from ``start`` on ends before ``stop`` and is without class ``but``."""
    return start + BLOCK <= stop and not start <= but < start + BLOCK


@_inlined
def _load_masked(row, j, stop, but):
    """row[j:] with -inf from ``stop`` on and on class ``but``."""
    return load_some(row, j, stop - j, max(but - j, -1), -np.inf)


@_inlined
def _block_peak(row, start, stop, but, peak):
    """The maximum of ``peak`` and row[start:stop] without class ``but``, a block at most."""
    a, b, c, d = peak, peak, peak, peak
    if _whole(start, stop, but):
        for j in range(start, start + BLOCK, 4 * LANES):
            a = larger(load(row, j), a)
            b = larger(load(row, j + LANES), b)
            c = larger(load(row, j + 2 * LANES), c)
            d = larger(load(row, j + 3 * LANES), d)
    else:
        for j in range(start, min(stop, start + BLOCK), 2 * LANES):
            a = larger(_load_masked(row, j, stop, but), a)
            b = larger(_load_masked(row, j + LANES, stop, but), b)
    return larger(larger(a, b), larger(c, d))


@_compiled
def _peak(row, start, stop, but):
    """The maximum of row[start:stop] without class ``but``; -inf when nothing is there."""
    peak = lanes_of(row.dtype.type(-np.inf))
    for j in range(start, stop, BLOCK):
        peak = _block_peak(row, j, stop, but, peak)
    return peak_of_lanes(peak)


@_inlined
def _plus_exp(x, terms, j, count, base, magic, floor, lanes):
    """``lanes`` plus exp(x - base) 2**-exponent; the term goes to terms[j:], only ``count`` lanes unless it is None."""
    power, scale = _exp_parts(x if base is None else x - base, magic, floor)
    if terms is None:
        return fma(power, scale, lanes)
    term = power * scale
    if count is None:
        store(terms, j, term)
    else:
        store_some(terms, j, count, term)
    return lanes + term


@_inlined
def _sum_block(row, terms, start, stop, but, base, magic, floor):
    """Lanes of sum exp(row - base) over row[start:stop] without ``but``, a block at most; the terms go to ``terms``."""
    a = lanes_of(row.dtype.type(0))
    b, c, d = a, a, a
    if _whole(start, stop, but):
        for j in range(start, start + BLOCK, 4 * LANES):
            a = _plus_exp(load(row, j), terms, j, None, base, magic, floor, a)
            b = _plus_exp(load(row, j + LANES), terms, j + LANES, None, base, magic, floor, b)
            c = _plus_exp(load(row, j + 2 * LANES), terms, j + 2 * LANES, None, base, magic, floor, c)
            d = _plus_exp(load(row, j + 3 * LANES), terms, j + 3 * LANES, None, base, magic, floor, d)
    else:
        for j in range(start, min(stop, start + BLOCK), 2 * LANES):
            k = j + LANES
            a = _plus_exp(_load_masked(row, j, stop, but), terms, j, stop - j, base, magic, floor, a)
            b = _plus_exp(_load_masked(row, k, stop, but), terms, k, stop - k, base, magic, floor, b)
    return (a + b) + (c + d)


@_inlined
def _prefetch_block(row, start):
    for j in range(start, start + BLOCK, 64 // row.itemsize):
        prefetch(row, j)


@_inlined
def _sum_blocks(row, terms, start, stop, ahead, but, base, magic, floor):
    """The sum of a strip, block by block, and the maximum from ``stop`` to ``ahead``, a block at a time beside it."""
    widest_registers()
    total = lanes_of(0.0)
    next_peak = lanes_of(row.dtype.type(-np.inf))
    for j in range(start, stop, BLOCK):
        _prefetch_block(row, j + PREFETCH)
        total = total + to_float64(_sum_block(row, terms, j, stop, but, base, magic, floor))
        if j + STRIP < ahead:
            next_peak = _block_peak(row, j + STRIP, ahead, but, next_peak)
    return sum_lanes(total), peak_of_lanes(next_peak)


@_compiled
def _sum_strip(row, terms, start, stop, ahead, but, peak):
    """A strip's sum under the reference of its maximum ``peak``, and the maximum from ``stop`` to ``ahead``."""
    base, exponent, magic, floor = _reference(peak)
    if base == 0.0:
        # a subtraction an element is 12% of the time, and nearly no row needs it
        total, next_peak = _sum_blocks(row, terms, start, stop, ahead, but, None, magic, floor)
    else:
        total, next_peak = _sum_blocks(row, terms, start, stop, ahead, but, base, magic, floor)
    return np.float64(base), np.float64(exponent), total, next_peak


@_compiled
def _add_strip(base, exponent, total, low, strip_base, strip_exponent, strip_total):
    """A row's sum and a strip's; where huge logits gave them different bases, the larger base stays."""
    if strip_base != base and strip_total != 0.0:
        if total == 0.0:
            base = strip_base
        elif strip_base > base:
            exponent, total = _rebase(base, exponent, total, strip_base)
            base = strip_base
        else:
            strip_exponent, strip_total = _rebase(strip_base, strip_exponent, strip_total, base)
    exponent, total, low = _add(exponent, total, low, strip_exponent, strip_total, 0.0)
    return base, exponent, total, low


@_compiled
def _gap_strip(row, weight, start, stop, but, peak):
    """``gap, mass`` of a strip in float64: sum w (peak - row) and sum w without class ``but``."""
    widest_registers()
    anchor = np.float64(peak) if peak > -np.inf else 0.0
    gap, mass = lanes_of(0.0), lanes_of(0.0)
    for j in range(start, stop, LANES):
        count, left_out = stop - j, max(but - j, -1)
        w = load_some(weight, j, count, left_out, 0.0)
        gap = gap + weighted(w, anchor - to_float64(load_some(row, j, count, left_out, 0.0)))
        mass = mass + w
    return sum_lanes(gap), sum_lanes(mass)


@_compiled
def _sum_row(row, but, weight, terms, references, before=(0.0, 0.0, 0.0, 0.0)):
    """The sums of a row without class ``but``: ``base, exponent, total, low, peak, gap, mass``.

    ``before`` holds the first four of the classes already counted. With ``weight`` the gap and mass of smoothing are
    taken too. With ``terms``, exp(row - base) 2**-exponent is left there under each strip's own reference, which
    ``references`` keeps.
    """
    classes = row.shape[0]
    base, exponent, total, low = before
    top, gap, mass = -np.inf, 0.0, 0.0
    peak = _peak(row, 0, min(classes, STRIP), but)
    for start in range(0, classes, STRIP):
        stop = min(classes, start + STRIP)
        strip_gap, strip_mass = 0.0, 0.0
        if weight is not None:
            strip_gap, strip_mass = _gap_strip(row, weight, start, stop, but, peak)
        top, gap, mass = _add_gap(top, gap, mass, np.float64(peak), strip_gap, strip_mass)
        ahead = min(classes, stop + STRIP)
        strip_base, strip_exponent, strip_total, peak = _sum_strip(row, terms, start, stop, ahead, but, peak)
        if references is not None:
            references[start // STRIP, 0] = strip_base
            references[start // STRIP, 1] = strip_exponent if strip_total != 0.0 else -np.inf
        base, exponent, total, low = _add_strip(base, exponent, total, low, strip_base, strip_exponent, strip_total)
    return base, exponent, total, low, top, gap, mass


@_compiled
def _finish_row(sums, target_logit, target_weight, i, nll, peak, gap):
    """A row's statistics from its sums: nll = lse - z_t, and gap = sum of w (lse - z) over all classes."""
    base, exponent, total, _, top, class_gap, mass = sums
    nll[i] = _nll(base, exponent, total, target_logit)
    peak[i] = top
    if gap is not None:
        over = _excess(base, exponent, total, top, target_logit, nll[i]) if top > -np.inf else 0.0
        gap[i] = _whole_gap(class_gap, mass, over, target_weight, nll[i])


@_compiled
def _scale_terms(terms, weight, references, base, exponent, amount, shift):
    """terms * amount under one reference for the row, minus ``shift`` (times the class weight, where there is one)."""
    widest_registers()
    classes = terms.shape[0]
    for start in range(0, classes, STRIP):
        stop = min(classes, start + STRIP)
        power, n = _exp_split(references[start // STRIP, 0] - base)
        factor = amount * power * _power_of_two(references[start // STRIP, 1] + n - exponent)
        _scale_strip(terms, weight, start, stop, factor, -shift)


@_compiled
def _scale_strip(terms, weight, start, stop, factor, shift):
    """terms * factor + shift, or + shift * weight in float64 before the one rounding."""
    for j in range(start, stop, LANES):
        count = stop - j
        if weight is not None:
            x = to_float64(load_some(terms, j, count, -1, 0.0)) * factor
            x = fma(load_some(weight, j, count, -1, 0.0), shift, x)
            store_some(terms, j, count, narrow(x, terms))
        elif count >= LANES:
            store(terms, j, fma(load(terms, j), factor, shift))
        else:
            store_some(terms, j, count, fma(load_some(terms, j, count, -1, 0.0), factor, shift))


@_compiled
def _statistics_row(row, target, weight, i, nll, peak, gap):
    if target == IGNORED:
        nll[i], peak[i] = 0.0, np.nan
        if gap is not None:
            gap[i] = 0.0
        return
    sums = _sum_row(row, target, weight, None, None)
    target_weight = np.float64(weight[target]) if weight is not None else 1.0
    _finish_row(sums, np.float64(row[target]), target_weight, i, nll, peak, gap)


@_compiled
def _gradient_row(row, target, weight, hit, smooth, extra, out, references, i, nll, peak, gap):
    if target == IGNORED:
        out[:] = 0.0
        nll[i], peak[i] = 0.0, np.nan
        if gap is not None:
            gap[i] = 0.0
        return
    target_logit = np.float64(row[target])
    target_weight = np.float64(weight[target]) if weight is not None else 1.0
    sums = _sum_row(row, target, weight, out, references)
    _finish_row(sums, target_logit, target_weight, i, nll, peak, gap)
    base, exponent, total = sums[0], sums[1], sums[2]
    top, whole, miss, own = _with_target(base, exponent, total, target_logit)
    _scale_terms(out, weight, references, base, top, (hit + extra) / whole, smooth)
    out[target] = out.dtype.type(extra * own - hit * miss - smooth * target_weight)


def statistics(logits, targets, weight, nll, peak, gap):
    """(N, V) logits read once -> nll, peak of the other classes and, with class weights, gap: float64 (N,)."""
    for i in prange(logits.shape[0]):
        _statistics_row(logits[i], targets[i], weight, i, nll, peak, gap)


def statistics_and_gradient(logits, targets, weight, coefficients, out, references, nll, peak, gap):
    """As `statistics`, and out (N, V) written: p_k (hit + extra) - smooth w_k, on the target from 1 - p_t.

    The row is read once from memory; its terms wait in ``out`` and are scaled while they are in the cache.
    coefficients (N, 3): hit, smooth, extra; references (N, strips, 2) is scratch.
    """
    for i in prange(logits.shape[0]):
        hit, smooth, extra = coefficients[i, 0], coefficients[i, 1], coefficients[i, 2]
        _gradient_row(logits[i], targets[i], weight, hit, smooth, extra, out[i], references[i], i, nll, peak, gap)


def accumulate(logits, targets, weight, columns):
    """A block's sums added to ``columns`` (N, 9), in the order of `fastxent.state.FIELDS`."""
    for i in prange(logits.shape[0]):
        _accumulate_row(logits[i], targets[i], weight, columns[i])


@_compiled
def _accumulate_row(row, target, weight, state):
    if target == IGNORED:
        return
    sums = _sum_row(row, target, weight, None, None, (state[0], state[1], state[2], state[3]))
    state[0], state[1], state[2], state[3], peak, gap, mass = sums
    state[4], state[5], state[6] = _add_gap(state[4], state[5], state[6], peak, gap, mass)
    if target >= 0:
        state[7] = np.float64(row[target])
        state[8] += 1.0


@_compiled
def _first_largest(row):
    """The index of the largest logit, the lowest of equals; 0 when every logit is NaN."""
    peak = _peak(row, 0, row.shape[0], ABSENT)
    for j in range(row.shape[0]):
        if row[j] == peak:
            return j
    return 0


@_compiled
def _has_nan(row):
    for j in range(row.shape[0]):
        if row[j] != row[j]:
            return True
    return False


@_compiled
def _log_sum(row, sums, largest):
    """log(sum exp(row)) - row[largest]; +inf stays +inf, and nothing else hides a NaN."""
    if row[largest] == np.inf and not _has_nan(row):
        return np.inf
    if row[largest] == -np.inf and sums[2] == 0.0:
        return -np.inf
    return _nll(sums[0], sums[1], sums[2], np.float64(row[largest]))


def logsumexp(logits, lse):
    """(N, V) -> (N,) float64."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        excess = _log_sum(row, _sum_row(row, largest, None, None, None), largest)
        lse[i] = excess if np.isinf(excess) else np.float64(row[largest]) + excess


@_compiled
def _shift_row(row, out, largest, excess):
    widest_registers()
    peak = row[largest]
    for j in range(0, row.shape[0], LANES):
        count = min(row.shape[0] - j, LANES)
        store_some(out, j, count, (load_some(row, j, count, -1, 0.0) - peak) - row.dtype.type(excess))


def log_softmax(logits, out):
    """(N, V) -> out (N, V): (x - largest) - log1p(others / largest), two positive losses that cannot cancel."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        sums = _sum_row(row, largest, None, None, None)
        _shift_row(row, out[i], largest, _nll(sums[0], sums[1], sums[2], np.float64(row[largest])))


def softmax(logits, out, references):
    """(N, V) -> out (N, V), the largest probability from the sum of the others."""
    for i in prange(logits.shape[0]):
        row = logits[i]
        largest = _first_largest(row)
        peak = np.float64(row[largest])
        base, exponent, total, _, _, _, _ = _sum_row(row, largest, None, out[i], references[i])
        top, whole, _, own = _with_target(base, exponent, total, peak)
        _scale_terms(out[i], None, references[i], base, top, 1.0 / whole, 0.0)
        out[i, largest] = own
