"""Hidden states that are on the device, on a simulated GPU: the losses and gradients of the host's, the scores of their
logits, and nobody waits for losses. The products are NumPy's.
"""

import ml_dtypes
import numpy as np
import pytest

import fastxent
from fastxent.backends.cuda import arrays, linear, run
from tests.test_cuda_device import STREAM, Array, fetched

ROWS, WIDTH, CLASSES = 7, 5, 45


class Matrix(Array):
    """An array of a library that multiplies."""

    def __getitem__(self, rows):
        return Matrix(self.numpy()[rows])

    def __setitem__(self, rows, values):
        self.numpy()[rows] = values.numpy()

    def __iadd__(self, other):
        self.room += other.numpy()
        return self

    @property
    def T(self):
        return Matrix(self.numpy().T)

    def reshape(self, shape):
        return Matrix(self.numpy().reshape(shape))

    def sum(self, axis):
        return Matrix(self.numpy().sum(axis))


class Library:
    """What `fastxent.backends.cuda.arrays` knows of a library."""

    one_stream = True

    def __init__(self):
        self.products = []

    def device(self, array):
        return 0

    def glance(self, array):
        return array.address, (array.shape, array.strides, array.dtype)

    def view(self, array):
        return arrays.View(array.address, array.shape, array.strides, array.dtype)

    def stream(self, array):
        return STREAM

    def empty(self, array, shape, dtype):
        return Matrix(np.zeros(shape, dtype))

    def product(self, a, b, dtype):
        assert a.dtype == b.dtype
        self.products.append((a.shape, b.shape))
        return Matrix((a.numpy().astype(np.float64) @ b.numpy().astype(np.float64)).astype(dtype))

    def converted(self, array, dtype):
        return array if array.dtype == dtype else Matrix(array.numpy().astype(dtype))


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    monkeypatch.setitem(arrays._KNOWN, Matrix, Library())
    return arrays._KNOWN[Matrix]


def problem(dtype=np.float32, rows=ROWS, classes=CLASSES):
    """Whole numbers, so that every product is exact: hidden, weight, bias, targets."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.integers(-2, 3, (rows, WIDTH)), rng.integers(-2, 3, (classes, WIDTH))
    targets = rng.integers(0, classes, rows)
    targets[1::4] = -100
    return hidden.astype(dtype), weight.astype(dtype), rng.integers(-2, 3, classes).astype(dtype), targets


OPTIONS = (
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "return_lse": True},
    {"reduction": "none", "softcap": 5.0, "temperature": 0.7},
    {"reduction": "sum", "ignore_index": None},
    {"denominator": 3.0, "weight": np.linspace(0, 2, CLASSES, dtype=np.float32)},
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("memory", [None, 3 * CLASSES * 8])
def test_the_values_of_the_host(dtype, options, memory):
    hidden, weight, bias, targets = problem(dtype)
    if options.get("ignore_index", 0) is None:
        targets = np.maximum(targets, 0)
    real = np.float64 if dtype == np.float64 else np.float32
    wide = {name: value.astype(real) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    want = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, linear_bias=bias, backend="cpu", **wide)
    there = {name: Matrix(value) if isinstance(value, np.ndarray) else value for name, value in wide.items()}
    given = Matrix(hidden), Matrix(weight), Matrix(targets)
    got = fastxent.linear_cross_entropy_with_grad(*given, linear_bias=Matrix(bias), memory=memory, **there)
    alone = fastxent.linear_cross_entropy(*given, linear_bias=Matrix(bias), memory=memory, **there)
    alone = alone if options.get("return_lse") else (alone,)
    for found, figures in zip(got, want, strict=True):
        figures = np.asarray(figures)
        assert found.dtype == figures.dtype
        np.testing.assert_allclose(
            found.numpy().astype(np.float64), figures.astype(np.float64),
            rtol=8 * float(ml_dtypes.finfo(figures.dtype).eps), atol=4 * float(ml_dtypes.finfo(dtype).eps),
        )  # fmt: skip
    for found, figures in zip(alone, got, strict=False):
        np.testing.assert_array_equal(fetched(found), fetched(figures))


@pytest.mark.parametrize("memory", [None, 3 * CLASSES * 8])
def test_probabilities(memory):
    hidden, weight, _, _ = problem()
    targets = np.random.default_rng(1).dirichlet(np.ones(CLASSES), ROWS).astype(np.float32)
    want = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, label_smoothing=0.1, backend="cpu")
    given = Matrix(hidden), Matrix(weight), Matrix(targets)
    got = fastxent.linear_cross_entropy_with_grad(*given, label_smoothing=0.1, memory=memory)
    for found, figures in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(found.numpy(), figures, rtol=1e-6, atol=1e-6)  # sums of terms up to 2


def test_blocks_change_no_bit_of_a_loss_and_nobody_waits(library):
    hidden, weight, _, targets = problem(classes=1203)
    given = Matrix(hidden), Matrix(weight), Matrix(targets)
    whole = fetched(fastxent.linear_cross_entropy(*given, reduction="none"))
    machine = run.runner().machine
    library.products.clear()
    machine.events.clear()
    blocks = fastxent.linear_cross_entropy(*given, reduction="none", memory=3 * 1203 * 4)
    events = list(machine.events)
    np.testing.assert_array_equal(fetched(blocks), whole)
    assert [shape[0] for shape, _ in library.products] == [3, 3, 1]
    assert {stream for stream, _ in events} == {STREAM}
    assert not {"wait", "to device"} & {name for _, name in events}


def test_upstream_gradients_and_leading_axes():
    hidden, weight, _, targets = problem(rows=6)
    targets, upstream = np.maximum(targets, 0), np.arange(6, dtype=np.float32)
    want = fastxent.linear_cross_entropy_with_grad(
        hidden.reshape(2, 3, WIDTH), weight, targets.reshape(2, 3), grad_output=upstream.reshape(2, 3), reduction="none"
    )
    got = fastxent.linear_cross_entropy_with_grad(
        Matrix(hidden.reshape(2, 3, WIDTH)), Matrix(weight), Matrix(targets.reshape(2, 3)),
        grad_output=Matrix(upstream.reshape(2, 3)), reduction="none", memory=1,
    )  # fmt: skip
    assert got[3] is None
    for found, figures in zip(got[:3], want[:3], strict=True):
        assert fetched(found).shape == figures.shape
        # entries of 5 at most, times 2, some of opposite signs
        np.testing.assert_allclose(fetched(found), figures, rtol=1e-6, atol=40 * np.finfo(np.float32).eps)


def test_an_upstream_gradient_that_is_a_number():
    hidden, weight, _, targets = problem(rows=6)
    targets = np.maximum(targets, 0)
    want = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, grad_output=8.0)
    got = fastxent.linear_cross_entropy_with_grad(
        Matrix(hidden), Matrix(weight), Matrix(targets), grad_output=8.0, memory=1
    )
    for found, figures in zip(got[:3], want[:3], strict=True):
        np.testing.assert_allclose(fetched(found), figures, rtol=1e-6, atol=40 * np.finfo(np.float32).eps)


def test_a_mean_over_no_rows_is_nan_with_its_gradient_too():
    hidden, weight, _, targets = problem(rows=0)
    loss, *_ = fastxent.linear_cross_entropy_with_grad(Matrix(hidden), Matrix(weight), Matrix(targets))
    assert np.isnan(fetched(loss))


def test_no_rows():
    given = Matrix(np.zeros((0, 3), np.float32)), Matrix(np.ones((4, 3), np.float32)), Matrix(np.zeros(0, np.int64))
    loss, dhidden, dweight, _ = fastxent.linear_cross_entropy_with_grad(*given, reduction="sum")
    assert fetched(loss) == 0.0
    assert dhidden.shape == (0, 3)
    np.testing.assert_array_equal(fetched(dweight), np.zeros((4, 3)))


@pytest.mark.parametrize("memory", [None, 1])
def test_scores_are_those_of_the_logits(memory):
    hidden, weight, bias, targets = problem()
    told = []
    options = {"top_k": 3, "ids": [0, 4], "softcap": 20.0}
    want = fastxent.score(hidden @ weight.T + bias, targets, backend="cuda", **options)
    got = fastxent.score_linear(
        Matrix(hidden), Matrix(weight), targets, linear_bias=Matrix(bias), memory=memory,
        progress=lambda *done: told.append(done), **options,
    )  # fmt: skip
    assert told[-1] == (5, 5)  # of seven, two are ignored
    for name, figures in want.as_dict().items():
        np.testing.assert_array_equal(got.as_dict()[name], figures, err_msg=name)


def test_a_target_out_of_range_is_an_index_error_at_once():
    hidden, weight, _, targets = problem()
    targets[2] = CLASSES
    with pytest.raises(IndexError, match=f"1 of 7 do not, the first in row 2 with value {CLASSES}"):
        fastxent.linear_cross_entropy(Matrix(hidden), Matrix(weight), Matrix(targets), check=True)


def test_the_news_of_a_call_that_does_not_come_to_its_end_is_that_of_an_earlier_one(library, monkeypatch):
    hidden, weight, _, targets = problem()
    given, product, blocks = (Matrix(hidden), Matrix(weight)), library.product, iter((True, False))
    wrong = np.where(np.arange(ROWS) == 0, CLASSES, targets)

    def no_memory_for_the_second(*of):
        if not next(blocks):
            raise MemoryError("out of beads")
        return product(*of)

    with monkeypatch.context() as patch:
        patch.setattr(library, "product", no_memory_for_the_second)
        with pytest.raises(MemoryError):
            fastxent.linear_cross_entropy(*given, Matrix(wrong), memory=2 * 8 * CLASSES)
    with pytest.raises(IndexError, match="targets of an earlier call on this stream are out of range: 1 of them"):
        fastxent.linear_cross_entropy(*given, Matrix(targets))
    assert np.isfinite(fetched(fastxent.linear_cross_entropy(*given, Matrix(targets), check=True)))


class TestErrors:
    def refused(self, error, message, hidden=None, weight=None, **options):
        found = problem()
        hidden = Matrix(found[0]) if hidden is None else hidden
        weight = Matrix(found[1]) if weight is None else weight
        with pytest.raises(error, match=message):
            fastxent.linear_cross_entropy_with_grad(hidden, weight, Matrix(found[3]), **options)

    def test_what_is_on_the_host(self):
        self.refused(TypeError, "linear_weight must be on the device too, in hidden's library", weight=np.ones((4, 5)))
        self.refused(TypeError, "on the device too, in hidden's library; got Array", weight=Array(np.ones((4, 5))))
        self.refused(TypeError, "are the cuda backend's", backend="cpu")

    def test_what_is_not_multiplied(self):
        self.refused(
            NotImplementedError, "must have one dtype.*got float32, float64", weight=Matrix(np.ones((CLASSES, WIDTH)))
        )
        self.refused(NotImplementedError, "wider than their products", linear_bias=Matrix(np.ones(CLASSES)))
        self.refused(NotImplementedError, "out must be None", out=(None, None, None))
        self.refused(
            NotImplementedError, "must be torch's or cupy's", Array(np.ones((7, 5))), Array(np.ones((CLASSES, 5)))
        )

    def test_what_does_not_fit(self):
        self.refused(ValueError, "linear_weight must have the shape", weight=Matrix(np.ones((4, 6), np.float32)))
        self.refused(ValueError, "linear_bias must have shape", linear_bias=Matrix(np.ones(3, np.float32)))
        self.refused(TypeError, "axis does not apply", axis=0)
        self.refused(ValueError, "memory must be positive", memory=0)


def test_blocks_have_room_for_what_is_made_of_them():
    hidden, weight, _, _ = problem(np.float16)
    layer = linear.Layer((Matrix(hidden), Matrix(weight), None))
    assert len(layer.blocks(ROWS * CLASSES * 4)) == 1
    assert len(layer.blocks(ROWS * CLASSES * 4, copies=2)) == 2
