"""Information measures of probabilities: worked values, scipy, conventions at 0, and the laws between them."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fastxent import information


def test_worked_values():
    assert information.self_information(0.5, base=2) == 1
    assert information.entropy([0.5, 0.5], base=2) == 1
    assert information.entropy(np.full(2**16, 2.0**-16), base=2) == 16
    assert information.entropy([0.99, 0.01], base=2) == pytest.approx(0.0807931, rel=1e-6)
    assert information.log_loss([1, 1, 0], [0.8, 0.7, 0.1]).sum() == pytest.approx(0.6852, abs=5e-5)
    assert information.self_information(1e-3, base=10) == pytest.approx(3, rel=1e-15)


def test_conventions_at_0():
    assert information.self_information(0.0) == np.inf
    assert information.self_information(1.0) == 0
    assert information.entropy([1.0, 0.0]) == 0
    assert information.kl_divergence([0.5, 0.5], [1.0, 0.0]) == np.inf
    assert information.kl_divergence([1.0, 0.0], [0.5, 0.5]) == pytest.approx(math.log(2), rel=1e-15)
    assert information.cross_entropy([0.5, 0.5], [1.0, 0.0]) == np.inf
    assert information.cross_entropy([1.0, 0.0], [1.0, 0.0]) == 0
    assert information.js_divergence([1.0, 0.0], [0.0, 1.0], base=2) == 1
    np.testing.assert_array_equal(information.log_loss([1, 0, 1, 0], [1, 0, 0, 1]), [0, 0, np.inf, np.inf])
    np.testing.assert_array_equal(information.log_loss_grad([1, 0, 0], [1, 0, 1]), [-1, 1, np.inf])


def test_clipping_bounds_the_loss_and_stops_the_gradient():
    assert information.log_loss(1, 0.0, clip=1e-6) == pytest.approx(-math.log(1e-6), rel=1e-15)
    assert information.log_loss(1, 0.25, clip=1e-6) == pytest.approx(-math.log(0.25), rel=1e-15)
    np.testing.assert_array_equal(information.log_loss_grad([1, 1], [0.0, 0.25], clip=1e-6), [0, -4])


distributions = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.lists(st.floats(1e-3, 1), min_size=n, max_size=n), min_size=2, max_size=2)
)


@given(distributions, st.sampled_from([math.e, 2, 10]))
@settings(deadline=None, max_examples=100)
def test_laws_and_scipy(weights, base):
    p, q = (np.array(row) / np.sum(row) for row in weights)
    kl = information.kl_divergence(p, q, base=base)
    both = information.cross_entropy(p, q, base=base)
    assert kl >= 0
    np.testing.assert_allclose(both, information.entropy(p, base=base) + kl, rtol=1e-13)
    np.testing.assert_allclose(information.entropy(p, base=base), scipy.stats.entropy(p, base=base), rtol=1e-13)
    np.testing.assert_allclose(kl * math.log(base), scipy.special.rel_entr(p, q).sum(), rtol=1e-9, atol=1e-15)
    js = information.js_divergence(p, q, base=base)
    assert 0 <= js <= math.log(2) / math.log(base) + 1e-15
    mean = (p + q) / 2
    half = (information.kl_divergence(p, mean, base=base) + information.kl_divergence(q, mean, base=base)) / 2
    np.testing.assert_allclose(js, half, rtol=1e-9, atol=1e-15)


def test_gradients_are_slopes():
    y, p, h = np.array([1.0, 0.0, 0.3]), np.array([0.3, 0.6, 0.9]), 1e-6
    slope = (information.log_loss(y, p + h, base=2) - information.log_loss(y, p - h, base=2)) / (2 * h)
    np.testing.assert_allclose(information.log_loss_grad(y, p, base=2), slope, rtol=1e-8)
    np.testing.assert_allclose(information.cross_entropy_grad([0.2, 0.8], [0.5, 0.5]), [-0.4, -1.6], rtol=1e-15)


def test_shapes_and_axis():
    p = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3))
    want = information.entropy(p)
    assert want.shape == (2, 3)
    np.testing.assert_array_equal(information.entropy(np.moveaxis(p, -1, 0), axis=0), want)
    assert information.kl_divergence(p, np.full(5, 0.2)).shape == (2, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "message"),
    [
        (information.entropy, [[0.5, 0.6]], {}, "p must sum to 1 along axis -1; got a sum of 1.1"),
        (information.entropy, [[1.5, -0.5]], {}, r"p must lie in \[0, 1\]; got 1.5"),
        (information.entropy, [[0.5, np.nan]], {}, r"p must lie in \[0, 1\]; got nan"),
        (information.entropy, [[0.5, 0.5]], {"base": 1}, "base must be positive, finite and not 1; got 1"),
        (information.entropy, [[0.5, 0.5]], {"axis": 2}, "axis must lie in"),
        (information.kl_divergence, [[0.5, 0.5], [0.2, 0.2, 0.6]], {}, "q must have as many classes as p, 2; got 3"),
        (information.cross_entropy, [[1.0], [0.5, 0.5]], {}, "q must have as many classes as p, 1; got 2"),
        (
            information.kl_divergence,
            [np.ones((2, 1)), np.ones((3, 1))],
            {},
            "q must broadcast with p; got",
        ),
        (information.log_loss, [2, 0.5], {}, r"y must lie in \[0, 1\]; got 2"),
        (information.log_loss, [1, 0.5], {"clip": 0.7}, r"clip must lie in \[0, 0.5\); got 0.7"),
    ],
)
def test_errors(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_ratios_of_subnormals_are_no_warning():
    assert information.cross_entropy_grad([1e-320, 0.0], [1e-320, 0.0]).tolist() == [-1.0, 0.0]
    assert information.cross_entropy_grad(0.5, 1e-320) == -np.inf
    assert information.log_loss_grad([1e-320, 1.0], [1e-320, 1.0]).tolist() == [0.0, -1.0]
