"""The exponential over its whole range and the sums of rows, against mpmath, in NumPy and compiled."""

import mpmath
import numpy as np
import pytest
from numba import njit

import fastxent
from fastxent import rowmath
from fastxent.backends.cpu.formulas import exp_parts, reference
from fastxent.backends.cpu.memory import load, store
from fastxent.backends.cpu.vector import LANES
from fastxent.state import ABSENT

RATE = rowmath.rate(np.float64)
REALS = {"float32": rowmath.FLOAT32, "float64": rowmath.FLOAT64}
ROWS = rowmath.build_rows(rowmath.NumpyOps)


def in_numpy(x, peak):
    terms = rowmath.build_terms(rowmath.NumpyOps, REALS[x.dtype.name])
    with np.errstate(invalid="ignore", over="ignore"):
        rate = rowmath.rate(x.dtype.type)
        base, exponent, magic, floor = terms.reference(peak, rate)
        power, scale = terms.exp_parts(x - base, rate, magic, floor)
        return base, exponent, power * scale


@njit(_nrt=False)
def _compiled(x, peak, rate, out):
    base, exponent, magic, floor = reference(peak, rate)
    for j in range(0, x.shape[0], LANES):
        power, scale = exp_parts(load(x, j) - base, rate, magic, floor)
        store(out, j, power * scale)
    return base, exponent


def compiled(x, peak):
    out = np.empty_like(x)
    base, exponent = _compiled(x, peak, rowmath.rate(x.dtype.type), out)
    return base, exponent, out


def ulps(got, x, base, exponent):
    """The worst error of ``got`` against exp(x - base) 2**-exponent, in units of the exact value's last place."""
    worst = 0
    with mpmath.workdps(40):
        for value, logit in zip(got, x, strict=True):
            exact = mpmath.exp(mpmath.mpf(float(logit)) - mpmath.mpf(float(base))) * mpmath.mpf(2) ** -int(exponent)
            worst = max(worst, abs(mpmath.mpf(float(value)) - exact) / float(np.spacing(x.dtype.type(float(exact)))))
    return float(worst)


@pytest.mark.parametrize("build", [in_numpy, compiled])
@pytest.mark.parametrize("base", [0.0, -1.0, 100.0, -5000.0, 1e5, 1e6, -1e6, 3e7, -1e9])
@pytest.mark.parametrize(("dtype", "reach"), [("float32", 86.5), ("float64", 700.0)])
def test_exponential_within_its_bound(build, base, dtype, reach):
    rng = np.random.default_rng(5)
    x = (base - reach * rng.random(2048)).astype(dtype)
    x[0] = base
    used_base, exponent, got = build(x, x[0])
    # the sum of its roundings, see rowmath
    assert ulps(got, x, used_base, exponent) <= 1.06


@pytest.mark.parametrize("build", [in_numpy, compiled])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestExponentialBeyond:
    def values(self, build, dtype, x, peak=0.0):
        padded = np.full(LANES, -np.inf, dtype)
        padded[: len(x)] = x
        return build(padded, padded.dtype.type(peak))[2][: len(x)]

    def test_far_below_the_reference_is_exactly_zero(self, build, dtype):
        lowest = np.finfo(dtype).min
        assert not self.values(build, dtype, [-np.inf, lowest, -1e30, -1e4]).any()

    def test_where_zero_begins(self, build, dtype):
        edge = -np.log(2.0) * (np.finfo(dtype).maxexp - 1.5)
        zero, normal = self.values(build, dtype, [edge - 0.01, edge + 0.01])
        assert zero == 0
        assert normal >= 0.99 * np.finfo(dtype).tiny / np.sqrt(2)

    def test_nan_and_infinity_do_not_vanish(self, build, dtype):
        assert np.isnan(self.values(build, dtype, [np.nan, np.inf])).all()
        assert np.isnan(self.values(build, dtype, [np.inf, 0.0], peak=np.inf)).all()

    def test_zero_is_one(self, build, dtype):
        assert self.values(build, dtype, [0.0])[0] == 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_base_moves_only_where_it_must(dtype):
    """Which costs a sum no rounding at the steps of a rising row, and a huge peak none of its digits."""
    terms, real = rowmath.build_terms(rowmath.NumpyOps, REALS[dtype]), np.dtype(dtype).type
    rate, huge = rowmath.rate(real), {"float32": 1e8, "float64": 1e17}[dtype]
    for base, peak, want in (
        (0.0, 5.0, 0.0), (0.0, -5.0, 0.0), (0.0, 700.0, 0.0), (0.0, huge, huge), (0.0, -huge, -huge),
        (huge, huge, huge), (huge, 0.0, 0.0), (-huge, 5.0, 0.0), (0.0, -np.inf, 0.0),
    ):  # fmt: skip
        with np.errstate(invalid="ignore", over="ignore"):
            found, *_ = terms.follow(real(base), real(rowmath.NO_EXPONENT), real(peak), rate)
        assert found == real(want), (base, peak)


def test_power_of_two():
    exponents = np.array([-5000.0, -1023.0, -1022.0, -1.0, 0.0, 1.0, 1023.0])
    np.testing.assert_array_equal(ROWS.power_of_two(exponents), [0, 0, 2.0**-1022, 0.5, 1, 2, 2.0**1023])


@pytest.mark.parametrize(
    ("sum_a", "sum_b", "want"),
    [
        ((0, 1.0), (0, 1.0), (0, 2.0)),
        ((10, 1.0), (0, 1.0), (10, 1 + 2**-10)),
        ((0, 1.0), (10, 1.0), (10, 1 + 2**-10)),
        ((3, 0.0), (-7, 1.5), (-7, 1.5)),
        ((3, 1.5), (99, 0.0), (3, 1.5)),
        ((5000, 1.0), (-5000, 1.0), (5000, 1.0)),
    ],
)
def test_sums_add_exactly(sum_a, sum_b, want):
    got = ROWS.add(*map(np.float64, sum_a), 0.0, *map(np.float64, sum_b), 0.0)
    assert tuple(map(float, got)) == (*want, 0.0)


def test_sums_with_different_bases_add():
    low, high = 2.0**20 - 4, 2.0**20
    logits = np.float32([[low, high, 0.0]])
    state = kernels_state(logits[:, :1]).merge(kernels_state(logits[:, 1:]))
    assert (state["base"], state["exponent"]) == (high, 0)
    np.testing.assert_allclose(state["total"], 1 + np.exp(-4.0), rtol=1e-7)


def kernels_state(logits):
    return fastxent.backends.get("cpu").accumulate(logits, np.array([ABSENT]))


def test_what_rounding_loses_is_kept():
    _, total, low = ROWS.add(np.float64(0), 1.0, 0.0, np.float64(-70), 1.0, 0.0)
    assert (total, low) == (1.0, 2.0**-70)


@pytest.mark.parametrize("margin", [-2e5, -745.0, -20.0, 0.0, 1e-8, 20.0, 60.0, 700.0])
def test_nll_against_mpmath(margin):
    with mpmath.workdps(60):
        exact = mpmath.log1p(mpmath.exp(-mpmath.mpf(margin)))
        got = float(ROWS.nll(np.float64(0), np.float64(0), np.float64(1), np.float64(margin), RATE))
        assert abs(mpmath.mpf(got) / exact - 1) < 6e-16


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_and_its_slope_within_their_bounds(dtype):
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.standard_normal(600) * scale for scale in (1e-6, 1e-2, 0.3, 1, 3)]).astype(dtype)
    capped, slope = rowmath.build_terms(rowmath.NumpyOps, REALS[dtype]).tanh_parts(y)
    eps = np.finfo(dtype).eps
    with mpmath.workdps(40):
        for got, own, x in zip(capped, slope, y, strict=True):
            exact = mpmath.tanh(mpmath.mpf(float(x)))
            assert abs(mpmath.mpf(float(got)) - exact) <= 2 * eps * abs(exact)
            exact = mpmath.sech(mpmath.mpf(float(x))) ** 2
            assert abs(mpmath.mpf(float(own)) - exact) <= 4 * eps * exact


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_has_the_same_bits_beside_numbers_of_any_size(dtype):
    terms = rowmath.build_terms(rowmath.NumpyOps, REALS[dtype])
    y = np.linspace(-0.6249, 0.6249, 999).astype(dtype)
    for alone, beside in zip(terms.tanh_parts(y), terms.tanh_parts(np.append(y, y.dtype.type(3))), strict=True):
        assert alone.tobytes() == beside[:-1].tobytes()


def test_tanh_at_the_ends():
    terms = rowmath.build_terms(rowmath.NumpyOps, rowmath.FLOAT32)
    with np.errstate(invalid="ignore"):
        capped, slope = terms.tanh_parts(np.float32([np.inf, -np.inf, np.nan, 50, 0]))
    np.testing.assert_array_equal(capped, [1, -1, np.nan, 1, 0])
    np.testing.assert_array_equal(slope, [0, 0, np.nan, 0, 1])
