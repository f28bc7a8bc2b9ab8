"""The comparison checks before it times, shares its time, and says what is absent, wrong or left out."""

import itertools
import json
import shutil
import sys
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import fastxent
from fastxent.bench import candidates, checking, linear, machine, plan, publish, tasks
from fastxent.bench.cases import Case
from fastxent.bench.comparison import compare
from tests.test_cli import run

OURS = {"fastxent": candidates.LOSS["fastxent"]}
OURS_WITH_GRADIENT = {"fastxent": candidates.LOSS_AND_GRADIENT["fastxent"]}


def with_tables(monkeypatch, loss, gradient=OURS_WITH_GRADIENT):
    monkeypatch.setattr(plan, "OPERATIONS", {"loss": loss, "loss and gradient": gradient})


def cells_of(*shapes, **options):
    """Cells by candidate of one problem."""
    found = compare(shapes, **{"op": "loss", "seconds": 20} | options)
    return {cell.candidate: cell for cell in found.cells}


def test_a_wrong_candidate_gets_no_time(monkeypatch):
    def wrong(logits, targets):
        return lambda: fastxent.cross_entropy(logits, targets, reduction="none") * 1.001

    with_tables(monkeypatch, OURS | {"wrong": wrong})
    cells = cells_of((300, 40))
    assert (cells["wrong"].note, cells["wrong"].seconds) == ("wrong", None)
    assert cells["wrong"].worst_error == pytest.approx(1e-3, rel=1e-2)
    assert cells["fastxent"].seconds.least > 0
    assert cells["fastxent"].worst_error < 1e-6


def test_the_usual_time_is_less_than_two_minutes_and_twenty():
    plans = [plan.Plan.read(suite=suite) for suite in (None, "cpu", "linear")]
    seconds = [plan.usual_seconds() for plan in plans]
    assert seconds[0] < 110
    assert seconds[1] < 20 * 60
    assert seconds[2] == 30 + 6 * 120


def test_the_reference_refuses_what_would_take_minutes():
    for table in (candidates.LOSS, candidates.LOSS_AND_GRADIENT):
        with pytest.raises(candidates.UnsupportedError, match="more than 50,000 take minutes"):
            table["fastxent reference"](np.zeros((50_001, 1), np.float32), np.zeros(50_001, int))


def test_a_confident_row_condemns_nobody(monkeypatch):
    """The usual formula has lost most digits of a loss of 1e-6, which is told, but it is not wrong."""
    monkeypatch.setattr(tasks, "speed_case", lambda rows, classes, dtype: Case(rows, classes, "confident", dtype))
    found = compare([(64, 40)], peers=["numpy"], seconds=20)
    cells = [cell for cell in found.cells if cell.candidate == "numpy"]
    assert [cell.note for cell in cells] == ["", ""]
    assert all(cell.worst_ulps > 1e4 for cell in cells)


def test_nan_is_wrong(monkeypatch):
    with_tables(monkeypatch, OURS | {"nan": lambda logits, targets: lambda: np.full(len(logits), np.nan, np.float32)})
    found = compare([(300, 40)], op="loss", seconds=20)
    assert (found.cells[1].note, found.cells[1].worst_error) == ("wrong", None)
    assert "nan is wrong, no number, and was not timed." in str(found)
    json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_an_error_in_one_of_the_checked_rows_is_seen(monkeypatch):
    def last_row_wrong(logits, targets):
        def run():
            losses = fastxent.cross_entropy(logits, targets, reduction="none")
            losses[-1] *= 2
            return losses

        return run

    with_tables(monkeypatch, OURS | {"last row": last_row_wrong})
    assert cells_of((64, 40))["last row"].note == "wrong"


def test_an_absent_one_is_named(monkeypatch):
    def absent(logits, targets):
        raise ModuleNotFoundError(name="abacus")

    with_tables(monkeypatch, OURS | {"abacus": absent})
    found = compare([(300, 40)], op="loss", seconds=20)
    assert found.cells[1].note == "absent: needs abacus: pip install fastxent[peers]"
    assert "abacus: absent: needs abacus: pip install fastxent[peers]" in str(found)
    assert found.markdown().endswith("- abacus: absent: needs abacus: pip install fastxent[peers]\n")


def test_a_wrong_gradient_is_seen(monkeypatch):
    def off_by_sign(logits, targets):
        return lambda: -fastxent.cross_entropy_grad(logits, targets, reduction="sum")

    with_tables(monkeypatch, OURS, OURS_WITH_GRADIENT | {"sign": off_by_sign})
    cells = cells_of((100, 7), op="gradient")
    assert {name: cell.note for name, cell in cells.items()} == {"fastxent": "", "sign": "wrong"}


def test_zeros_instead_of_small_entries_are_seen(monkeypatch):
    """They are far below a row's largest entry, and a third of its sum."""

    def without_small_ones(logits, targets):
        gradient = fastxent.cross_entropy_grad(logits, targets, reduction="sum")
        gradient[np.abs(gradient) < 0.9e-4] = 0
        return lambda: gradient

    monkeypatch.setattr(tasks, "speed_case", lambda rows, classes, dtype: Case(rows, classes, "ties", dtype))
    with_tables(monkeypatch, OURS, OURS_WITH_GRADIENT | {"zeros": without_small_ones})
    cell = cells_of((8, 20_000), op="gradient")["zeros"]
    assert cell.note == "wrong"
    assert cell.worst_error < 1e-4 < 0.1 < cell.row_error


@pytest.mark.parametrize(("dtype", "off"), [("float32", 2e-6), ("float64", 1e-11), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("op", ["loss", "gradient"])
def test_ours_are_held_to_their_promise(monkeypatch, dtype, off, op):
    def off_by(logits, targets):
        if op == "gradient":
            gradient = fastxent.cross_entropy_grad(logits, targets, reduction="sum")
            return lambda: (gradient * (1 + off)).astype(gradient.dtype)
        losses = fastxent.cross_entropy(logits, targets, reduction="none")
        return lambda: (losses * (1 + off)).astype(losses.dtype)

    table = dict.fromkeys(("numpy", "fastxent", candidates.NEW_MEMORY), off_by)
    with_tables(monkeypatch, table, table)
    cells = cells_of((300, 40), op=op, dtypes=[dtype])
    assert {name: cell.note for name, cell in cells.items()} == {name: "wrong" * (name != "numpy") for name in table}


def test_new_memory_comes_with_the_backend():
    cells = cells_of((70, 30), op="gradient", backends=["cpu"], peers=[])
    assert list(cells) == ["fastxent", candidates.NEW_MEMORY]
    assert all(cell.is_ours and cell.seconds for cell in cells.values())
    assert list(cells_of((70, 30), op="gradient", backends=[], peers=["numpy"])) == ["numpy"]


def test_threads_of_a_library_that_a_setup_loads(monkeypatch):
    """torch, loaded by the first candidate that needs it, begins with threads of its own."""
    numbers, seen = [], []

    def loads_torch(logits, targets):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(set_num_threads=numbers.append))
        numbers.append("loaded")
        return lambda: seen.append(numbers[-1]) or fastxent.cross_entropy(logits, targets, reduction="none")

    monkeypatch.setitem(sys.modules, "torch", None)
    task = SimpleNamespace(setups={"abacus": loads_torch}, arrays=tasks.build((70, 30), "float32")[0].arrays)
    with machine.threads(1):
        checking._set_up(task, "abacus")()
    assert seen == [1]


def test_every_dtype_and_number_of_threads_has_its_cell(monkeypatch):
    pytest.importorskip("scipy")
    with_tables(monkeypatch, OURS | {"scipy": candidates.LOSS["scipy"]})
    found = compare([(70, 30)], op="loss", dtypes=("float64", "bfloat16"), threads=(1, None), seconds=40)
    cells = [cell for cell in found.cells if cell.candidate == "fastxent"]
    each = dict.fromkeys([1, fastxent.get_num_threads()])
    assert [(cell.problem.dtype, cell.problem.threads) for cell in cells] == [
        (dtype, number) for dtype in ("float64", "bfloat16") for number in each
    ]
    assert all(cell.worst_ulps < 4 and cell.gigabytes_per_second > 0 for cell in cells)
    assert {cell.note for cell in found.cells if cell.candidate == "scipy"} >= {
        "absent: scipy has no LogSoftmax of bfloat16"
    }
    assert fastxent.get_num_threads() == max(each)


def test_what_is_derived_follows_from_what_is_measured(monkeypatch):
    with_tables(monkeypatch, OURS | {"numpy": candidates.LOSS["numpy"], "numba loop": candidates.LOSS["numba loop"]})
    found = compare([(500, 400)], op="loss", seconds=20)
    (limit,), cells = found.limits, {cell.candidate: cell for cell in found.cells}
    medians = {name: cell.seconds.median for name, cell in cells.items()}
    fastest = min(medians["numpy"], medians["numba loop"])
    for name, cell in cells.items():
        assert cell.seconds.least <= cell.seconds.low <= cell.seconds.median <= cell.seconds.high
        assert cell.ns_per_element == pytest.approx(medians[name] / 200_000 * 1e9)
        assert cell.gigabytes_per_second == pytest.approx(800_000 / medians[name] / 1e9)
        assert cell.of_limit == pytest.approx(limit.seconds.median / medians[name])
        assert cell.to_fastest_peer == pytest.approx(medians[name] / fastest)
    assert (limit.name, limit.problem.shape) == ("read", (500, 400))


def test_confident_rows_bits_and_memory():
    """Ours keeps its digits and bits and allocates little; NumPy's formula loses them all, and copies the logits."""
    cells = cells_of((512, 8000), backends=["cpu"], peers=["numpy"], seconds=20)
    ours, numpy = cells["fastxent"], cells["numpy"]
    assert ours.confident_error < 5e-7
    assert numpy.confident_error == 1.0
    assert ours.same_bits_twice
    assert ours.same_bits_across_threads is not False
    if ours.extra_bytes is None:
        pytest.skip("this kernel does not tell the peak of resident memory")
    assert numpy.extra_bytes > 1.5 * 512 * 8000 * 4 > 10 * ours.extra_bytes


def test_bits_that_differ_are_seen(monkeypatch):
    def unsteady(logits, targets):
        losses, runs = fastxent.cross_entropy(logits, targets, reduction="none"), iter(range(10**6))
        return lambda: losses * np.float32(1 + 1e-6 * (next(runs) % 2))

    def by_threads(logits, targets):
        losses, few = fastxent.cross_entropy(logits, targets, reduction="none"), fastxent.get_num_threads() == 1
        return lambda: losses * np.float32(1 + 1e-6 * few)

    with_tables(monkeypatch, OURS | {"unsteady": unsteady, "by threads": by_threads})
    cells = cells_of((300, 40))
    assert cells["unsteady"].same_bits_twice is False
    assert cells["by threads"].same_bits_twice
    assert cells["by threads"].same_bits_across_threads is (None if fastxent.get_num_threads() == 1 else False)


def test_one_that_fails_does_not_end_the_comparison(monkeypatch):
    def broken(logits, targets):
        raise RuntimeError("no abacus")

    with_tables(monkeypatch, {"broken": broken} | OURS)
    found = compare([(300, 40)], op="loss", seconds=20)
    assert found.cells[0].note == "failed: RuntimeError: no abacus"
    assert found.cells[1].seconds.least > 0
    assert "broken: failed: RuntimeError: no abacus" in str(found)


def wrong_shape(logits, targets):
    return lambda: np.zeros((len(logits), 2), np.float32)


def fails_in_call(number):
    def setup(logits, targets):
        calls = itertools.count(1)

        def run():
            if next(calls) >= number:
                raise RuntimeError("no bead left")
            return fastxent.cross_entropy(logits, targets, reduction="none")

        return run

    return setup


def broken_library(logits, targets):
    raise ImportError("libabacus.so: no such symbol", name="abacus")


@pytest.mark.parametrize(
    ("setup", "note"),
    [
        (wrong_shape, "failed: ValueError: the result has shape (300, 2) where it must be (300,)"),
        (fails_in_call(2), "failed: RuntimeError: no bead left"),  # the first was for the confident rows
        (fails_in_call(4), "failed: RuntimeError: no bead left"),
        (broken_library, "failed: ImportError: libabacus.so: no such symbol"),
    ],
)
def test_whatever_fails_in_one_ends_nothing(monkeypatch, setup, note):
    with_tables(monkeypatch, {"broken": setup} | OURS)
    cells = cells_of((300, 40))
    assert (cells["broken"].note, cells["broken"].seconds) == (note, None)
    assert cells["fastxent"].seconds.least > 0


def test_what_is_expected_of_a_setup():
    """By the last problem of its kind, else by the last; less on fewer elements, but no more on more."""
    clock = plan.Clock(100.0, 3)
    assert clock.expected("abacus", "loss", 10**6) == 0.0
    for kind, elements, seconds in (("loss", 10**6, 2.0), ("gradient", 10**6, 8.0)):
        with clock.setup("abacus", kind, elements):
            pass
        clock._setups["abacus"][kind] = seconds, elements
    assert clock.expected("abacus", "loss", 10**6) == 2.0
    assert clock.expected("abacus", "loss", 10**3) == pytest.approx(2e-3)
    assert clock.expected("abacus", "loss", 10**9) == 2.0
    assert clock.expected("abacus", "loss in half", 10**6) == 8.0


def test_one_left_out_is_in_again_where_it_costs_less(monkeypatch):
    def slow(logits, targets):
        time.sleep(logits.size * 2e-6)
        return lambda: fastxent.cross_entropy(logits, targets, reduction="none")

    with_tables(monkeypatch, OURS | {"slow": slow})
    found = compare([(10_000, 40), (10_001, 40), (10, 40)], op="loss", seconds=1)
    assert [bool(cell.note) for cell in found.cells if cell.candidate == "slow"] == [False, True, False]


def test_one_that_takes_too_long_is_left_out(monkeypatch):
    def slow(logits, targets):
        time.sleep(0.6)
        return lambda: fastxent.cross_entropy(logits, targets, reduction="none")

    with_tables(monkeypatch, OURS | {"slow": slow})
    found = compare([(300, 40), (301, 40), (302, 40)], op="loss", seconds=1)
    notes = [cell.note for cell in found.cells if cell.candidate == "slow"]
    assert notes[-1] == "left out: its checks would not end in the time given"
    assert all(cell.seconds for cell in found.cells if cell.candidate == "fastxent")
    assert "No time was left for slow: --seconds gives more." in str(found)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shapes": [(3,)]}, "a shape must be"),
        ({"shapes": [(3, 0)]}, "a shape must be"),
        ({"dtypes": ["int8"]}, "dtype must be one of float32, float64, bfloat16, float16; got 'int8'"),
        ({"op": "loss and gradient"}, "op must be one of loss, gradient"),
        ({"threads": [10_000]}, "threads must lie in"),
        ({"threads": [0]}, "threads must lie in"),
        ({"shapes": [(4, 8, 50)], "dtypes": ["float32", "float16"]}, "in float32 or float64, as BLAS has no float16"),
        ({"backends": ["abacus"]}, "backend must be one of cpu, cuda, reference; got 'abacus'"),
        ({"peers": ["abacus"]}, "peer must be one of fastxent.torch,|peer must be one of torch,"),
        ({"suite": "gpu"}, "suite must be one of cpu, linear"),
    ],
)
def test_what_cannot_be_asked(asked, message):
    with pytest.raises(ValueError, match=message):
        compare(**asked)


def test_what_is_asked_twice_is_measured_once():
    asked = plan.Plan.read([(3, 4), [3, 4]], dtypes=["float32", "float32"], threads=[1, 1])
    assert (asked.shapes, asked.dtypes, asked.threads) == (((3, 4),), ("float32",), (1,))


def test_errors_in_units_of_what_is_allowed():
    one = np.float32([1.0, 2.0])
    assert checking.units(one, one.astype(float), 1e-6) == 0.0
    assert checking.units(one * np.float32(1 + 4e-6), one.astype(float), 1e-6) == pytest.approx(4, rel=0.1)
    assert checking.units(np.float32([1.0, np.nan]), one.astype(float), 1e-6) == np.inf
    assert checking.units(np.float32([np.inf]), np.array([np.inf]), 1e-6) == 0.0
    assert checking.units(np.float32([np.inf]), np.array([1.0]), 1e-6) == np.inf
    assert checking.units(np.array([3]), np.array([4]), 0.0) == np.inf
    few = np.array([1.0], ml_dtypes.bfloat16)
    assert checking.units(few, np.array([1.0 + 2**-9]), 1e-6) < 1 < checking.units(few, np.array([1.01]), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
class TestPeers:
    """What needs the other libraries."""

    @pytest.fixture(autouse=True)
    def libraries(self):
        for name in ("torch", "optax", "onnx", "onnxruntime", "sklearn"):
            pytest.importorskip(name, reason=f"needs {name}: pip install fastxent[peers]")

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    def test_every_one_is_right_or_says_why_not(self, dtype):
        found = compare([(64, 1000)], dtypes=[dtype], seconds=120)
        notes = {(cell.candidate, cell.problem.operation): cell.note for cell in found.cells if cell.note}
        absent = {"onnxruntime", "scipy", "scikit-learn", "numba loop"} if dtype == "bfloat16" else set()
        absent |= set() if fastxent.backends.why_unavailable("cuda") is None else {"fastxent cuda"}
        absent |= set() if shutil.which("c++") else {"torch.compile"}
        assert {name for name, _ in notes} == absent
        assert all(note.startswith("absent: ") for note in notes.values())
        every = {*candidates.LOSS, *candidates.LOSS_AND_GRADIENT}
        assert {cell.candidate for cell in found.cells if cell.seconds} == every - absent

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_every_one_of_hidden_states_is_right(self, dtype):
        found = compare([(64, 32, 1000)], dtypes=[dtype], seconds=60)
        assert {cell.candidate: cell.note for cell in found.cells} == dict.fromkeys(linear.LOSS, "")
        assert len([cell for cell in found.cells if cell.seconds]) == 2 * len(linear.LOSS)

    def test_torch_compile_needs_a_compiler(self, monkeypatch):
        monkeypatch.setattr(candidates.shutil, "which", lambda name: None)
        with pytest.raises(candidates.UnsupportedError, match=r"needs a C\+\+ compiler: apt-get install g"):
            candidates.LOSS["torch.compile"](np.zeros((2, 3), np.float32), np.zeros(2, int))


class TestHiddenStates:
    """The fused linear loss beside its peers: by the same rules, against the products as limits."""

    def test_checks_then_times(self):
        found = compare([(70, 16, 300)], peers=["numpy"], seconds=20)
        for operation, limit in (("linear loss", "product"), ("linear loss and gradients", "products")):
            by_name = {cell.candidate: cell for cell in found.cells if cell.problem.operation == operation}
            assert by_name["fastxent"].of_limit > 0
            assert by_name["fastxent"].worst_error < 1e-5
            assert by_name["numpy"].seconds.least > 0
            assert by_name["numpy"].gigabytes_per_second is None
            assert [one.name for one in found.limits if one.problem.operation == operation] == [limit]
        assert (found.confident, found.arithmetic) == ((), ())
        assert "| 70 x 16 x 300 | float32 |" in publish.grid(found)

    def test_a_wrong_candidate_gets_no_time(self, monkeypatch):
        def off_by_sign(*problem):
            gradients = linear.LOSS_AND_GRADIENTS["fastxent"](*problem)
            return lambda: -gradients()

        def scaled(*problem):
            losses = linear.LOSS["fastxent"](*problem)
            return lambda: losses() * 1.001

        table = {"linear loss": {"numpy": scaled}, "linear loss and gradients": {"numpy": off_by_sign}}
        monkeypatch.setattr(plan, "LINEAR", table)
        found = compare([(70, 16, 300)], seconds=20)
        assert [(cell.note, cell.seconds) for cell in found.cells] == [("wrong", None)] * 2

    @pytest.mark.parametrize("row", [0, -1])
    def test_a_wrong_row_of_a_gradient_is_seen(self, monkeypatch, row):
        def one_row_wrong(hidden, weight, targets):
            _, dhidden, dweight, _ = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, reduction="sum")
            dweight[row] *= 1.01
            return lambda: linear.some(dhidden, dweight)

        table = {"linear loss": {}, "linear loss and gradients": {"numpy": one_row_wrong}}
        monkeypatch.setattr(plan, "LINEAR", table)
        seen = [compare([(40, 8, classes)], op="gradient", seconds=5).cells[0].note for classes in (300, 60)]
        assert seen == [("wrong" if row == -1 else ""), "wrong"]  # of 300 rows 64 are judged, the last among them

    def test_command(self, tmp_path):
        done = run(
            "compare", "--shape", "40x8x50", "--seconds", 20, "--peers", "numpy", "--json", tmp_path / "cells.json"
        )
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "cells.json").read_text())
        assert [cell["shape"] for cell in record["cells"]] == [[40, 8, 50]] * len(record["cells"])
