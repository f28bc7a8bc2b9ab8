"""The fused linear loss against that of the whole product: to the bit where that is exact, else within its bound."""

import itertools
import subprocess
import sys
import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import threadpoolctl

import fastxent
from fastxent import arguments
from fastxent.blocks import Blocks, Tiles
from tests import exact

BACKENDS = [name for name in fastxent.backends.available() if name != "cuda"]
NAMES = "dhidden", "dlinear_weight", "dlinear_bias"
OPTIONS = (
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": True, "sample_weight": True, "z_loss": 1e-3},
    {"softcap": 5.0, "temperature": 0.8, "weight": True},
    {"label_smoothing": 1.0, "denominator": 7.0, "sample_weight": True},
    {"label_smoothing": 0.2, "softcap": 9.0, "weight": True, "sample_weight": True, "ignore_index": None},
)
# bytes: all rows at once, blocks of rows, blocks of rows and classes where the loss allows it
MEMORIES = None, 5_000_000, 400_000


def problem(rows=150, width=40, classes=5000, dtype="float32", whole=False, seed=0):
    """Hidden states, output matrix, bias and targets; ``whole`` numbers so small that any product of them is exact."""
    rng = np.random.default_rng(seed)
    shapes = (rows, width), (classes, width), classes
    if whole:
        arrays = [rng.integers(-2, 3, shape).astype(dtype) for shape in shapes]
    else:
        arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
        arrays[1] = (arrays[1] / np.sqrt(width)).astype(dtype)
    return *arrays, rng.integers(0, classes, rows)


def filled(options, rows, classes):
    """Options with arrays in place of True."""
    rng = np.random.default_rng(1)
    arrays = {
        "weight": np.where(rng.random(classes) < 0.1, 0.0, rng.random(classes) + 0.1),
        "sample_weight": np.where(rng.random(rows) < 0.2, 0.0, rng.random(rows) + 0.1),
    }
    return {name: arrays[name] if value is True else value for name, value in options.items()}


def of_kind(kind, targets, classes):
    """Class indices, some ignored; or probabilities of all classes, or of three."""
    rng, rows = np.random.default_rng(2), len(targets)
    if kind == "dense":
        return rng.dirichlet(np.ones(classes), rows)
    if kind == "sparse":
        return np.stack([targets, targets, rng.integers(0, classes, rows)], axis=1), rng.random((rows, 3))
    return np.where(rng.random(rows) < 0.3, -100, targets)


def product(hidden, weight, bias):
    return hidden.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)


def bound(hidden, weight, bias, eps):
    """What the rounding of a product in ``eps`` may move any logit of each row by, (N,)."""
    sums = np.abs(product(np.abs(hidden), np.abs(weight), np.abs(bias)))
    return (hidden.shape[1] + 2) * eps * sums.max(axis=1)


def wanted(hidden, matrix, bias, targets, **options):
    """Loss, lse and the three gradients in float64."""
    logits = product(hidden, matrix, bias)
    loss, lse, dlogits = fastxent.cross_entropy_with_grad(
        logits, targets, return_lse=True, backend="reference", **options
    )
    return loss, lse, (dlogits @ matrix.astype(np.float64), dlogits.T @ hidden.astype(np.float64), dlogits.sum(axis=0))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
class TestExactProduct:
    """Whole numbers: the logits are what they are however they are multiplied, so the losses are to the bit."""

    def test_losses(self, options, kind, memory):
        hidden, weight, bias, targets = problem(whole=True)
        targets, options = of_kind(kind, targets, 5000), filled(options, 150, 5000) | {"return_lse": True}
        options["ignore_index"] = -100
        logits = (hidden @ weight.T + bias).astype(np.float32)
        want, want_lse = fastxent.cross_entropy(logits, targets, **options)
        got, lse = fastxent.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, memory=memory, **options)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(lse, want_lse)

    def test_gradients(self, options, kind, memory):
        hidden, weight, bias, targets = problem(whole=True)
        targets, options = of_kind(kind, targets, 5000), filled(options, 150, 5000)
        options["ignore_index"] = -100
        logits = (hidden @ weight.T + bias).astype(np.float32)
        loss, dlogits = fastxent.cross_entropy_with_grad(logits, targets, **options)
        got, *gradients = fastxent.linear_cross_entropy_with_grad(
            hidden, weight, targets, linear_bias=bias, memory=memory, **options
        )
        np.testing.assert_array_equal(got, loss)
        dlogits, eps = dlogits.astype(np.float64), np.finfo(np.float32).eps
        sums = (
            (dlogits @ weight, np.abs(dlogits) @ np.abs(weight)),
            (dlogits.T @ hidden, np.abs(dlogits).T @ np.abs(hidden)),
        )
        for gradient, (want, terms), count in zip(gradients, sums, (5000, 150), strict=False):
            assert (np.abs(gradient - want) <= (count + 2) * eps * terms).all()
        want, terms = dlogits.sum(axis=0), np.abs(dlogits).sum(axis=0)
        assert (np.abs(gradients[2] - want) <= eps * (np.abs(want) + terms)).all()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("backend", BACKENDS)
class TestWithinTheBoundOfTheProduct:
    def test_loss(self, backend, dtype, memory):
        hidden, weight, bias, targets = problem(dtype=dtype)
        got, lse = fastxent.linear_cross_entropy(
            hidden, weight, targets, linear_bias=bias, reduction="none", return_lse=True, memory=memory, backend=backend
        )
        want, want_lse, _ = wanted(hidden, weight, bias, targets, reduction="none")
        computed = exact.computed(dtype)
        moved = 2 * bound(hidden, weight, bias, np.finfo(computed).eps)
        assert got.dtype == lse.dtype == computed
        assert (np.abs(got - want) <= moved + exact.LOSS[computed] * want).all()
        assert (np.abs(lse - want_lse) <= moved + 2 * exact.LOSS[computed] * np.abs(want_lse)).all()
        if backend == "reference" and computed == "float32":
            np.testing.assert_array_equal(got, want.astype(np.float32))

    def test_gradients(self, backend, dtype, memory):
        hidden, weight, bias, targets = problem(dtype=dtype)
        rows = {"reduction": "none", "grad_output": np.linspace(0.5, 2, 150)}
        _, *got = fastxent.linear_cross_entropy_with_grad(
            hidden, weight, targets, linear_bias=bias, memory=memory, backend=backend, **rows
        )
        logits, computed = product(hidden, weight, bias), exact.computed(dtype)
        dlogits = fastxent.cross_entropy_grad(logits, targets, backend="reference", **rows)
        eps = np.finfo(computed).eps
        # a logit moved by d moves an entry of the gradient of a row's loss by at most 2 d of itself
        off = (2 * bound(hidden, weight, bias, eps)[:, None] + exact.GRADIENT[computed]) * np.abs(dlogits)
        for number, (left, right) in enumerate(
            ((dlogits, weight), (dlogits.T, hidden), (dlogits.T, np.ones((150, 1))))
        ):
            right = right.astype(np.float64)
            errors = (off if number == 0 else off.T) + (left.shape[1] + 2) * eps * np.abs(left)
            want, allowed = left @ right, 1.01 * errors @ np.abs(right)
            gradient = got[number] if number < 2 else got[2][:, None]
            assert gradient.dtype == ("float32" if dtype.startswith("float8") else dtype), NAMES[number]
            of_number, absolutely = exact.rounding(gradient.dtype)
            allowed = allowed * (1 + of_number) + np.maximum(of_number * np.abs(want), absolutely)
            assert (np.abs(gradient.astype(np.float64) - want) <= allowed).all(), NAMES[number]


@pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_in_float64(backend, options, kind):
    hidden, weight, bias, targets = problem(30, 20, 700, "float64")
    targets, options = of_kind(kind, targets, 700), filled(options, 30, 700) | {"ignore_index": -100}
    want, want_lse, gradients = wanted(hidden, weight, bias, targets, **options)
    for memory in (None, 20_000):
        loss, lse, *got = fastxent.linear_cross_entropy_with_grad(
            hidden, weight, targets, linear_bias=bias, memory=memory, return_lse=True, backend=backend, **options
        )
        np.testing.assert_allclose(loss, want, 1e-13)
        np.testing.assert_allclose(lse[~np.isnan(lse)], want_lse[~np.isnan(lse)], 1e-13)
        for gradient, exactly in zip(got, gradients, strict=True):
            np.testing.assert_allclose(gradient, exactly, 1e-11, 1e-13 * np.abs(exactly).max())


def test_blocks_and_tiles_are_cut_as_the_memory_allows():
    layer = arguments.read_layer(np.zeros((600, 40), np.float32), np.zeros((20_000, 40), np.float32), None)[0]
    assert len(Blocks(layer, True, 64 << 20)) == 1
    by_rows = Blocks(layer, True, 16 << 20)
    assert len(by_rows) == 4
    assert by_rows._buffer.size <= 3 << 20
    assert Blocks(layer, True, 1)._buffer.size == 20_000
    for memory, blocks, step, threads in (
        (None, 1, 600, 2),
        (64 << 20, 1, 600, 2),
        (4 << 20, 1, 144, 1),
        (1, 600, 1, 1),
    ):
        tiles = Tiles(layer, True, memory)
        assert (len(tiles), tiles._step) == (blocks, step)
        assert tiles.workers._threads == min(threads, fastxent.get_num_threads())
        assert [stripe.start for stripe in tiles.stripes] == [0, 4096, 8192, 12288, 16384]


def test_confident_rows_keep_their_digits():
    hidden, weight, tiny = np.float32([[1, 2], [1, 2]]), np.float32([[4, 8], [0, 0]]), np.float32(2.0611537e-09)
    losses = fastxent.linear_cross_entropy(hidden, weight, [0, 1], reduction="none")
    np.testing.assert_array_equal(losses, np.float32([tiny, 20]))
    _, dhidden, dweight, _ = fastxent.linear_cross_entropy_with_grad(hidden[:1], weight, [0])
    np.testing.assert_array_equal(dhidden, [[-4 * tiny, -8 * tiny]])
    np.testing.assert_array_equal(dweight, [[-tiny, -2 * tiny], [tiny, 2 * tiny]])


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_threads_change_no_bit(memory, options):
    hidden, weight, bias, targets = problem()
    before, found = fastxent.get_num_threads(), []
    try:
        for threads in range(1, before + 1):
            fastxent.set_num_threads(threads)
            arguments = {"linear_bias": bias, "memory": memory, "reduction": "none"} | options
            gradients = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, **arguments)
            found.append((fastxent.linear_cross_entropy(hidden, weight, targets, **arguments), *gradients))
    finally:
        fastxent.set_num_threads(before)
    for one, other in itertools.pairwise(found):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_that_do_not_count_are_not_read(memory):
    hidden, weight, bias, targets = problem()
    targets[::3], kept = -100, np.arange(150) % 3 > 0
    sample_weight = np.ones(150)
    sample_weight[1::3], kept[1::3] = 0.0, False
    hidden[~kept] = np.nan
    loss, dhidden, dweight, dbias = fastxent.linear_cross_entropy_with_grad(
        hidden, weight, targets, linear_bias=bias, sample_weight=sample_weight, memory=memory
    )
    want = fastxent.linear_cross_entropy_with_grad(hidden[kept], weight, targets[kept], linear_bias=bias, memory=memory)
    np.testing.assert_allclose(loss, want[0], 1e-6)
    assert not dhidden[~kept].any()
    np.testing.assert_allclose(dhidden[kept], want[1], 1e-4, 1e-8)
    np.testing.assert_allclose(dweight, want[2], 1e-4, 1e-8)
    np.testing.assert_allclose(dbias, want[3], 1e-4, 1e-8)


class TestCorners:
    def test_no_row_counts(self):
        hidden, weight, bias, _ = problem(4, 3, 7)
        for reduction, want in (("mean", np.nan), ("sum", 0.0), ("none", np.zeros(4))):
            loss, *gradients = fastxent.linear_cross_entropy_with_grad(
                hidden, weight, [-100] * 4, linear_bias=bias, reduction=reduction
            )
            np.testing.assert_array_equal(loss, want)
            assert not any(gradient.any() for gradient in gradients)

    def test_no_rows(self):
        _, weight, _, _ = problem(4, 3, 7)
        loss, dhidden, dweight, dbias = fastxent.linear_cross_entropy_with_grad(
            np.empty((0, 3), np.float32), weight, np.empty(0, int)
        )
        assert np.isnan(loss)
        assert dhidden.shape == (0, 3)
        assert not dweight.any()
        assert dbias is None

    def test_one_class(self):
        loss, *gradients = fastxent.linear_cross_entropy_with_grad([[1.0, 2.0]], [[3.0, 4.0]], [0])
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients[:2])

    def test_a_bad_row_is_nan_alone(self):
        hidden, weight, _, targets = problem(9, 5, 300)
        hidden[4] = np.nan
        losses, dhidden, _, _ = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, reduction="none")
        np.testing.assert_array_equal(np.isnan(losses), np.arange(9) == 4)
        np.testing.assert_array_equal(np.isnan(dhidden).all(axis=1), np.arange(9) == 4)

    def test_a_product_that_overflows(self):
        hidden, weight, _, targets = problem(9, 5, 300)
        hidden[4], hidden[6] = 3e38, np.inf
        losses = fastxent.linear_cross_entropy(hidden, 8 * weight, targets, reduction="none")
        np.testing.assert_array_equal(np.isnan(losses), np.isin(np.arange(9), (4, 6)))

    def test_one_wide_input_makes_all_wide(self):
        hidden, weight, bias, targets = problem(9, 5, 300)
        for number in range(3):
            arrays = [hidden, weight, bias]
            arrays[number] = arrays[number].astype(np.float64)
            loss, *gradients = fastxent.linear_cross_entropy_with_grad(*arrays[:2], targets, linear_bias=arrays[2])
            want, _, _ = wanted(hidden, weight, bias, targets)
            assert loss.dtype == np.float64
            np.testing.assert_allclose(loss, want, 1e-14)
            assert [gradient.dtype for gradient in gradients] == [array.dtype for array in arrays]

    @pytest.mark.parametrize("memory", MEMORIES)
    def test_classes_masked_by_the_bias(self, memory):
        hidden, weight, bias, targets = problem(whole=True)
        bias[4096:] = -np.inf
        targets %= 4096
        want = fastxent.cross_entropy(hidden @ weight[:4096].T + bias[:4096], targets, reduction="none")
        got = fastxent.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, memory=memory, reduction="none")
        np.testing.assert_array_equal(got, want)

    def test_axes_and_layouts(self):
        hidden, weight, _, targets = problem(24, 8, 50, whole=True)
        want = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, reduction="none")
        axes = np.moveaxis(hidden.reshape(2, 3, 4, 8), 1, 2)
        got = fastxent.linear_cross_entropy_with_grad(
            np.ascontiguousarray(axes).swapaxes(1, 2), weight, targets.reshape(2, 3, 4), reduction="none"
        )
        np.testing.assert_array_equal(got[0], want[0].reshape(2, 3, 4))
        assert got[1].shape == (2, 3, 4, 8)
        for other in (
            np.asfortranarray(weight),
            weight[:, ::-1][:, ::-1],
            weight.astype(">f4"),
            weight.repeat(2, 1)[:, ::2],
        ):
            np.testing.assert_array_equal(
                fastxent.linear_cross_entropy(hidden, other, targets, reduction="none"), want[0]
            )
        assert fastxent.linear_cross_entropy(hidden[3], weight, targets[3]) == want[0][3]

    def test_a_half_matrix_under_float32_hidden_states(self):
        hidden, weight, _, targets = problem(whole=True)
        want = fastxent.linear_cross_entropy(hidden, weight, targets)
        for dtype in ("float16", ml_dtypes.bfloat16, "float8_e5m2"):
            assert fastxent.linear_cross_entropy(hidden, weight.astype(dtype), targets) == want


class TestOut:
    @pytest.mark.parametrize("memory", MEMORIES)
    @pytest.mark.parametrize("wide", ["float32", "float64"])
    def test_gradients_go_there(self, memory, wide):
        hidden, weight, bias, targets = problem(dtype="float16")
        targets[::4] = -100
        out = tuple(np.full(array.shape, np.nan, wide) for array in (hidden, weight, bias))
        got = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, linear_bias=bias, out=out, memory=memory)
        want = fastxent.linear_cross_entropy_with_grad(
            *(array.astype(np.float32) for array in (hidden, weight)),
            targets,
            linear_bias=bias.astype(np.float32),
            memory=memory,
        )
        assert got[0] == want[0]
        for number in range(3):
            assert got[1 + number] is out[number]
            np.testing.assert_allclose(out[number], want[1 + number], 1e-4, 1e-8)

    def test_some_are_given(self):
        hidden, weight, _, targets = problem(5, 4, 30)
        dweight = np.empty_like(weight)
        got = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, out=(None, dweight, None))
        assert got[2] is dweight
        assert got[1].shape == hidden.shape


class TestWanted:
    """The gradients that are asked for, and no product or array for another."""

    @pytest.mark.parametrize("memory", [None, 100_000])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_some_are(self, dtype, memory):
        hidden, weight, bias, targets = problem(dtype=dtype)
        targets[3] = -100
        given, options = (hidden, weight, targets), {"linear_bias": bias, "memory": memory}
        want = fastxent.linear_cross_entropy_with_grad(*given, **options)
        for asked in itertools.product((True, False), repeat=3):
            loss, *gradients = fastxent.linear_cross_entropy_with_grad(*given, wanted=asked, **options)
            assert loss == want[0]
            for one, got, exactly in zip(asked, gradients, want[1:], strict=True):
                if one:
                    np.testing.assert_array_equal(got, exactly)
                else:
                    assert got is None

    def test_a_frozen_matrix_takes_no_memory(self):
        hidden, weight, _, targets = problem(rows=8, width=512, classes=20_000)
        tracemalloc.start()
        fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, wanted=(True, False, False))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < weight.nbytes / 4

    def test_on_a_device(self, monkeypatch):
        from fastxent.backends.cuda import arrays
        from tests import test_cuda_linear as device

        monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
        monkeypatch.setitem(arrays._KNOWN, device.Matrix, library := device.Library())
        hidden, weight, bias, targets = device.problem()
        given = [device.Matrix(array) for array in (hidden, weight, targets)]
        want = fastxent.linear_cross_entropy_with_grad(*given, linear_bias=device.Matrix(bias))
        for asked in itertools.product((True, False), repeat=3):
            library.products.clear()
            loss, *got = fastxent.linear_cross_entropy_with_grad(*given, linear_bias=device.Matrix(bias), wanted=asked)
            assert loss.numpy() == want[0].numpy()
            assert len(library.products) == 1 + sum(asked[:2])
            for one, found, exactly in zip(asked, got, want[1:], strict=True):
                if one:
                    np.testing.assert_array_equal(found.numpy(), exactly.numpy())
                else:
                    assert found is None

    def test_errors(self):
        for asked in ([True] * 3, (True, True), (1, 1, 1)):
            with pytest.raises(TypeError, match="wanted must be a tuple of a bool for each of hidden, linear_weight"):
                fastxent.linear_cross_entropy_with_grad(HIDDEN, WEIGHT, TARGETS, wanted=asked)
        out = None, np.empty_like(WEIGHT), None
        with pytest.raises(
            ValueError, match=r"out\[1\] must be None where the gradient of linear_weight is not wanted"
        ):
            fastxent.linear_cross_entropy_with_grad(HIDDEN, WEIGHT, TARGETS, out=out, wanted=(True, False, False))


@pytest.mark.parametrize("memory", MEMORIES)
def test_scores_are_those_of_the_logits(memory):
    hidden, weight, bias, targets = problem(whole=True)
    options = {"top_k": 4, "ids": [7, 3], "temperature": 0.7, "shift": 2}
    targets = of_kind("index", targets, 5000).reshape(10, 15)
    want = fastxent.score((hidden @ weight.T + bias).reshape(10, 15, 5000), targets, **options)
    told = []
    got = fastxent.score_linear(
        hidden.reshape(10, 15, 40), weight, targets, linear_bias=bias, memory=memory,
        progress=lambda *done: told.append(done), **options,
    )  # fmt: skip
    assert got == want
    assert told[-1] == (want.valid.sum(),) * 2


def test_scores_of_nothing():
    scores = fastxent.score_linear(np.zeros((3, 2)), np.zeros((4, 2)), [-100] * 3, top_k=2)
    assert scores == fastxent.score(np.zeros((3, 4)), [-100] * 3, top_k=2)


def test_reference_scores():
    hidden, weight, _, targets = problem(9, 5, 300, whole=True)
    got = fastxent.score_linear(hidden, weight, targets, top_k=3, backend="reference")
    assert got == fastxent.score(hidden @ weight.T, targets, top_k=3, backend="reference")


class TestThreadPools:
    def blas_threads(self):
        """Of NumPy's; a library that is loaded later may bring another, which makes no product of ours."""
        pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        own = [pool["num_threads"] for pool in pools if "numpy" in pool["filepath"]]
        return own or [pool["num_threads"] for pool in pools]

    def test_blas_has_its_threads_again(self):
        hidden, weight, _, targets = problem()
        before = self.blas_threads()
        during = []
        fastxent.score_linear(hidden, weight, targets, progress=lambda *_: during.append(self.blas_threads()))
        assert set(during[0]) == {1}
        assert self.blas_threads() == before

    def test_after_an_error_in_the_middle(self):
        hidden, weight, _, targets = problem()
        before = self.blas_threads()
        with pytest.raises(ZeroDivisionError):
            fastxent.score_linear(hidden, weight, targets, progress=lambda done, rows: done / 0)
        assert self.blas_threads() == before

    def test_many_calls_at_once(self):
        hidden, weight, _, targets = problem()
        want, got, before = fastxent.linear_cross_entropy(hidden, weight, targets), [], self.blas_threads()

        def call():
            got.extend(fastxent.linear_cross_entropy(hidden, weight, targets) for _ in range(5))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [want] * 20
        assert self.blas_threads() == before


HIDDEN, WEIGHT, BIAS, TARGETS = problem(3, 4, 5)
ERRORS = {
    "integer hidden": (TypeError, "hidden must have one of the dtypes", {"hidden": HIDDEN.astype(int)}),
    "integer matrix": (TypeError, "linear_weight must have one of the dtypes", {"linear_weight": WEIGHT.astype(int)}),
    "integer bias": (TypeError, "linear_bias must have one of the dtypes", {"linear_bias": BIAS.astype(int)}),
    "no width": (ValueError, r"hidden must have the shape \(..., K\) with K at least 1", {"hidden": HIDDEN[:, :0]}),
    "widths that differ": (
        ValueError,
        r"linear_weight must have the shape \(V, 4\) with V at least 1, a row of hidden's width .* got \(5, 3\)",
        {"linear_weight": WEIGHT[:, :3]},
    ),
    "no class": (ValueError, r"with V at least 1.* got \(0, 4\)", {"linear_weight": WEIGHT[:0]}),
    "a short bias": (ValueError, r"linear_bias must have shape \(5,\), one number a class", {"linear_bias": BIAS[:4]}),
    "a target out of range": (IndexError, r"targets must lie in \[0, 4\]", {"targets": [0, 1, 5]}),
    "axis": (TypeError, "axis does not apply: the classes are the rows of linear_weight", {"axis": 1}),
    "an unknown option": (TypeError, "unknown option 'smoothing'", {"smoothing": 0.1}),
    "memory of a text": (TypeError, "memory must be a whole number of bytes or None, not '1GB'", {"memory": "1GB"}),
    "no memory": (ValueError, "memory must be positive; got 0", {"memory": 0}),
}  # fmt: skip
OUT_ERRORS = {
    "one array": (ValueError, "out must be a tuple of an array or None for each of hidden, linear_weight", HIDDEN),
    "a wrong shape": (ValueError, r"out\[1\] must have", (None, WEIGHT[:2].copy(), None)),
    "an input": (ValueError, r"out\[0\] must not overlap an input", (HIDDEN, None, None)),
    "no bias": (ValueError, r"out\[2\] must be None without linear_bias", (None, None, BIAS.copy())),
    "strided": (ValueError, r"out\[1\] must be C-contiguous", (None, np.empty((4, 5), np.float32).T, None)),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_with_grad"])
def test_errors(name, error):
    kind, message, changed = ERRORS[error]
    call = {"hidden": HIDDEN, "linear_weight": WEIGHT, "targets": TARGETS} | changed
    with pytest.raises(kind, match=message):
        getattr(fastxent, name)(**call)


@pytest.mark.parametrize("error", OUT_ERRORS)
def test_errors_of_out(error):
    kind, message, out = OUT_ERRORS[error]
    with pytest.raises(kind, match=message):
        fastxent.linear_cross_entropy_with_grad(HIDDEN, WEIGHT, TARGETS, out=out)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_with_grad", "score_linear"])
def test_cuda_says_that_it_lacks_them(name, monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    with pytest.raises(NotImplementedError, match="the cuda backend multiplies what is on its device"):
        getattr(fastxent, name)(HIDDEN, WEIGHT, TARGETS, backend="cuda")


WATCHED = """
import sys, threading, time
import numpy as np, fastxent
from tests.processes import anonymous_megabytes

gradients, dtype, ignored, rows, width, classes = sys.argv[1] == "gradients", sys.argv[2], *map(int, sys.argv[3:])
rng = np.random.default_rng(0)
hidden = rng.standard_normal((rows, width), dtype=np.float32).astype(dtype)
weight = rng.standard_normal((classes, width), dtype=np.float32).astype(dtype)
targets = rng.integers(0, classes, rows)
targets[:ignored:2] = -100
out = tuple(np.zeros(array.shape, np.float32) for array in (hidden, weight)) + (None,)

def call(rows):
    if gradients:
        fastxent.linear_cross_entropy_with_grad(hidden[:rows], weight, targets[:rows], out=(out[0][:rows], *out[1:]))
    else:
        fastxent.linear_cross_entropy(hidden[:rows], weight, targets[:rows])

call(4)
before = highest = anonymous_megabytes("self")
thread = threading.Thread(target=call, args=(rows,))
thread.start()
while thread.is_alive():
    highest = max(highest, anonymous_megabytes("self"))
    time.sleep(0.002)
print(highest - before)
"""


def watched(*arguments):
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("gradients", "most"), [("loss", 64), ("gradients", 256)])
def test_memory_stays_bounded(gradients, most, dtype):
    """The logits would be 819 MB; a third of the rows are ignored, so hidden states are gathered."""
    assert watched(gradients, dtype, 1024, 2048, 32, 100_000) <= most * 2**20 / 1e6


@pytest.mark.slow
@pytest.mark.parametrize(("gradients", "most"), [("loss", 64), ("gradients", 256)])
def test_memory_of_a_large_vocabulary(gradients, most):
    """8,192 tokens of a vocabulary of 128,256: 4.2 GB of logits."""
    assert watched(gradients, "float32", 0, 8192, 1024, 128_256) <= most * 2**20 / 1e6
