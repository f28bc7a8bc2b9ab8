"""cross_entropy and its gradient on every backend, against exact arithmetic, scipy, and the laws they obey."""

import functools
import inspect

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxent
from fastxent.arguments import Options
from fastxent.bench.cases import AGREEMENT, Case
from tests import exact

BACKENDS = fastxent.backends.available()


@functools.cache
def exact_of(case):
    return exact.Exact(case)


def tiny(dtype):
    return np.finfo(dtype).tiny


def spread(logits):
    """The largest difference within a row: plain NumPy rounds z - z_t in float64 before the exponential."""
    finite = np.where(np.isfinite(logits), logits, np.nan)
    return (np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1)).max()


@pytest.mark.parametrize("case", AGREEMENT, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
class TestAgreement:
    def test_loss(self, backend, case):
        want = exact_of(case)
        got = fastxent.cross_entropy(want.logits, want.targets, backend=backend, **want.options)
        computed = exact.computed(case.dtype)
        assert got.dtype == computed
        allowed = want.loss_budget
        if backend == "reference" and case.dtype == "float64":
            allowed += np.finfo(np.float64).eps * spread(want.logits)
        scale = np.abs(want.loss) + want.loss_slack / allowed
        exact.assert_close(got, want.loss, scale, allowed, tiny(computed))

    def test_gradient(self, backend, case):
        want = exact_of(case)
        arguments = {"logits": want.logits, "targets": want.targets, "backend": backend} | want.options
        loss, lse, gradient = fastxent.cross_entropy_with_grad(**arguments, return_lse=True)
        np.testing.assert_array_equal(loss, fastxent.cross_entropy(**arguments))
        budget = exact.LOSS[exact.computed(case.dtype)]
        # z_t + nll may cancel: held to the span of its row
        atol = 2 * budget * spread(want.logits) / want.options.get("temperature", 1.0) + 3 * want.loss_slack.max()
        np.testing.assert_allclose(lse.astype(exact.REAL), want.lse, 2 * budget, atol)
        assert gradient.dtype == ("float32" if case.dtype.startswith("float8") else case.dtype)
        assert not gradient[~want.counted].any()
        computed = exact.computed(case.dtype)
        allowed = want.gradient_budget
        if backend == "reference" and case.dtype == "float64":
            allowed += 2 * np.finfo(np.float64).eps * spread(want.logits)
        exact.assert_close(gradient, want.gradient, want.terms, allowed, tiny(computed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("margin", "loss"), [(20, 2.0611537e-09), (30, 9.3576230e-14), (60, 8.7565108e-27), (87, 1.6458115e-38)]
)
def test_confident_rows_keep_their_digits(backend, margin, loss):
    got, gradient = fastxent.cross_entropy_with_grad(np.float32([[margin, 0]]), [0], backend=backend)
    assert got == np.float32(loss)
    assert gradient[0, 0] == -got
    assert gradient[0, 1] == got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestCorners:
    def losses(self, backend, rows, targets, dtype, **options):
        logits = np.array(rows, dtype)
        return fastxent.cross_entropy_with_grad(logits, targets, reduction="none", backend=backend, **options)

    def test_all_rows_ignored(self, backend, dtype):
        logits, targets = np.full((3, 5), np.nan, dtype), [-100] * 3
        for reduction, want in (("mean", np.nan), ("sum", 0.0), ("none", np.zeros(3))):
            loss, gradient = fastxent.cross_entropy_with_grad(logits, targets, reduction=reduction, backend=backend)
            np.testing.assert_array_equal(loss, want)
            assert not gradient.any()

    def test_no_rows(self, backend, dtype):
        logits, targets = np.empty((0, 5), dtype), np.empty(0, int)
        assert np.isnan(fastxent.cross_entropy(logits, targets, backend=backend))
        assert fastxent.cross_entropy(logits, targets, reduction="sum", backend=backend) == 0
        assert fastxent.cross_entropy(logits, targets, reduction="none", backend=backend).shape == (0,)
        assert fastxent.cross_entropy(logits, targets, denominator=1, backend=backend) == 0

    def test_one_class(self, backend, dtype):
        loss, gradient = self.losses(backend, [[3.0], [-np.inf]], [0, 0], dtype)
        np.testing.assert_array_equal(loss, [0, np.nan])
        assert gradient[0, 0] == 0

    def test_ignored_row_is_not_read(self, backend, dtype):
        loss, gradient = self.losses(backend, [[np.nan, np.inf], [0, 0]], [-100, 1], dtype)
        np.testing.assert_allclose(loss, [0, np.log(2)], rtol=1e-7)
        assert not gradient[0].any()

    def test_minus_infinity_off_target(self, backend, dtype):
        loss, gradient = self.losses(backend, [[0, -np.inf, 0]], [0], dtype)
        np.testing.assert_allclose(loss, [np.log(2)], rtol=1e-7)
        np.testing.assert_array_equal(gradient, [[-0.5, 0, 0.5]])

    def test_minus_infinity_on_target(self, backend, dtype):
        loss, gradient = self.losses(backend, [[0, -np.inf, 0]], [1], dtype)
        assert loss[0] == np.inf
        np.testing.assert_array_equal(gradient, [[0.5, -1, 0.5]])

    @pytest.mark.parametrize("bad", [[-np.inf] * 3, [np.inf, 0, 0], [0, np.inf, 0], [np.nan, 0, 0], [0, 0, np.nan]])
    def test_a_bad_row_is_nan_alone(self, backend, dtype, bad):
        loss, gradient = self.losses(backend, [[0, 0, 0], bad, [0, 0, 0]], [0, 0, 0], dtype)
        assert np.isnan(loss[1])
        assert np.isnan(gradient[1]).all()
        np.testing.assert_allclose(loss[::2], np.log(3), rtol=1e-7)
        assert np.isfinite(gradient[::2]).all()

    def test_nan_with_any_payload_reaches_the_loss(self, backend, dtype):
        integer = {"float32": np.uint32, "float64": np.uint64}[dtype]
        quiet = np.array(np.nan, dtype).view(integer)
        for payload in (1, 2, 0x155, 0x1FF, 1 << 12):
            logits = np.zeros((1, 600), dtype)
            logits.view(integer)[0, 300] = quiet | payload
            assert np.isnan(fastxent.cross_entropy(logits, [5], backend=backend))

    def test_smoothing_with_minus_infinity(self, backend, dtype):
        loss, _ = self.losses(backend, [[0, -np.inf, 0]], [0], dtype, label_smoothing=0.1)
        assert loss[0] == np.inf

    def test_zero_weight_on_minus_infinity_under_smoothing(self, backend, dtype):
        loss, _ = self.losses(backend, [[0, -np.inf, 0]], [0], dtype, label_smoothing=0.5, weight=[1, 0, 1])
        np.testing.assert_allclose(loss, [np.log(2) * (0.5 + 0.5 * 2 / 3)], rtol=1e-6)

    def test_smoothing_with_minus_infinity_on_the_target(self, backend, dtype):
        loss, _ = self.losses(backend, [[-np.inf, 0, 0]], [0], dtype, label_smoothing=0.1)
        assert loss[0] == np.inf
        loss, _ = self.losses(backend, [[-np.inf, 0, 0]], [0], dtype, label_smoothing=0.5, weight=[0, 1, 1])
        np.testing.assert_allclose(loss, [0.5 * 2 / 3 * np.log(2)], rtol=1e-6)

    def test_smoothing_under_a_finite_mask(self, backend, dtype):
        lowest = float(np.finfo(np.float32).min)
        row = [lowest] * 100 + [0.0] * 200
        loss, _ = self.losses(backend, [row], [150], dtype, label_smoothing=0.1)
        np.testing.assert_allclose(loss, [-lowest * 100 * 0.1 / 300], rtol=1e-6)

    def test_weights_beyond_float32(self, backend, dtype):
        for size in (1e39, 1e-46):
            scaled = fastxent.cross_entropy(
                np.zeros((1, 2), dtype), [0], label_smoothing=0.5, weight=[size, size], backend=backend
            )
            np.testing.assert_allclose(scaled, np.log(2), rtol=1e-6)

    def test_smoothing_when_the_target_is_far_below(self, backend, dtype):
        row = np.zeros(1000)
        row[0] = -700.0
        loss, _ = self.losses(backend, [row], [0], dtype, label_smoothing=1.0)
        want = np.log(999.0) + 0.7
        np.testing.assert_allclose(loss, [want], rtol=exact.LOSS[dtype])

    def test_common_offset(self, backend, dtype):
        logits = np.array([[8, 0, -8]], dtype)
        for offset in (1e8, -1e8, 1e30):
            moved = (logits + np.array(offset, dtype)).astype(dtype)
            stored = (moved.astype(np.longdouble) - moved.max()).astype(np.float64)
            want = fastxent.cross_entropy(stored, [1], backend="reference")
            np.testing.assert_allclose(fastxent.cross_entropy(moved, [1], backend=backend), want, rtol=5e-7)

    def test_one_huge_logit(self, backend, dtype):
        loss, gradient = self.losses(backend, [[0, 1e30, 0], [0, -1e30, 0]], [1, 0], dtype)
        np.testing.assert_allclose(loss, [0, np.log(2)], rtol=1e-6)
        np.testing.assert_array_equal(gradient, [[0, 0, 0], [-0.5, 0, 0.5]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scipy_agrees(backend):
    logits, targets, _ = Case(9, 700, "wide", "float64").build()
    want = -scipy.special.log_softmax(logits, axis=1)[np.arange(9), targets]
    np.testing.assert_allclose(fastxent.cross_entropy(logits, targets, reduction="none", backend=backend), want, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_axes_and_no_batch(backend):
    logits, targets, _ = Case(24, 5).build()
    flat = fastxent.cross_entropy(logits, targets, reduction="none", backend=backend)
    folded = fastxent.cross_entropy(
        logits.reshape(2, 3, 4, 5), targets.reshape(2, 3, 4), reduction="none", backend=backend
    )
    np.testing.assert_array_equal(folded, flat.reshape(2, 3, 4))
    assert fastxent.cross_entropy(logits[0], targets[0], backend=backend) == flat[0]


def test_strided_logits_of_any_rank_are_gathered_not_copied():
    logits, targets, _ = Case(24, 33).build()
    cube = np.asfortranarray(logits.reshape(2, 3, 4, 33))
    want = fastxent.cross_entropy_with_grad(logits, targets, reduction="none")
    for backend in BACKENDS:
        loss, gradient = fastxent.cross_entropy_with_grad(
            cube, targets.reshape(2, 3, 4), reduction="none", backend=backend
        )
        np.testing.assert_allclose(loss.reshape(-1), want[0], rtol=1e-6)
        np.testing.assert_allclose(gradient.reshape(-1, 33), want[1], rtol=1e-6)


LAYOUTS = {
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "Fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": lambda x: _unaligned(x),
    "read-only": lambda x: _read_only(x),
}


def _unaligned(x):
    room = np.zeros(x.nbytes + 1, np.uint8)
    moved = room[1:].view(x.dtype).reshape(x.shape)
    moved[:] = x
    return moved


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_change_no_bit(layout):
    logits, targets, _ = Case(40, 523).build()
    want = fastxent.cross_entropy_with_grad(logits, targets)
    got = fastxent.cross_entropy_with_grad(layout(logits), targets)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_broadcast_to_many(backend):
    logits, targets, _ = Case(40, 523).build()
    spread_out = np.broadcast_to(logits[:1], logits.shape)
    want = fastxent.cross_entropy_with_grad(np.ascontiguousarray(spread_out), targets, backend=backend)
    got = fastxent.cross_entropy_with_grad(spread_out, targets, backend=backend)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_a_memory_map(tmp_path):
    logits, targets, _ = Case(40, 523).build()
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    assert fastxent.cross_entropy(mapped, targets) == fastxent.cross_entropy(logits, targets)
    kept = np.load(tmp_path / "logits.npy", mmap_mode="r+")
    fastxent.cross_entropy_grad(kept, targets, out=kept)
    np.testing.assert_array_equal(kept, fastxent.cross_entropy_grad(logits, targets))


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (2, 3, 2, 2)])
def test_any_rank_gathered(shape):
    logits, targets, _ = Case(24, 33).build()
    want = fastxent.cross_entropy_with_grad(logits, targets)
    folded = np.asfortranarray(logits.reshape(*shape, 33))
    loss, gradient = fastxent.cross_entropy_with_grad(folded, targets.reshape(shape))
    assert loss == want[0]
    np.testing.assert_array_equal(gradient.reshape(24, 33), want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_in_place_and_into_out(backend):
    logits, targets, _ = Case(20, 5003).build()
    _, want = fastxent.cross_entropy_with_grad(logits, targets, backend=backend, label_smoothing=0.1)
    out = np.full_like(logits, np.nan)
    assert fastxent.cross_entropy_grad(logits, targets, out=out, backend=backend, label_smoothing=0.1) is out
    np.testing.assert_array_equal(out, want)
    kept = logits.copy()
    fastxent.cross_entropy_grad(kept, targets, out=kept, backend=backend, label_smoothing=0.1)
    np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_output_scales(backend):
    logits, targets, _ = Case(8, 33, "typical", "float64").build()
    _, plain = fastxent.cross_entropy_with_grad(logits, targets, reduction="none", backend=backend)
    g = np.linspace(-2, 3, 8)
    _, scaled = fastxent.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=g, backend=backend)
    np.testing.assert_allclose(scaled, plain * g[:, None], rtol=1e-14)


rows_of_logits = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-700, 700, width=32)
)


def law(test):
    return settings(deadline=None, max_examples=60)(given(logits=rows_of_logits, data=st.data())(test))


class TestLaws:
    def targets(self, logits, data):
        return np.array([data.draw(st.integers(0, logits.shape[1] - 1)) for _ in logits])

    @law
    def test_shift_changes_nothing(self, logits, data):
        logits, targets = np.round(logits * 16) / 16, self.targets(logits, data)
        shift = data.draw(st.integers(-1000, 1000))
        losses = fastxent.cross_entropy(logits, targets, reduction="none")
        moved = fastxent.cross_entropy(logits + shift, targets, reduction="none")
        np.testing.assert_allclose(moved, losses, rtol=2e-15, atol=1e-307)

    @law
    def test_permuting_classes_changes_nothing(self, logits, data):
        targets = self.targets(logits, data)
        order = np.array(data.draw(st.permutations(range(logits.shape[1]))))
        losses = fastxent.cross_entropy(logits, targets, reduction="none")
        moved = fastxent.cross_entropy(logits[:, order], np.argsort(order)[targets], reduction="none")
        np.testing.assert_allclose(moved, losses, rtol=2e-15, atol=1e-307)

    @law
    def test_gradient_rows_sum_to_nothing(self, logits, data):
        smoothing = data.draw(st.sampled_from([0.0, 0.3]))
        gradient = fastxent.cross_entropy_grad(
            logits, self.targets(logits, data), reduction="sum", label_smoothing=smoothing
        )
        assert np.abs(gradient.sum(axis=1)).max() <= 1e-14

    @law
    def test_masked_equals_removed(self, logits, data):
        targets, options = self.targets(logits, data), {"reduction": "none", "z_loss": 0.1, "temperature": 2.0}
        masked = np.insert(logits, data.draw(st.integers(0, logits.shape[1])), -np.inf, axis=1)
        place = np.isneginf(masked[0]).argmax()
        moved = targets + (targets >= place)
        want = fastxent.cross_entropy_with_grad(logits, targets, **options)
        got = fastxent.cross_entropy_with_grad(masked, moved, **options)
        np.testing.assert_allclose(got[0], want[0], rtol=4e-15, atol=1e-307)
        assert not got[1][:, place].any()
        np.testing.assert_allclose(np.delete(got[1], place, axis=1), want[1], rtol=1e-12, atol=1e-14)

    @law
    def test_soft_one_hot_equals_index(self, logits, data):
        targets, options = self.targets(logits, data), {"reduction": "none"}
        want = fastxent.cross_entropy_with_grad(logits, targets, **options)
        for soft in (np.eye(logits.shape[1])[targets], (targets[:, None], np.ones((len(targets), 1)))):
            got = fastxent.cross_entropy_with_grad(logits, soft, **options)
            np.testing.assert_allclose(got[0], want[0], rtol=4e-15, atol=1e-307)
            np.testing.assert_allclose(got[1], want[1], rtol=1e-13, atol=1e-300)

    @law
    def test_sparse_equals_dense(self, logits, data):
        ids = np.array([[data.draw(st.integers(0, logits.shape[1] - 1)) for _ in range(3)] for _ in logits])
        probabilities = np.array([[data.draw(st.floats(0, 1)) for _ in range(3)] for _ in logits])
        dense = np.zeros(logits.shape)
        np.add.at(dense, (np.arange(len(ids))[:, None], ids), probabilities)
        smoothing = data.draw(st.sampled_from([0.0, 0.3]))
        want = fastxent.cross_entropy_with_grad(logits, dense, label_smoothing=smoothing)
        got = fastxent.cross_entropy_with_grad(logits, (ids, probabilities), label_smoothing=smoothing)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-14, atol=1e-300)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-15)

    @law
    def test_losses_are_not_negative(self, logits, data):
        assert (fastxent.cross_entropy(logits, self.targets(logits, data), reduction="none") >= 0).all()

    @law
    def test_gradient_is_the_slope(self, logits, data):
        logits, targets = logits / 100, self.targets(logits, data)
        step, direction = 1e-4, np.cos(np.arange(logits.size)).reshape(logits.shape)
        slope = np.sum(fastxent.cross_entropy_grad(logits, targets, label_smoothing=0.2) * direction)
        near, far = (
            fastxent.cross_entropy(logits + h * step * direction, targets, label_smoothing=0.2)
            - fastxent.cross_entropy(logits - h * step * direction, targets, label_smoothing=0.2)
            for h in (1, 2)
        )
        np.testing.assert_allclose(slope, (8 * near - far) / (12 * step), rtol=1e-7, atol=1e-9)


def test_options_are_spelled_out_once_and_alike():
    signature = inspect.signature(fastxent.cross_entropy).parameters
    defaults = Options._field_defaults
    others = ("logits", "targets", "check", "backend")
    assert {name: taken.default for name, taken in signature.items() if name not in others} == defaults
