"""score: every figure of every row against exact arithmetic, however the work is cut; and what it refuses."""

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import KINDS, SMALL_DTYPES, WIDTHS
from tests import exact

BACKENDS = fastxent.backends.available()
REAL = exact.REAL


def problem(rows, classes, kind="typical", dtype="float32"):
    rng = np.random.default_rng([rows, classes, *kind.encode()])
    logits = KINDS[kind](rng, (rows, classes)).astype(dtype)
    targets = rng.integers(0, classes, rows)
    targets[::3] = logits[::3].astype(np.float64).argmax(axis=1)
    if kind == "confident":  # some right, some wrong
        logits[np.arange(rows), rng.integers(0, classes, rows)] += rng.uniform(5, 40, rows).astype(dtype)
    return logits, targets


def expected(logits, targets, top_k, temperature=1.0):
    """Every figure in 80-bit arithmetic; digits of confident rows from the sum of the others."""
    exact.needed()
    each, x = np.arange(len(logits)), logits.astype(REAL)
    z = x / REAL(temperature)
    order = np.argsort(-x, axis=1, kind="stable")
    largest = order[:, 0]
    below = z[each, largest][:, None] - z
    terms = np.exp(-below)
    terms[each, largest] = 0
    excess = np.log1p(terms.sum(axis=1))
    log_p = -(below + excess[:, None])
    p, own = np.exp(log_p), x[each, targets][:, None]
    spread = np.where(p > 0, p * np.where(p > 0, below, 0), 0).sum(axis=1)
    return {
        "log_prob": log_p[each, targets],
        "lse": z[each, largest] + excess,
        "lse_terms": np.abs(z[each, largest]) + excess,
        "entropy": excess + spread,
        "sum_p2": (p**2).sum(axis=1),
        "rank": (x > own).sum(axis=1) + 1,
        "rank_hi": (x >= own).sum(axis=1),
        "argmax": largest,
        "is_greedy": largest == targets,
        "top_ids": order[:, :top_k],
        "top_log_probs": np.take_along_axis(log_p, order[:, :top_k], axis=1),
        "id_log_probs": log_p[:, [0, -1]],
    }


def assert_scores(scores, wanted, dtype):
    """A loss is held to its promise; what is a sum of several terms to twice that."""
    promise, lse_terms = 2 * exact.LOSS[exact.computed(dtype)], wanted.pop("lse_terms")
    for name, want in wanted.items():
        got = getattr(scores, name)
        if got.dtype.kind in "ib":
            np.testing.assert_array_equal(got, want, name)
        elif name == "lse":
            assert (np.abs(got - want) <= promise * lse_terms).all()
        else:
            tiny = np.finfo(got.dtype).tiny
            np.testing.assert_allclose(got.astype(REAL), want, promise, tiny, err_msg=name)


CASES = [
    *((7, width, kind, "float32", 5) for kind in KINDS for width in (10, 257, 1000)),
    *((3, width, "typical", "float32", k) for width in WIDTHS for k in (1, 20)),
    *((3, width, "confident", "float64", 3) for width in (2, 4096, 4097, 70_001)),
    (2, 70_001, "sorted", "float32", 40),
    (2, 70_001, "ties", "float32", 17),
    *((5, 300, "typical", dtype, 3) for dtype in SMALL_DTYPES),
]


@pytest.mark.parametrize(("rows", "classes", "kind", "dtype", "top_k"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_figure(rows, classes, kind, dtype, top_k, backend):
    logits, targets = problem(rows, classes, kind, dtype)
    top_k = min(top_k, classes)
    scores = fastxent.score(logits, targets, top_k=top_k, ids=[0, classes - 1], backend=backend)
    assert scores.log_prob.dtype == exact.computed(dtype)
    assert scores.valid.all()
    assert_scores(scores, expected(logits, targets, top_k), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature(backend):
    logits, targets = problem(6, 5000)
    scores = fastxent.score(logits, targets, top_k=4, temperature=0.7, ids=[0, 4999], backend=backend)
    assert_scores(scores, expected(logits, targets, 4, np.float64(0.7)), "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_ranks_logits_as_they_are_stored(backend):
    logits, targets = problem(6, 5000)
    scores = fastxent.score(20 * logits, targets, top_k=4, softcap=30.0, backend=backend)
    capped = 30 * np.tanh(20 * logits.astype(REAL) / 30)
    wanted = expected(20 * logits, targets, 4)
    smooth = expected(capped, targets, 4)
    for name in ("rank", "rank_hi", "argmax", "top_ids"):
        np.testing.assert_array_equal(getattr(scores, name), wanted[name])
    for name in ("log_prob", "entropy", "sum_p2"):
        slack = 2 * 30 * 2.0**-22  # what softcap adds to a logit's error, twice
        np.testing.assert_allclose(getattr(scores, name).astype(REAL), smooth[name], 1e-6 + slack, slack)


@pytest.mark.parametrize("backend", BACKENDS)
class TestCorners:
    def test_rows_without_a_number(self, backend):
        """ignored, all -inf, +inf, NaN: floats NaN, classes -1, ranks 0."""
        logits = np.zeros((5, 40), np.float32)
        logits[0], logits[1], logits[2, 7], logits[3, 0] = np.nan, -np.inf, np.inf, np.nan
        scores = fastxent.score(logits, [-100, 3, 3, 3, 3], top_k=2, ids=[1], backend=backend)
        assert scores.valid.tolist() == [False, True, True, True, True]
        for name in ("log_prob", "lse", "entropy", "sum_p2"):
            assert np.isnan(getattr(scores, name)).tolist() == [True, True, True, True, False], name
        for name, nothing in (("rank", 0), ("rank_hi", 0), ("argmax", -1)):
            assert (getattr(scores, name)[:4] == nothing).all(), name
        assert (scores.top_ids[:4] == -1).all()
        assert np.isnan(scores.top_log_probs[:4]).all()
        assert np.isnan(scores.id_log_probs[:4]).all()
        assert not scores.is_greedy[:4].any()
        assert scores.rank[4] == 1
        assert scores.rank_hi[4] == 40
        assert scores.is_greedy[4] == (scores.argmax[4] == 3)
        assert scores.argmax[4] == 0

    def test_a_target_at_minus_infinity(self, backend):
        logits = np.full((1, 37), -np.inf, np.float32)
        logits[0, 5:8] = 1.0, 2.0, 2.0
        scores = fastxent.score(logits, [30], top_k=4, backend=backend)
        assert scores.log_prob[0] == -np.inf
        assert (scores.rank[0], scores.rank_hi[0], scores.argmax[0]) == (4, 37, 6)
        assert scores.top_ids[0].tolist() == [6, 7, 5, 0]
        p = np.exp([1.0, 2, 2]) / np.exp([1.0, 2, 2]).sum()
        np.testing.assert_allclose(scores.entropy[0], -(p * np.log(p)).sum(), 1e-6)

    def test_one_class(self, backend):
        scores = fastxent.score(np.float32([[3.0]]), [0], top_k=1, backend=backend)
        assert (scores.log_prob[0], scores.entropy[0], scores.sum_p2[0], scores.rank[0]) == (0.0, 0.0, 1.0, 1)
        assert scores.top_ids.tolist() == [[0]]

    def test_no_rows(self, backend):
        scores = fastxent.score(np.zeros((0, 5)), np.zeros(0, int), top_k=2, backend=backend)
        assert scores.top_ids.shape == (0, 2)
        assert len(scores) == 0

    def test_a_target_far_below_costs_the_lse_no_digit(self, backend):
        for dtype, far in (("float32", -1e10), ("float32", -3.4e38), ("float64", -1e6), ("float64", -1e300)):
            logits = np.array([[far, 0.0, 0.0]], dtype)
            lse = fastxent.score(logits, [0], backend=backend).lse[0]
            assert lse == pytest.approx(np.log(2.0), rel=1e-7 if dtype == "float32" else 1e-15)
            _, lse = fastxent.cross_entropy(logits, [0], return_lse=True, backend=backend)
            assert lse == pytest.approx(np.log(2.0), rel=1e-7 if dtype == "float32" else 1e-15)

    def test_spans_beyond_the_largest_number(self, backend):
        logits = np.repeat([[-1e308, 1e308]], 4096, axis=1)
        scores = fastxent.score(logits, [0], top_k=1, backend=backend)
        assert scores.entropy[0] == pytest.approx(np.log(4096), rel=1e-14)

    def test_ranks_under_a_softcap_with_a_target_at_minus_infinity(self, backend):
        scores = fastxent.score(np.float32([[-np.inf, 0, 1, -np.inf, 2]]), [0], softcap=5.0, backend=backend)
        assert (scores.rank[0], scores.rank_hi[0]) == (4, 5)

    def test_huge_offsets(self, backend):
        logits = np.float32([[3e7, 3e7 - 8, 3e7 - 16], [1e30, -1e30, 0.0]])
        scores = fastxent.score(logits, [1, 0], top_k=3, backend=backend)
        assert_scores(scores, expected(logits, np.array([1, 0]), 3) | {"id_log_probs": np.empty((2, 0))}, "float32")

    def test_a_confident_row_that_is_wrong_keeps_the_digits_of_its_entropy(self, backend):
        logits = np.zeros((1, 5000), np.float32)
        logits[0, 4321] = 60.0
        scores = fastxent.score(logits, [7], top_k=1, backend=backend)
        rest = 4999 * np.exp(-60.0)
        np.testing.assert_allclose(scores.top_log_probs[0, 0], -rest, 1e-6)
        np.testing.assert_allclose(scores.entropy[0], rest * 61, 1e-6)


class TestSameBits:
    """A log-probability is minus the loss, and no bit depends on how the work is cut."""

    @pytest.mark.parametrize("shape", [(700, 10), (700, 1000), (40, 32_000), (1, 300_000), (3, 70_000)])
    def test_threads_and_splits(self, shape):
        logits, targets = problem(*shape)
        whole = fastxent.score(logits, targets, top_k=5)
        np.testing.assert_array_equal(whole.log_prob, -fastxent.cross_entropy(logits, targets, reduction="none"))
        threads = fastxent.get_num_threads()
        fastxent.set_num_threads(1)
        try:
            assert fastxent.score(logits, targets, top_k=5) == whole
        finally:
            fastxent.set_num_threads(threads)
        parts = [fastxent.score(logits[i : i + 1], targets[i : i + 1], top_k=5) for i in range(min(5, len(logits)))]
        assert fastxent.Scores.concatenate(parts) == whole[: len(parts)]


class TestInputs:
    def test_shift_scores_next_tokens(self):
        logits, targets = problem(12, 50)
        logits, targets = logits.reshape(3, 4, 50), targets.reshape(3, 4)
        targets[1, 2] = -100
        scores = fastxent.score(logits, targets, shift=1)
        assert scores.valid.tolist() == [[True] * 3 + [False], [True, False, True, False], [True] * 3 + [False]]
        want = fastxent.cross_entropy(logits[:, :-1], targets[:, 1:], reduction="none")
        want[1, 1] = np.nan
        np.testing.assert_allclose(scores.log_prob[:, :-1], -want, 2e-7)

    def test_shift_of_any_whole_number(self):
        assert fastxent.score(np.zeros((3, 2)), [0, 1, 1], shift=np.uint8(1)).valid.tolist() == [True, True, False]

    def test_blocks_one_after_another(self):
        logits, targets = problem(10, 300)
        told = []
        scores = fastxent.score(
            (logits[i : i + 3] for i in range(0, 10, 3)),
            targets,
            top_k=2,
            progress=lambda done, rows: told.append((done, rows)),
        )
        assert scores == fastxent.score(logits, targets, top_k=2)
        assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]

    def test_axis_and_layouts(self):
        logits, targets = problem(12, 50)
        want = fastxent.score(logits, targets, top_k=3)
        assert fastxent.score(np.asfortranarray(logits), targets, top_k=3) == want
        moved = np.moveaxis(logits.reshape(3, 4, 50), -1, 1).copy()
        assert fastxent.score(moved, targets.reshape(3, 4), axis=1, top_k=3).to_records().ravel().tobytes() == (
            want.to_records().tobytes()
        )

    def test_ids_of_each_row(self):
        logits, targets = problem(4, 30)
        scores = fastxent.score(logits, targets, ids=targets[:, None])
        np.testing.assert_array_equal(scores.id_log_probs[:, 0], scores.log_prob)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"top_k": 5}, ValueError, "top_k must lie in [0, 4], the number of classes; got 5"),
            ({"top_k": 1.0}, TypeError, "top_k must be a whole number, not 1.0"),
            ({"ids": [4]}, IndexError, "ids must lie in [0, 3]; 2 of 2 do not, the first in row 0 with value 4"),
            ({"ids": [[0]]}, ValueError, "ids must have the targets' shape (2,) and one axis more, or one axis"),
            ({"ids": 1}, ValueError, "ids must have the targets' shape (2,) and one axis more, or one axis; got ()"),
            ({"ids": [0.5]}, TypeError, "ids must be integers, not float64"),
            ({"shift": -1}, ValueError, "shift must not be negative; got -1"),
            ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
            ({"softcap": -1.0}, ValueError, "softcap must be positive and finite; got -1.0"),
            ({"targets": [0, 4]}, IndexError, "targets must lie in [0, 3] or be -100; 1 of 2 do not"),
            ({"targets": [[0, 1]]}, TypeError, "targets of the logits' rank must be probabilities"),
            ({"logits": iter([])}, ValueError, "logits must give at least one block; the iterator was empty"),
            (
                {"logits": iter([np.zeros((1, 4))])},
                ValueError,
                "blocks of logits must have a row for each of 2 targets",
            ),
            ({"logits": iter(np.zeros((3, 1, 4)))}, ValueError, "blocks of logits must be float64 rows of 4 classes"),
        ],
    )
    def test_errors(self, changes, error, message):
        arguments = {"logits": np.zeros((2, 4)), "targets": [0, 1]} | changes
        with pytest.raises(error) as caught:
            fastxent.score(**arguments)
        assert str(caught.value).startswith(message)


class TestScores:
    def test_saved_and_loaded(self, tmp_path):
        scores = fastxent.score(*problem(6, 40), top_k=3)
        scores.save(tmp_path / "scores.npy")
        assert fastxent.Scores.load(tmp_path / "scores.npy") == scores
        assert set(scores.as_dict()) == set(fastxent.Scores.__slots__)

    def test_slices(self):
        scores = fastxent.score(*problem(6, 40), top_k=3)
        assert scores[2:4].top_ids.shape == (2, 3)
        assert fastxent.Scores.concatenate([scores[:2], scores[2:]]) == scores
        assert scores[:2] != scores[1:3]
