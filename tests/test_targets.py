"""Dense and sparse probabilities, sample weights, axis and lse: what they mean beside class indices, by name."""

import numpy as np
import pytest
import scipy.special

import fastxent
from fastxent.bench.cases import Case
from tests import exact

BACKENDS = fastxent.backends.available()
SCALED = {"z_loss": 0.01, "temperature": 0.7}


def one_hot(targets, classes):
    return np.eye(classes)[targets]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, SCALED, {"label_smoothing": 0.2}, {"softcap": 4.0}], ids=str)
class TestSameMeaning:
    def both(self, logits, targets, backend, options):
        return fastxent.cross_entropy_with_grad(
            logits, targets, reduction="none", grad_output=np.arange(1.0, 9.0), backend=backend, **options
        )

    @pytest.mark.parametrize("kind", ["typical", "confident", "masked"])
    def test_one_hot_equals_index(self, backend, options, kind):
        logits, targets, _ = Case(8, 300, kind, "float64").build()
        if kind == "masked" and "label_smoothing" in options:
            pytest.skip("smoothing over -inf is inf, and inf is told nothing apart")
        want = self.both(logits, targets, backend, options)
        for other in (one_hot(targets, 300), (targets[:, None], np.ones((8, 1)))):
            got = self.both(logits, other, backend, options)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-14)
            np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-300)

    def test_sparse_equals_dense(self, backend, options):
        logits, (ids, probabilities), _ = Case(8, 300, "typical", "float64", targets="sparse").build()
        dense = np.zeros(logits.shape)
        used = ids != -100
        rows = np.broadcast_to(np.arange(8)[:, None], ids.shape)
        np.add.at(dense, (rows[used], ids[used]), probabilities[used])
        want = self.both(logits, dense, backend, options)
        got = self.both(logits, (ids, probabilities), backend, options)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-13)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-11, atol=1e-15)

    def test_sample_weight_scales_a_row(self, backend, options):
        logits, targets, _ = Case(8, 300, "typical", "float64").build()
        weight = np.linspace(0, 2, 8)
        plain = self.both(logits, targets, backend, options)
        scaled = self.both(logits, targets, backend, options | {"sample_weight": weight})
        np.testing.assert_allclose(scaled[0], weight * plain[0], rtol=1e-15)
        np.testing.assert_allclose(scaled[1], weight[:, None] * plain[1], rtol=1e-13, atol=1e-17)

    def test_temperature_divides(self, backend, options):
        if "temperature" in options or "softcap" in options:
            pytest.skip("has one already")
        logits, targets, _ = Case(8, 300, "typical", "float64").build()
        halved = fastxent.cross_entropy(logits, targets, temperature=2.0, backend=backend, **options)
        np.testing.assert_allclose(halved, fastxent.cross_entropy(logits / 2, targets, backend=backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
class TestCorners:
    def test_probability_0_on_minus_infinity_contributes_nothing(self, backend):
        loss, gradient = fastxent.cross_entropy_with_grad([[0.0, -np.inf, 0.0]], [[1.0, 0.0, 0.0]], backend=backend)
        np.testing.assert_allclose(loss, np.log(2))
        np.testing.assert_array_equal(gradient, [[-0.5, 0.0, 0.5]])

    def test_probability_on_minus_infinity_is_infinite(self, backend):
        assert fastxent.cross_entropy([[0.0, -np.inf]], [[0.5, 0.5]], backend=backend) == np.inf
        assert fastxent.cross_entropy([[0.0, -np.inf]], ([[1]], [[0.5]]), backend=backend) == np.inf

    def test_probabilities_need_not_sum_to_1(self, backend):
        loss = fastxent.cross_entropy([[1.0, 2.0]], [[0.5, 2.0]], backend=backend)
        lse = scipy.special.logsumexp([1.0, 2.0])
        np.testing.assert_allclose(loss, 2.5 * lse - 0.5 - 4.0, rtol=1e-15)

    def test_probabilities_of_nothing(self, backend):
        loss, gradient = fastxent.cross_entropy_with_grad([[1.0, 2.0]], [[0.0, 0.0]], backend=backend)
        assert loss == 0
        assert not gradient.any()
        assert fastxent.cross_entropy([[1.0, 2.0]], ([[-100]], [[1.0]]), backend=backend) == 0

    def test_mean_of_probabilities_divides_by_rows_and_by_sample_weight(self, backend):
        logits, probabilities, _ = Case(6, 40, targets="dense", dtype="float64").build()
        losses = fastxent.cross_entropy(logits, probabilities, reduction="none", weight=np.arange(40), backend=backend)
        mean = fastxent.cross_entropy(logits, probabilities, weight=np.arange(40), backend=backend)
        np.testing.assert_allclose(mean, losses.mean(), rtol=1e-15)
        weight = np.array([0, 1, 2, 0, 1, 1.0])
        mean = fastxent.cross_entropy(
            logits, probabilities, weight=np.arange(40), sample_weight=weight, backend=backend
        )
        np.testing.assert_allclose(mean, (losses * weight).sum() / 5, rtol=1e-15)

    def test_a_row_of_sample_weight_0_is_not_read(self, backend):
        logits = np.array([[np.nan, np.inf], [0.0, 0.0]])
        for targets in ([0, 1], [[1.0, 0.0], [0.0, 1.0]], ([[0], [1]], [[1.0], [1.0]])):
            loss, gradient = fastxent.cross_entropy_with_grad(logits, targets, sample_weight=[0, 3], backend=backend)
            np.testing.assert_allclose(loss, np.log(2), rtol=1e-15)
            np.testing.assert_array_equal(np.abs(gradient), [[0, 0], [0.5, 0.5]])

    def test_confident_probabilities_keep_their_digits(self, backend):
        logits = np.float32([[30, 0]])
        for targets in ([[1.0, 0.0]], ([[0]], [[1.0]])):
            loss, gradient = fastxent.cross_entropy_with_grad(logits, targets, backend=backend)
            assert loss == np.float32(9.3576230e-14)
            np.testing.assert_array_equal(gradient, np.float32([[-9.3576230e-14, 9.3576230e-14]]))

    def test_z_loss_of_a_target_at_minus_infinity(self, backend):
        loss, gradient = fastxent.cross_entropy_with_grad([[0.0, -np.inf, 0.0]], [1], z_loss=0.5, backend=backend)
        assert loss == np.inf
        half = 0.5 * (1 + np.log(2))
        np.testing.assert_allclose(gradient, [[half, -1, half]], rtol=1e-15)

    def test_softcap_bounds_infinite_logits(self, backend):
        loss = fastxent.cross_entropy([[-np.inf, np.inf]], [0], softcap=2.0, backend=backend)
        np.testing.assert_allclose(loss, np.log1p(np.exp(4.0)), rtol=1e-15)

    def test_softcap_keeps_small_logits(self, backend):
        logits = np.float32([[1e-3, -1e-3, 0]])
        loss = fastxent.cross_entropy(logits, [0], softcap=1e6, backend=backend)
        np.testing.assert_allclose(loss, fastxent.cross_entropy(logits, [0], backend=backend), rtol=3e-7)

    def test_z_loss_is_not_counted_where_the_target_is_ignored(self, backend):
        logits, targets = np.array([[1.0, 2.0], [5.0, 6.0]]), [0, -100]
        lse = scipy.special.logsumexp([1.0, 2.0])
        loss = fastxent.cross_entropy(logits, targets, z_loss=0.1, backend=backend)
        np.testing.assert_allclose(loss, (lse - 1) + 0.1 * lse**2, rtol=1e-15)

    def test_lse_of_rows_not_read_is_nan(self, backend):
        _, lse = fastxent.cross_entropy(np.zeros((3, 4)), [0, -100, 1], return_lse=True, backend=backend)
        np.testing.assert_allclose(lse, [np.log(4), np.nan, np.log(4)])

    def test_one_row(self, backend):
        loss, lse, gradient = fastxent.cross_entropy_with_grad([0.0, 0.0], 1, return_lse=True, backend=backend)
        assert (loss, lse) == (np.log(2), np.log(2))
        np.testing.assert_array_equal(gradient, [0.5, -0.5])
        assert fastxent.cross_entropy([0.0, 0.0], [0.25, 0.75], backend=backend) == np.log(2)
        np.testing.assert_allclose(fastxent.cross_entropy([0.0, 0.0], ([1], [1.0]), backend=backend), np.log(2))


def test_lse_goes_with_a_loss():
    with pytest.raises(TypeError, match="return_lse goes with cross_entropy"):
        fastxent.cross_entropy_grad([[0.0, 0.0]], [0], return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -2])
@pytest.mark.parametrize("targets", ["index", "dense", "sparse"])
def test_classes_along_any_axis(backend, axis, targets):
    logits, wanted, options = Case(24, 33, targets=targets, weights=True).build()
    options |= {"reduction": "none", "backend": backend, "z_loss": 0.1, "return_lse": True}
    if targets == "sparse":
        folded = tuple(part.reshape(2, 3, 4, 3) for part in wanted)
    elif targets == "dense":
        folded = np.moveaxis(wanted.reshape(2, 3, 4, 33), -1, axis)
    else:
        folded = wanted.reshape(2, 3, 4)
    cube = np.moveaxis(logits.reshape(2, 3, 4, 33), -1, axis)
    want = fastxent.cross_entropy_with_grad(logits, wanted, **options)
    options["sample_weight"] = options["sample_weight"].reshape(2, 3, 4)
    for array in (cube, np.ascontiguousarray(cube)):
        got = fastxent.cross_entropy_with_grad(array, folded, axis=axis, **options)
        for one, other in zip(got[:2], want[:2], strict=True):
            np.testing.assert_array_equal(one.reshape(-1), other)
        np.testing.assert_array_equal(np.moveaxis(got[2], axis, -1).reshape(24, 33), want[2])
        kept = array.copy(order="K")
        fastxent.cross_entropy_with_grad(kept, folded, axis=axis, out=kept, **options)
        np.testing.assert_array_equal(kept, got[2])


def test_out_of_any_layout():
    logits, targets, _ = Case(20, 70).build()
    want = fastxent.cross_entropy_grad(logits, targets)
    for out in (np.empty((70, 20), np.float32).T, np.empty((20, 140), np.float32)[:, ::2], np.empty((20, 70))[::-1]):
        assert fastxent.cross_entropy_grad(logits, targets, out=out) is out
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("target_dtype", ["float32", "float64", "float16", ">f4", ">f8"])
def test_probabilities_of_another_dtype(dtype, target_dtype):
    logits, probabilities, _ = Case(30, 200, dtype=dtype, targets="dense").build()
    probabilities = np.round(probabilities.astype(np.float64) * 64) / 64
    loss = fastxent.cross_entropy(logits, probabilities.astype(target_dtype))
    assert loss == fastxent.cross_entropy(logits, probabilities)
    want = fastxent.cross_entropy(logits.astype(np.float64), probabilities, backend="reference")
    np.testing.assert_allclose(loss, want, rtol=exact.LOSS[exact.computed(dtype)])


def test_torchs_ignored_rows_under_every_option():
    logits, targets, options = Case(60, 300, "typical", "float64", ignored=0.4, weights=True).build()
    options |= {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "temperature": 0.5}
    kept = targets != -100
    whole = fastxent.cross_entropy_with_grad(logits, targets, **options)
    options["sample_weight"] = options["sample_weight"][kept]
    part = fastxent.cross_entropy_with_grad(logits[kept], targets[kept], **options)
    np.testing.assert_allclose(whole[0], part[0], rtol=1e-14)
    np.testing.assert_allclose(whole[1][kept], part[1], rtol=1e-11, atol=1e-18)
    assert not whole[1][~kept].any()


def test_out_may_not_be_the_probabilities():
    probabilities = np.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="out must not overlap targets"):
        fastxent.cross_entropy_grad(np.zeros((2, 3)), probabilities, out=probabilities)
    np.testing.assert_array_equal(probabilities, 0.5)


def test_float32_probabilities_of_float64_logits_lose_no_digit():
    rng = np.random.default_rng(0)
    logits, teacher = rng.standard_normal((3, 17)), rng.random((3, 17)).astype(np.float32)
    for options in ({}, {"label_smoothing": 0.1}):
        found = [
            fastxent.cross_entropy_with_grad(logits, teacher, reduction="none", backend=backend, **options)
            for backend in ("cpu", "reference")
        ]
        wide = fastxent.cross_entropy_with_grad(logits, teacher.astype(np.float64), reduction="none", **options)
        for got in found:
            for figures, want in zip(got, wide, strict=True):
                np.testing.assert_allclose(figures, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_where_nothing_counts_there_is_no_warning(backend):
    logits, options = np.float32([[3, 1, 2]]), {"weight": [0, 0.5, 0.9], "backend": backend}
    loss, dlogits = fastxent.cross_entropy_with_grad(logits, [0], label_smoothing=0.5, **options)
    assert np.isinf(loss)
    assert np.isnan(dlogits).any()
    for more in ({"z_loss": 0.1}, {"z_loss": 0.1, "label_smoothing": 0.5}):
        assert np.isnan(fastxent.cross_entropy_hvp(logits, [0], np.ones((1, 3)), **more, **options)).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_tiny_softcap_of_a_few_probabilities_is_no_warning(backend):
    """Found by fuzzing: the square of a logit of so many softcaps is infinite."""
    targets = np.array([[1]]), np.array([[1.0]])
    loss = fastxent.cross_entropy(np.float32([[-0.8, 0.1, 0.2]]), targets, softcap=1e-30, backend=backend)
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
