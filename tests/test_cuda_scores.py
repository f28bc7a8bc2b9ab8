"""Scores on the simulated GPU: every figure against exact arithmetic, and the bits of a loss."""

import numpy as np
import pytest

import fastxent
from fastxent.backends import cuda
from fastxent.backends.cuda import run, simulated
from fastxent.backends.cuda.resident import DeviceRows
from fastxent.bench.cases import SMALL_DTYPES, WIDTHS
from tests import test_scoring

pytestmark = pytest.mark.usefixtures("_simulated")


@pytest.fixture
def _simulated(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")


# rows of a warp, of a block, of several strips, with ragged ends
COMMON = (
    (3, 1, "typical", "float32", 1),
    (3, 40, "typical", "float32", 3),
    (3, 65, "ties", "float32", 9),
    (2, 300, "confident", "float32", 3),
    (2, 513, "sorted", "float32", 5),
    (2, 1203, "confident", "float32", 5),
    (2, 1203, "ties", "float32", 4),
    (2, 600, "masked", "float64", 3),
    (2, 300, "huge offset", "float32", 2),
    (2, 130, "flat", "float16", 20),
    *((2, 301, "confident", dtype, 3) for dtype in SMALL_DTYPES),
)
EVERY = (
    *((7, width, kind, "float32", 5) for kind in test_scoring.KINDS for width in (10, 257, 1000)),
    *((3, width, "typical", "float32", k) for width in WIDTHS if width < 10_000 for k in (1, 20)),
    *((3, width, "confident", "float64", 3) for width in (2, 4096, 4097)),
)


def check(rows, classes, kind, dtype, top_k):
    logits, targets = test_scoring.problem(rows, classes, kind, dtype)
    top_k = min(top_k, classes)
    scores = fastxent.score(logits, targets, top_k=top_k, ids=[0, classes - 1], backend="cuda")
    test_scoring.assert_scores(scores, test_scoring.expected(logits, targets, top_k), dtype)
    losses = fastxent.cross_entropy(logits, targets, reduction="none", backend="cuda")
    assert (0.0 - losses).tobytes() == scores.log_prob.tobytes()


@pytest.mark.parametrize(("rows", "classes", "kind", "dtype", "top_k"), COMMON)
def test_every_figure(rows, classes, kind, dtype, top_k):
    check(rows, classes, kind, dtype, top_k)


@pytest.mark.parametrize(("classes", "dtype"), [(1023, "float32"), (2300, "bfloat16")])
def test_several_words_a_thread(classes, dtype, monkeypatch):
    layout = simulated.SIMULATED._replace(small=4096, middle=4096, threads=32, strip=4096, shared=1 << 14)
    monkeypatch.setattr(simulated.Machine, "layout", layout)
    check(1, classes, "sorted", dtype, 5)
    logits = np.linspace(0.0, 2.0, classes)[None].astype(dtype)  # every word has a larger one than all before
    targets = np.array([3])
    scores = fastxent.score(logits, targets, ids=[0, classes - 1], backend="cuda")
    test_scoring.assert_scores(scores, test_scoring.expected(logits, targets, 0), dtype)


@pytest.mark.parametrize(
    ("classes", "kind", "dtype"),
    [
        (250, "confident", "float32"),
        (1000, "masked", "float32"),
        (256, "huge offset", "bfloat16"),
        (300, "sorted", "float32"),
    ],
)
def test_rows_that_a_loss_has_in_registers(classes, kind, dtype, monkeypatch):
    """Which adds nothing in another order."""
    layout = simulated.SIMULATED._replace(tiny=1024, few=8, small=4096, middle=4096, shared=1 << 15)
    monkeypatch.setattr(simulated.Machine, "layout", layout)
    check(3, classes, kind, dtype, 5)


@pytest.mark.parametrize("bytes_in_registers", [64, 1024])
def test_rows_below_and_above_where_a_base_begins(bytes_in_registers, monkeypatch):
    """2**20 octaves below 0: some threads' logits are beyond that, others' are not, and all count."""
    layout = simulated.SIMULATED._replace(tiny=bytes_in_registers, small=4096, middle=4096, shared=1 << 15)
    monkeypatch.setattr(simulated.Machine, "layout", layout)
    rng = np.random.default_rng(0)
    for classes, low in ((12, -726819), (40, -726823), (40, -726900), (40, -727100)):
        logits = rng.uniform(low, -726816, (20, classes)).astype(np.float32)
        targets = rng.integers(0, classes, 20)
        losses = fastxent.cross_entropy(logits, targets, reduction="none", backend="cuda")
        scores = fastxent.score(logits, targets, backend="cuda")
        assert (0.0 - losses).tobytes() == scores.log_prob.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "classes", "kind", "dtype", "top_k"), EVERY)
def test_every_figure_of_many(rows, classes, kind, dtype, top_k):
    check(rows, classes, kind, dtype, top_k)


@pytest.mark.parametrize("corner", [name for name in vars(test_scoring.TestCorners) if name.startswith("test_")])
def test_corners(corner):
    getattr(test_scoring.TestCorners(), corner)("cuda")


@pytest.mark.parametrize("classes", [40, 600])
def test_softcap_and_temperature(classes):
    logits, targets = test_scoring.problem(3, classes)
    logits *= 20
    scores = fastxent.score(logits, targets, top_k=4, softcap=30.0, temperature=0.7, ids=[1], backend="cuda")
    want = fastxent.score(logits, targets, top_k=4, softcap=30.0, temperature=0.7, ids=[1], backend="reference")
    slack = 2 * 30 * 2.0**-22 / 0.7  # what softcap adds to a logit's error, twice
    for name, figures in want.as_dict().items():
        if figures.dtype.kind == "f":
            np.testing.assert_allclose(getattr(scores, name), figures, 1e-6 + slack, slack, err_msg=name)
        else:
            np.testing.assert_array_equal(getattr(scores, name), figures, name)


@pytest.mark.parametrize(("dtype", "classes"), [("float32", 45), ("bfloat16", 1203)])
class TestSameBits:
    def problem(self, dtype, classes):
        logits, targets = test_scoring.problem(4, classes, "confident", dtype)
        targets[2] = -100
        return logits, targets

    def test_for_any_batch_split_order_and_number_at_once(self, dtype, classes, monkeypatch):
        logits, targets = self.problem(dtype, classes)
        whole = fastxent.score(logits, targets, top_k=3, backend="cuda")
        monkeypatch.setattr(simulated.Machine, "together", 1)
        for rows in (slice(0, 1), [3, 2, 0]):
            part = fastxent.score(np.ascontiguousarray(logits[rows]), targets[rows], top_k=3, backend="cuda")
            assert part == whole[rows]

    def test_on_the_device_wherever_rows_begin(self, dtype, classes):
        logits, targets = self.problem(dtype, classes)
        targets[2] = 1
        machine, stride = run.runner().machine, classes + 3
        size = logits.itemsize * (4 * stride + 1)
        address = machine.reserve(size)
        seen = machine._memory[address][logits.itemsize : size].view(dtype).reshape(4, stride)
        seen[:, :classes] = logits
        rows = DeviceRows(address + logits.itemsize, 4, classes, stride, logits.dtype)
        ids = targets[:, None]
        got, want = (cuda.score(given, targets, ids=ids, top_k=3) for given in (rows, logits))
        machine.unreserve(address)
        for name, figures in want._asdict().items():
            np.testing.assert_array_equal(getattr(got, name), figures, name)


def test_a_dominant_logit_in_another_strip_than_the_target(monkeypatch):
    """Its digits come from a second sum of its strip alone, beside those of the others and the target."""
    for target, largest in ((7, 4), (7, 1100), (1100, 7)):
        logits = np.linspace(-1, 1, 1203, dtype=np.float32)[None]
        logits[0, largest] = 45.0
        logits[0, target] = 20.0
        targets = np.array([target])
        scores = fastxent.score(logits, targets, top_k=2, backend="cuda")
        test_scoring.assert_scores(
            scores, test_scoring.expected(logits, targets, 2) | {"id_log_probs": np.empty((1, 0))}, "float32"
        )
        assert scores.top_ids.tolist() == [[largest, target]]
