"""Hessian-vector products and diagonals, against differences of the gradient and by their digits."""

import itertools

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import Case

BACKENDS = fastxent.backends.available()
OPTIONS = [
    dict(itertools.chain.from_iterable(option.items() for option in some))
    for some in itertools.product(
        ({}, {"label_smoothing": 0.2, "temperature": 1.3}), ({}, {"z_loss": 0.02}), ({}, {"softcap": 3.0})
    )
]


def slope(logits, targets, v, **options):
    """The derivative of the gradient along ``v``, by differences of order 4."""
    h = 1e-3
    near, far = (
        fastxent.cross_entropy_grad(logits + k * h * v, targets, **options)
        - fastxent.cross_entropy_grad(logits - k * h * v, targets, **options)
        for k in (1, 2)
    )
    return (8 * near - far) / (12 * h)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", ["index", "dense", "sparse"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_agrees_with_differences(backend, targets, options):
    logits, wanted, weights = Case(6, 20, "typical", "float64", 0.3, weights=True, targets=targets).build()
    options = options | weights | {"backend": backend}
    logits = logits / 2
    v = np.random.default_rng(0).standard_normal(logits.shape)
    got = fastxent.cross_entropy_hvp(logits, wanted, v, **options)
    np.testing.assert_allclose(got, slope(logits, wanted, v, **options), rtol=1e-6, atol=1e-9 * np.abs(got).max())
    diagonal = fastxent.cross_entropy_hessian_diag(logits, wanted, **options)
    columns = [fastxent.cross_entropy_hvp(logits, wanted, unit, **options)[:, k] for k, unit in enumerate(np.eye(20))]
    np.testing.assert_allclose(diagonal, np.stack(columns, axis=1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_keep_their_digits(backend):
    logits = np.array([[40.0, 0.0]])
    p = np.exp(-40.0)
    want = p / (1 + p) ** 2
    diagonal = fastxent.cross_entropy_hessian_diag(logits, [0], backend=backend)
    np.testing.assert_allclose(diagonal, [[want, want]], rtol=4e-15)
    product = fastxent.cross_entropy_hvp(logits, [0], [[1.0, 0.0]], backend=backend)
    np.testing.assert_allclose(product, [[want, -want]], rtol=4e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_axis_reduction_and_in_place(backend):
    logits, targets, _ = Case(24, 10, dtype="float64", ignored=0.4).build()
    options = {"reduction": "none", "grad_output": np.arange(24.0), "backend": backend}
    v = np.cos(np.arange(240.0)).reshape(24, 10)
    want = fastxent.cross_entropy_hvp(logits, targets, v, **options)
    assert not want[targets == -100].any()
    options["grad_output"] = options["grad_output"].reshape(2, 12)
    cube = np.moveaxis(logits.reshape(2, 12, 10), -1, 1)
    folded_v = np.moveaxis(v.reshape(2, 12, 10), -1, 1)
    got = fastxent.cross_entropy_hvp(cube, targets.reshape(2, 12), folded_v, axis=1, **options)
    np.testing.assert_array_equal(np.moveaxis(got, 1, -1).reshape(24, 10), want)
    kept = np.ascontiguousarray(cube)
    fastxent.cross_entropy_hvp(kept, targets.reshape(2, 12), folded_v, axis=1, out=kept, **options)
    np.testing.assert_array_equal(kept, got)


def test_in_place_of_the_vector():
    rng = np.random.default_rng(0)
    logits, v = rng.standard_normal((3, 700)), rng.standard_normal((3, 700))
    want = fastxent.cross_entropy_hvp(logits, [1, 2, 3], v)
    assert fastxent.cross_entropy_hvp(logits, [1, 2, 3], v, out=v) is v
    np.testing.assert_array_equal(v, want)


def test_errors():
    with pytest.raises(ValueError, match=r"v must broadcast to the logits' shape \(1, 2\); got \(3,\)"):
        fastxent.cross_entropy_hvp(np.zeros((1, 2)), [0], np.zeros(3))
    with pytest.raises(TypeError, match="v must hold real numbers"):
        fastxent.cross_entropy_hvp(np.zeros((1, 2)), [0], ["a", "b"])
    room = np.zeros(3)
    with pytest.raises(ValueError, match="out must be v itself or not overlap it"):
        fastxent.cross_entropy_hvp(np.zeros(2), 0, room[:2], out=room[1:])
    with pytest.raises(TypeError, match="return_lse"):
        fastxent.cross_entropy_hessian_diag(np.zeros((1, 2)), [0], return_lse=True)
