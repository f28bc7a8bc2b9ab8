"""The mathematics of one logit and of one row, each formula once.

`build_terms` makes the functions of a logit, `build_rows` those of a row's sums. Both take ``ops``, a `Table` or a
class, which supplies the arithmetic: a fused multiply-add, a view of the bits, a clamp that keeps NaN, and the wrapper
that compiles a function. The CPU kernels build them over SIMD vectors and scalars; `NumpyOps` builds them in plain
NumPy, where an array takes the place of a vector. Nothing here indexes, loops, raises or knows an option by name.

The exponential is ``exp(a x) 2**-c = power * scale`` with a whole exponent ``c``, so the reference costs no digit
however large ``x`` is: ``n = round(x a log2 e)``, ``f = x a log2 e - n`` by two fused multiply-adds on the high and low
part of ``a log2 e`` (the `rate`), ``power = 2**f`` by a polynomial, and ``scale = 2**(n - c)`` written straight into
exponent bits. ``a`` is 1 but for a temperature, which so costs no digit either.
"""

import functools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np


class Table(SimpleNamespace):
    """Functions or constants by name. It equals itself alone, so what is built over it is kept, and compiled once."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]  # a namespace has none


# log2 e as the sum of two float64
_LOG2E = Fraction(1.4426950408889634) + Fraction(2.0355273740931033e-17)
LN2 = 0.6931471805599453
# ln 2 in two parts, the first with so few bits that its whole multiples are exact; and log(1 + f) around it: FreeBSD
LN2_HEAD, LN2_TAIL = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_ROOT_HALF = np.float64(0.7071067811865476).view(np.int64)

# 2**f on [-1/2, 1/2] with 2**0 exactly 1: minimax in units of the result's last place (below 1 those are half as
# large), each coefficient rounded before the next is fitted. Worst error 0.035 of such a unit in float32, 0.029 in
# float64. With the roundings (0.5 the last step, 0.25 the one before, 0.25 those of f, 0.03 the rest) the exponential
# is within 1.06 units; the worst of 4 million logits in float32 was 1.014.
_EXP2_FLOAT32 = (
    1.0,
    0.6931471824645996,
    0.24022646248340607,
    0.05550359562039375,
    0.009618652053177357,
    0.0013390980893746018,
    0.00015291997988242656,
)
_EXP2_FLOAT64 = (
    1.0,
    0.6931471805599454,
    0.2402265069591011,
    0.055504108664815824,
    0.00961812910760205,
    0.0013333558147534163,
    0.00015403530447779295,
    1.5252732910929997e-05,
    1.3215439593125017e-06,
    1.017840203251084e-07,
    7.073095493513499e-09,
    4.4084973169412247e-10,
)

# tanh(y) = y + y z P(z) / Q(z) with z = y^2 up to |y| = 5/8, lowest power first: Cephes's tanhf and tanh
_TANH_FLOAT32 = (-0.333332819422, 0.133314422036, -0.0537397155531, 0.0206390887954, -0.00570498872745), (1.0,)
_TANH_FLOAT64 = (
    (-1.61468768441708447952e3, -9.92877231001918586564e1, -9.64399179425052238628e-1),
    (4.84406305325125486048e3, 2.23548839060100448583e3, 1.12811678491632931402e2, 1.0),
)


def _tanh_series(terms):
    """Coefficients of a, a^3, ... of tanh a, from tanh' = 1 - tanh^2."""
    series = [Fraction(1)]
    for n in range(1, terms):
        squares = sum((series[j] * series[n - 1 - j] for j in range(n)), Fraction(0))
        series.append(-squares / (2 * n + 1))
    return series


def _divergence_series(exponential, logarithm):
    """In u, u^2 and v^2: (e^u - 1 - u) / u^2; (a tanh a - log cosh a) / u^2, a = u / 2; atanh(v) / v."""
    first = [Fraction(1, math.factorial(k)) for k in range(2, exponential + 1)]
    second = [t * Fraction(2 * n - 1, 2 * n * 4**n) for n, t in enumerate(_tanh_series(exponential - 2), 1)]
    return first, second, [Fraction(1, 2 * j + 1) for j in range(logarithm)]


def _constants(real, integer, mantissa, coefficients, tanh, divergences, limit):
    bias = np.finfo(real).maxexp - 1
    return Table(
        type=real,
        shift=integer(mantissa),
        # adding 1.5 * 2**mantissa rounds to a whole number and leaves it in the low bits
        magic=real(1.5 * 2.0**mantissa + bias),
        bias=real(bias),
        zero=real(0),
        coefficients=tuple(real(c) for c in coefficients),
        tanh=tuple(tuple(real(c) for c in polynomial) for polynomial in tanh),
        divergences=tuple(tuple(real(float(c)) for c in series) for series in divergences),
        # from this exponent on the peak is subtracted first: exact there, and n stays far from the mantissa's end
        limit=real(limit),
    )


FLOAT32 = _constants(np.float32, np.int32, 23, _EXP2_FLOAT32, _TANH_FLOAT32, _divergence_series(10, 5), 2.0**20)
FLOAT64 = _constants(np.float64, np.int64, 52, _EXP2_FLOAT64, _TANH_FLOAT64, _divergence_series(18, 11), 2.0**49)


def _exactly(number):
    """Any real number, NumPy's too, as a fraction."""
    return number if isinstance(number, Fraction) else Fraction(float(number))


@functools.lru_cache
def rate(real, softcap=None, temperature=1.0):
    """``high, low, nats``: nats a unit of a logit, softcap / temperature, and nats log2(e) in two parts.

    With a softcap the logits are tanh(x / softcap), and the cap is part of the unit.
    """
    nats = _exactly(1.0 if softcap is None else softcap) / _exactly(temperature)
    high = real(float(nats * _LOG2E))
    return high, real(float(nats * _LOG2E - Fraction(float(high)))), real(float(nats))


# of a running sum, see `follow` in `build_terms`
LIFT, REACH, NO_EXPONENT = 32.0, 64.0, -(2.0**21)


class NumpyOps:
    """The arithmetic in plain NumPy, for arrays of one dtype or scalars; `state` and the tests use it."""

    where, rint, absolute, copysign, everywhere = np.where, np.rint, np.abs, np.copysign, np.all

    @staticmethod
    def function(body):
        return body

    @staticmethod
    def at_least(x, floor):
        return np.where(x < floor, floor, x)

    @staticmethod
    def to_float64(x):
        return np.asarray(x).astype(np.float64)

    @staticmethod
    def bits(x):
        x = np.asarray(x)
        same = {"f4": "i4", "i4": "f4", "f8": "i8", "i8": "f8"}
        return x.view(same[x.dtype.str[1:]])

    @staticmethod
    def fma(a, b, c):
        """a * b + c with the product exact: in float64 for float32, by Veltkamp's split for float64."""
        a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
        real = np.result_type(a, b, c)
        if real == np.float32:
            return (a.astype(np.float64) * b + c).astype(np.float32)
        product, total = a * b, a * b + c
        high_a, high_b = ((x * 134217729.0) - ((x * 134217729.0) - x) for x in (a, b))
        low_a, low_b = a - high_a, b - high_b
        lost = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
        back = total - product
        return total + (((product - (total - back)) + (c - back)) + lost)


@functools.cache
def build_terms(ops, real):
    """The functions of one logit over ``ops`` with the constants ``real`` (FLOAT32 or FLOAT64)."""
    fma, at_least, bits, where = ops.fma, ops.at_least, ops.bits, ops.where
    rint, function, absolute, copysign = ops.rint, ops.function, ops.absolute, ops.copysign
    everywhere = ops.everywhere
    shift, magic_zero, bias, limit, zero = real.shift, real.magic, real.bias, real.limit, real.zero
    one, minus_two, four, small = (real.type(number) for number in (1, -2, 4, 0.625))
    nothing, lift, reach_of_base = (real.type(number) for number in (-np.inf, LIFT, REACH))
    no_exponent = real.type(NO_EXPONENT)
    c, (over, under) = real.coefficients, real.tanh
    unit = rate(real.type)
    lowest = -bias / unit[0]

    @function
    def highest_terms_of_six(f):
        return fma(f, c[6], c[5])

    @function
    def highest_terms_of_eleven(f):
        p = fma(f, c[11], c[10])
        p = fma(p, f, c[9])
        p = fma(p, f, c[8])
        p = fma(p, f, c[7])
        p = fma(p, f, c[6])
        return fma(p, f, c[5])

    highest_terms = highest_terms_of_six if len(c) == 7 else highest_terms_of_eleven

    @function
    def polynomial(f):
        p = fma(highest_terms(f), f, c[4])
        p = fma(p, f, c[3])
        p = fma(p, f, c[2])
        p = fma(p, f, c[1])
        return fma(p, f, c[0])

    # a GPU has an instruction for 2**f in float32
    exp2_of_fraction = getattr(ops, "exp2", polynomial) if real.type is np.float32 else polynomial

    @function
    def shifted_by_operator(k, places):
        return bits(bits(k) << places)

    # numba-cuda widens an int32 that is shifted
    shifted = getattr(ops, "shifted", shifted_by_operator)

    @function
    def floor_of(exponent, rate):
        """Where exp(a x) 2**-exponent becomes 0; the one division is the same for all exponents."""
        return (exponent - bias) * (one / rate[0])

    @function
    def exp_of_fraction(x, rate, magic, floor):
        """``power, k``: exp(a x) 2**-c is power 2**n, and the last bits of k are those of n + bias, 0 at the floor."""
        x = at_least(x, floor)
        k = fma(x, rate[0], magic)
        f = fma(x, rate[1], fma(x, rate[0], magic - k))
        return exp2_of_fraction(f), k

    @function
    def exp_parts(x, rate, magic, floor):
        """``power, scale`` with ``power * scale = exp(a x) 2**-c``, and exactly 0 from 2**-(bias - 1/2) down.

        ``magic`` and ``floor`` stand for c and come from `reference`.
        """
        power, k = exp_of_fraction(x, rate, magic, floor)
        return power, shifted(k, shift)

    @function
    def reference(peak, rate):
        """``base, exponent, magic, floor`` for a sum whose largest logit is ``peak``.

        The sum is kept as S with exp(a base) 2**exponent S; base is 0 but for huge peaks, where x - peak is exact.
        """
        height = peak * rate[0]
        below = where(peak > -np.inf, where(height <= -limit, peak, zero), zero)
        base = where(height >= limit, peak, below)
        exponent = where(peak > -np.inf, rint((peak - base) * rate[0]), zero)
        return base, exponent, magic_zero - exponent, floor_of(exponent, rate)

    @function
    def rescale(base, exponent, new_base, new_exponent, rate):
        """exp(a base) 2**exponent over the same of the new reference: a power of two, exactly, where the bases agree.

        0 for an empty sum, whatever its base.
        """
        ahead = new_exponent - exponent
        power, scale = exp_parts(base - new_base, rate, magic_zero - ahead, floor_of(ahead, rate))
        return where(exponent == no_exponent, zero, power * scale)

    @function
    def follow(base, exponent, peak, rate):
        """``base, exponent, magic, floor, factor`` of a running sum whose largest logit has become ``peak``.

        The sum so far is to be multiplied by the factor. The exponent stays `LIFT` below that of the peak, so that a
        sum from which the largest logit is left out still has its digits; `NO_EXPONENT` belongs to an empty one. A base
        beside 0 moves only by `REACH` octaves, so that a rising row costs a sum no rounding at every step, and back to
        0 where that does for the peak: what came before, a finite mask perhaps, is no reason to keep one.
        """
        height, above_zero = (peak - base) * rate[0], peak * rate[0]
        reach = where(base == zero, limit, reach_of_base)
        own = where(above_zero >= limit, peak, where(above_zero <= zero - limit, peak, zero))
        base_now = where(height >= reach, own, where(height <= zero - reach, where(peak > nothing, own, base), base))
        exponent_now = where(peak > nothing, rint((peak - base_now) * rate[0]) - lift, exponent)
        factor = rescale(base, exponent, base_now, exponent_now, rate)
        return base_now, exponent_now, magic_zero - exponent_now, floor_of(exponent_now, rate), factor

    @function
    def exp_of_minus(size):
        """exp(-size) for size >= 0."""
        power, scale = exp_parts(zero - size, unit, magic_zero, lowest)
        return power * scale

    @function
    def by_division(x):
        return one / x

    # rounded division takes a GPU a dozen instructions
    reciprocal = getattr(ops, "reciprocal", by_division) if real.type is np.float32 else by_division

    @function
    def highest_terms_of_five(z):
        p = fma(z, over[4], over[3])
        p = fma(p, z, over[2])
        p = fma(p, z, over[1])
        return fma(p, z, over[0])

    @function
    def ratio_of_three_and_four(z):
        p = fma(z, over[2], over[1])
        q = fma(z + under[2], z, under[1])
        return fma(p, z, over[0]) / fma(q, z, under[0])

    near_zero = highest_terms_of_five if len(over) == 5 else ratio_of_three_and_four

    @function
    def tanh_near_zero(y):
        z = y * y
        value = fma(y * z, near_zero(z), y)
        return value, fma(zero - value, value, one)

    @function
    def tanh_anywhere(y):
        """The slope is 4 q / (1 + q)^2 with q = exp(-2 |y|), where 1 - tanh^2 would lose digits."""
        size = absolute(y)
        q = exp_of_minus(size + size)
        share = reciprocal(one + q)
        far = fma(minus_two * q, share, one)
        close, slope = tanh_near_zero(y)
        near = size < small
        return where(near, close, copysign(far, y)), where(near, slope, four * (q * share) * share)

    @function
    def tanh_parts(y):
        """``tanh(y)`` and its slope: in a third of the steps where a vector is near 0, as most are of most softcaps."""
        if everywhere(absolute(y) < small):
            return tanh_near_zero(y)
        return tanh_anywhere(y)

    def series(c):
        c0, c1 = c[:2]
        if len(c) == 2:
            return function(lambda x: fma(x, c1, c0))
        higher = series(c[1:])
        return function(lambda x: fma(higher(x), x, c0))

    exp_tail, entropy_of_half, atanh_over = (series(c) for c in real.divergences)
    half, two, tiny, ln2 = real.type(0.5), real.type(2.0), np.finfo(real.type).tiny, real.type(LN2)

    @function
    def divergence_terms(p, q, u):
        """What a class with probabilities p and q, u = log(q / p), adds to KL(p || q) and to JS(p, q): p (e^u - 1 - u)
        and (p + q)/2 (a tanh a - log cosh a), a = u / 2. Both are positive however close p and q are.
        """
        size, both = where(u < zero, zero - u, u), p + q
        near, square = size < one, u * u
        low = where(p < q, p, q)
        v = low / at_least(both + (both - low), tiny)
        far = both * (ln2 - two * (v * atanh_over(v * v))) - where(low > zero, low * size, zero)
        kl = where(near, p * (square * exp_tail(u)), (q - p) - where(p > zero, p * u, zero))
        return kl, half * where(near, both * (square * entropy_of_half(square)), far)

    return Table(
        floor_of=floor_of,
        exp_of_fraction=exp_of_fraction,
        exp_parts=exp_parts,
        reference=reference,
        rescale=rescale,
        follow=follow,
        exp_of_minus=exp_of_minus,
        tanh_parts=tanh_parts,
        divergence_terms=divergence_terms,
    )


@functools.cache
def build_rows(ops):
    """The functions of a row's sums over ``ops``, all float64; arrays of rows do as well as one row.

    A sum of exponentials is the pair of numbers ``total + low`` (low is the rounding error of total) with a reference:
    exp(a base) 2**exponent (total + low). An empty sum is total 0, whatever its reference. Logits are in their own
    units, and so are gaps; what is named nll, excess or whole gap is in nats.
    """
    where, rint, bits, to_float64, function = ops.where, ops.rint, ops.bits, ops.to_float64, ops.function
    exp_parts = build_terms(ops, FLOAT64).exp_parts
    magic, mantissa = FLOAT64.magic, FLOAT64.shift

    @function
    def clip(x, low, high):
        return where(x < low, low, where(x > high, high, x))

    @function
    def log1p(u):
        """log(1 + u) for u >= 0, within an ulp: the method of FreeBSD's s_log1p.c, whose coefficients these are."""
        w = 1.0 + u
        lost = (u - (w - 1.0)) / w
        exponent = (bits(w) - _ROOT_HALF) >> mantissa
        k = to_float64(exponent)
        f = bits(bits(w) - (exponent << mantissa)) - 1.0
        half_square = 0.5 * f * f
        s = f / (2.0 + f)
        z = s * s
        q = z * z
        odd = z * (_LOG[0] + q * (_LOG[2] + q * (_LOG[4] + q * _LOG[6])))
        even = q * (_LOG[1] + q * (_LOG[3] + q * _LOG[5]))
        tail = s * (half_square + (odd + even)) + (k * LN2_TAIL + lost)
        return k * LN2_HEAD - ((half_square - tail) - f)

    @function
    def power_of_two(exponent):
        """2**exponent for a whole exponent, 0 from -1023 down; at most 1023."""
        return bits(bits(clip(exponent, -1023.0, 1023.0) + magic) << mantissa)

    @function
    def exp_split(x, rate):
        """``power, n`` with exp(a x) = power 2**n and power about 1; n is held within 2**50."""
        most = 2.0**50 / rate[0]
        x = clip(x, -most, most)
        n = rint(x * rate[0])
        power, _ = exp_parts(x, rate, magic - n, x)
        return power, n

    @function
    def rebase(base, exponent, total, base_b, rate):
        """``exponent, total`` of the same sum under another base; unchanged when the bases are the same."""
        power, n = exp_split(base - base_b, rate)
        return exponent + n, total * power

    @function
    def add(exponent, total, low, exponent_b, total_b, low_b):
        """The sum of two sums of one base, under the larger reference: exact but for the rounding of total + low."""
        ahead = where(total_b == 0.0, -2048.0, where(total == 0.0, 2048.0, exponent_b - exponent))
        keep, take = power_of_two(-clip(ahead, 0.0, 2048.0)), power_of_two(clip(ahead, -2048.0, 0.0))
        a, b = total * keep, total_b * take
        s = a + b
        t = s - a
        error = ((a - (s - t)) + (b - t)) + (low * keep + low_b * take)
        return where(ahead > 0.0, exponent_b, exponent), s + error, error - ((s + error) - s)

    @function
    def join(base, exponent, total, low, base_b, exponent_b, total_b, low_b, rate):
        """``base, exponent, total, low`` of two sums whose bases may differ: the larger stays."""
        other = where(total == 0.0, True, where(total_b != 0.0, base_b > base, False))
        new_base = where(other, base_b, base)
        exponent, total = rebase(base, exponent, total, new_base, rate)
        exponent_b, total_b = rebase(base_b, exponent_b, total_b, new_base, rate)
        exponent, total, low = add(exponent, total, low, exponent_b, total_b, low_b)
        return new_base, exponent, total, low

    @function
    def add_gap(peak, gap, mass, peak_b, gap_b, mass_b):
        """``peak, gap, mass`` of two sets of classes: gap = sum w (peak - z), mass = sum w. Every term is positive."""
        top = where(peak_b > peak, peak_b, peak)
        lifted = gap + where(mass > 0.0, mass * (top - peak), 0.0)
        lifted_b = gap_b + where(mass_b > 0.0, mass_b * (top - peak_b), 0.0)
        return top, where(top > -np.inf, lifted + lifted_b, gap + gap_b), mass + mass_b

    @function
    def nll(base, exponent, total, target_logit, rate):
        """log(1 + others / exp(a target_logit)), the sum being that of the other classes: nothing cancels."""
        power, n = exp_split(target_logit - base, rate)
        ahead = where(total == 0.0, 0.0, exponent - n)
        far = ahead > 2.0**48  # beyond, `exp_split` holds n; a total of 2**-64 still counts beside the 1
        ratio = where(far, total * 2.0**64, (total / power) * power_of_two(clip(ahead, -2048.0, 900.0)))
        octaves = where(far, exponent - 64.0, clip(ahead - 900.0, 0.0, np.inf))
        value = log1p(ratio) + LN2 * octaves + where(far, (base - target_logit) * rate[2], 0.0)
        hopeless = where(total > 0.0, np.inf, np.nan)
        return where(target_logit < np.inf, where(target_logit > -np.inf, value, hopeless), np.nan)

    @function
    def excess(base, exponent, total, peak, target_logit, nll_of_target, rate):
        """lse - peak, where peak is the largest logit beside the target: like `nll`, without cancelling."""
        power, n = exp_split(peak - base, rate)
        others = (total / power) * power_of_two(exponent - n)
        own, m = exp_split(target_logit - peak, rate)
        below = log1p((others - 1.0) + own * power_of_two(clip(m, -2048.0, 0.0)))
        return where(target_logit > peak, (target_logit - peak) * rate[2] + nll_of_target, below)

    @function
    def whole_gap(gap, mass, excess_over_peak, target_weight, nll_of_target, rate):
        """sum w (lse - z) over all classes from the gap below the peak; a weight of 0 counts for nothing."""
        others = where(mass > 0.0, gap * rate[2] + mass * excess_over_peak, 0.0)
        return others + where(target_weight > 0.0, target_weight * nll_of_target, 0.0)

    @function
    def with_target(base, exponent, total, target_logit, rate):
        """``exponent, whole, miss, hit``: the whole row's sum and the shares of the others (1 - p_t) and the target."""
        power, n = exp_split(target_logit - base, rate)
        top = where(total > 0.0, where(n > exponent, n, exponent), n)
        others = total * power_of_two(exponent - top)
        own = where(target_logit < np.inf, power * power_of_two(n - top), np.nan)
        own = where(target_logit == -np.inf, 0.0, own)
        whole = others + own
        return top, whole, others / whole, own / whole

    @function
    def at_target(hit, smooth, extra, mass, share, miss, own):
        """The target's gradient extra p + smooth (R p - share) - hit (1 - p), where R = mass + share, mass the others':
        for p near 1 the bracket is mass - R (1 - p), so that a target which has all the mass keeps its digits.
        """
        spread = where(own > 0.5, mass - (mass + share) * miss, (mass + share) * own - share)
        return extra * own + smooth * spread - hit * miss

    @function
    def lse(base, exponent, whole, target_logit, nll_of_target, rate):
        """log sum exp of a row in nats: from its target where that is a good share of `with_target`'s whole sum, else
        from that sum: the two terms of a target far below would cancel.
        """
        log_of_whole = log1p(where(whole > 0.0, 2.0 * whole - 1.0, whole)) - LN2
        from_whole = where(
            whole > 0.0, base * rate[2] + LN2 * exponent + log_of_whole, where(whole == 0.0, -np.inf, whole)
        )
        return where(nll_of_target <= 1.0, target_logit * rate[2] + nll_of_target, from_whole)

    @function
    def entropy(excess_over_peak, drop, own, below, rate):
        """-sum p log p = (lse - peak) + sum p (peak - z) in nats: ``drop`` is that sum over the others, the target has
        the probability ``own`` and lies ``below`` the peak. Every term is positive.
        """
        return excess_over_peak + rate[2] * (drop + where(own > 0.0, own * below, 0.0))

    @function
    def binary_loss_and_slope(x, q, positive, negative):
        """positive log(1 + exp(-x)) + negative log(1 + exp(x)) and its derivative, from q = exp(-|x|).

        Where one of the two masses is 0, nothing is subtracted.
        """
        both, size = log1p(q), where(x < 0.0, 0.0 - x, x)
        wrong = where(x < 0.0, positive, negative)
        loss = (positive + negative) * both + where(wrong > 0.0, wrong * size, 0.0)
        near = 1.0 / (1.0 + q)
        far = q * near
        return loss, where(x < 0.0, negative * far - positive * near, negative * near - positive * far)

    return Table(
        log1p=log1p,
        power_of_two=power_of_two,
        exp_split=exp_split,
        rebase=rebase,
        add=add,
        join=join,
        add_gap=add_gap,
        nll=nll,
        excess=excess,
        whole_gap=whole_gap,
        with_target=with_target,
        at_target=at_target,
        lse=lse,
        entropy=entropy,
        binary_loss_and_slope=binary_loss_and_slope,
    )


NUMPY_ROWS = build_rows(NumpyOps)


def index_loss(nll, gap, target_weight, smoothing, classes):
    """(1-e) w_t (lse - z_t) + (e/V) sum_k w_k (lse - z_k); ``gap`` is that sum, not looked at where e = 0."""
    if smoothing == 0.0:
        return target_weight * nll
    spread = (smoothing / classes) * gap
    if smoothing == 1.0:
        return spread
    nothing = (target_weight == 0.0) & (nll == np.inf)
    return (1.0 - smoothing) * target_weight * np.where(nothing, 0.0, nll) + spread


def share_of(weight, probability, smoothing, classes):
    """w_k ((1-e) q_k + e/V): what class k weighs in the loss of probabilities, sum_k share_k (lse - z_k)."""
    return weight * ((1.0 - smoothing) * probability + smoothing / classes)
