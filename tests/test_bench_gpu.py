"""The suite as it would run on a device, on one that is simulated and with problems that are tiny."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import fastxent
from fastxent import cli_compare
from fastxent.backends import cuda
from fastxent.backends.cuda import launches
from fastxent.bench import (
    apart,
    checking,
    gpu,
    gpu_bars,
    gpu_checks,
    gpu_figures,
    gpu_peers,
    gpu_problem,
    gpu_tables,
    gpu_times,
    page,
    pictures,
)
from fastxent.bench.gpu_record import LEFT_OUT, Check, Device, Time
from fastxent.bench.record import Seconds


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    monkeypatch.setattr(gpu_problem, "READ", (1, 8))
    monkeypatch.setattr(gpu_times, "_ROUNDS", 2)
    monkeypatch.setattr(gpu_times, "_WARM_SECONDS", 0)
    monkeypatch.setattr(gpu_times, "_ASKINGS", 5)
    monkeypatch.setattr(gpu_times, "ASKED_SHAPE", (2, 70))


def suite(**changed):
    tiny = {"shapes": ((3, 70),), "option_shape": (2, 90), "dtypes": ("bfloat16",)}
    checks = gpu_checks.each(("bfloat16",), (40,), many=False, large=(7, 70))
    found, start = [], time.monotonic()
    for unit in gpu.units(**tiny | {"checked": checks} | changed):
        found += unit.found(found, start)
    return found


class TestUnits:
    """Of what is allowed, an error of a GPU's result."""

    def test_what_a_gpu_may_flush(self):
        want = np.array([1.9 * 2.0**-126, 1.0])
        assert checking.units(np.float32([0.0, 1.0]), want, 1e-6) < 1.0
        assert checking.units(np.float32([0.0, 1.0]), 2 * want, 1e-6) > 1.0
        assert checking.units(np.float64([0.0]), [1.1 * 2.0**-1022], 1e-15) > 1.0

    def test_numbers_that_are_none(self):
        nan = np.float32([np.nan, 1.0])
        assert checking.units(nan, nan.astype(float), 1e-6) == 0.0
        assert checking.units(nan, np.ones(2), 1e-6) == checking.units(np.ones(2), nan, 1e-6) == np.inf


@pytest.mark.usefixtures("simulated")
class TestSuite:
    def test_checks_then_times(self):
        found = suite()
        record = gpu.record(found)
        assert [check["problem"].partition(", ")[2] for check in record["checks"]] == [
            *gpu_checks.OPTIONS,
            *gpu_checks._OF_ALL,
            "some rows",
            *(f"{label}, as timed" for label in (*gpu_times.options_of(3), gpu_bars.OURS)),
        ]
        assert all(check["right"] for check in record["checks"]), [str(one) for one in found if isinstance(one, Check)]
        plain = record["checks"][0]["errors"]
        on_the_device = {"gradient on the device", "mean on the device", "mean with its gradient"}
        assert set(plain) == {"loss", "gradient in float32", "gradient in bfloat16", *on_the_device}
        timed = {(one["candidate"], one["operation"]) for one in record["times"] if one["seconds"]}
        assert {("fastxent", "loss"), ("softcap", "loss and gradient"), ("90% ignored", "loss")} <= timed
        assert ("fastxent", "loss and gradient in place") in timed
        assert {operation for candidate, operation in timed if candidate == gpu_bars.HOST} == set(gpu_bars._OF_LARGE)
        assert ("fastxent", "score with top 5") in timed
        assert {one["candidate"] for one in record["times"]} >= set(gpu_peers.NAMES)
        assert record["device"] == "simulated"
        assert json.loads(json.dumps(record, allow_nan=False))["times"][0]["seconds"]["rounds"] == 2
        judged = {bar["what"] for bar in record["bars"] if bar["met"] is not None}
        assert judged >= {f"2 x 90 bfloat16, loss, {option}, times without" for option in ("weights", "softcap")}
        pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
        written = page.render_gpu(json.loads(json.dumps(record)))
        assert "90% ignored" in written
        shapes = {(*one["shape"], one["dtype"]) for one in record["times"] if one["candidate"] != gpu_bars.HOST}
        assert written.count("<svg") == len(shapes) == 2

    def test_one_that_fails_is_a_line(self, monkeypatch):
        def no_memory(machine, shape, *about, **named):
            if shape == (3, 70):
                raise MemoryError("out of beads")
            return time_calls(machine, shape, *about, **named)

        time_calls = gpu_times.time_calls
        monkeypatch.setattr(gpu_times, "time_calls", no_memory)

        def broken():
            raise RuntimeError("no bead left")

        monkeypatch.setattr(gpu_times, "options_of", lambda classes: {"plain": {}})
        found = suite(shapes=((3, 70), (2, 70)), checked=[("5 x 4, abacus", broken)])
        assert str(found[0]) == "simulated"
        assert (found[1].right, str(found[1])) == (False, "5 x 4, abacus: failed: RuntimeError: no bead left")
        lines = [str(one) for one in found]
        assert "3 x 70 bfloat16, fastxent: failed: MemoryError: out of beads" in lines
        assert any(line.startswith("2 x 70 bfloat16, fastxent, loss: ") for line in lines)

    def test_room_is_given_back_where_there_is_not_enough(self, monkeypatch):
        machine = gpu.runner().machine
        reserve, held = machine.reserve, set(machine._memory)
        sizes = iter([64, None])
        monkeypatch.setattr(machine, "reserve", lambda size: reserve(next(sizes)))
        with machine.current(), pytest.raises(TypeError):
            gpu_problem.Problem(machine, (2, 8), "float32")
        assert set(machine._memory) == held

    def test_the_clock_is_looked_at_before_everything(self):
        found = suite(until=-1.0, checked=[("a", None), ("b", None)])
        assert {one.note for one in found} == {LEFT_OUT}
        assert [one.right for one in found[1:3]] == [None, None]
        about = [gpu_bars.HOST, *gpu_times.options_of(3), gpu_bars.OURS, *gpu_peers.NAMES]
        assert [one.candidate for one in found[3:]] == about

    def test_peers_are_timed_beside_a_copy(self, monkeypatch):
        monkeypatch.setattr(gpu_peers, "time_peer", lambda *about: [about])
        copy = replace(took(gpu_bars.COPY, gpu_bars.COPY, 2e-3), shape=(3, 70))
        assert gpu._peer("quack", (3, 70), "bfloat16", [copy]) == [("quack", (3, 70), "bfloat16", 2e-3)]
        (without,) = gpu._peer("quack", (3, 71), "bfloat16", [copy])
        assert str(without) == "3 x 71 bfloat16, quack: left out: no copy of this shape has been timed"

    @pytest.mark.parametrize(
        ("wrong", "seen"),
        [
            (("cross_entropy", "none", "loss"), {"loss alone", "losses of all rows"}),
            (("cross_entropy", "mean", "loss"), {"mean"}),
            (("cross_entropy_with_grad", "mean", "loss"), {"mean with its gradient"}),
            (("cross_entropy_with_grad", "mean", "apart"), {"gradient of the mean", "bits in place"}),
            (("cross_entropy_with_grad", "mean", "in place"), {"bits in place"}),
            (("score", "none", "nll"), {"nll of scores"}),
            (("score", "none", "rank"), {"rank of scores"}),
        ],
    )
    def test_what_is_wrong_where_it_is_timed_has_no_time(self, monkeypatch, wrong, seen):
        name, reduction, what = wrong
        owner = launches if name == "score" else fastxent
        verb, machine = getattr(owner, name), gpu.runner().machine

        def off(address, count, dtype):
            values = np.empty(count, dtype)
            machine.copy_to_host(0, values, address)
            machine.copy_to_device(0, (values * (2 if what == "rank" else dtype.type(1 + 5e-6))).astype(dtype), address)

        def altered(*given, **options):
            found = verb(*given, **options)
            if name == "score":
                off(getattr(given[5], what), given[2].rows, np.dtype(float))
            elif options.get("reduction", "mean") == reduction:
                place = "in place" if options.get("out") is given[0] else "apart"
                if what == "loss":
                    array = found if name == "cross_entropy" else found[0]
                    off(array.address, array.shape, array.dtype)
                elif what == place:
                    off(options["out"].address, options["out"].shape, options["out"].dtype)
            return found

        monkeypatch.setattr(owner, name, altered)
        monkeypatch.setattr(gpu_times, "_in_turn", lambda problem, calls: dict.fromkeys(calls, Seconds(*[1e-3] * 4, 9)))
        check, copy, *times = gpu_times.time_calls(machine, (2, 70), "float32")
        assert {figure for figure, error in check.errors if error > 1} == seen
        assert copy.seconds is not None
        assert {(one.seconds, one.note) for one in times} == {(None, "wrong")}

    @pytest.mark.parametrize("value", [np.nan, 7.0])
    def test_a_wrong_loss_of_a_row_that_is_not_looked_at_is_seen(self, monkeypatch, value):
        verb, machine = fastxent.cross_entropy, gpu.runner().machine

        def wrong(*given, **options):
            losses = verb(*given, **options)
            if options.get("reduction") == "none":
                values = np.empty(losses.shape, losses.dtype)
                machine.copy_to_host(0, values, losses.address)
                values[2] = value
                machine.copy_to_device(0, values, losses.address)
            return losses

        monkeypatch.setattr(fastxent, "cross_entropy", wrong)
        monkeypatch.setattr(gpu_figures, "_some", lambda problem: [0, 1])
        with machine.current():
            problem = gpu_problem.Problem(machine, (3, 9), "float32")
            check = Check.of("", gpu_figures.figures(problem))
        assert {figure for figure, error in check.errors if error > 1} == {"losses of all rows"}

    def test_losses_that_are_no_numbers_are_seen_though_all_agree(self, monkeypatch):
        machine = gpu.runner().machine
        monkeypatch.setattr(gpu_figures, "_some", lambda problem: [0, 1])
        with machine.current():
            problem = gpu_problem.Problem(machine, (3, 9), "float32")
            spoilt = problem.placed(np.full(9, np.nan, np.float32))
            machine.copy(0, spoilt.address, problem.logits.address + 2 * 36, 36)
            check = Check.of("", gpu_figures.figures(problem))
        assert {figure for figure, error in check.errors if error > 1} == {"all of them numbers"}

    def test_a_score_that_does_nothing_is_seen_behind_one_that_did(self, monkeypatch):
        machine = gpu.runner().machine
        with machine.current():
            problem = gpu_problem.Problem(machine, (3, 9), "float32")
            scoring = gpu_problem.Scoring(problem, 2)
            scoring.ask()
            monkeypatch.setattr(launches, "score", lambda *about: None)
            check = Check.of("", gpu_figures.figures(problem, [scoring]))
        assert {"nll of scores", "rank of scores", "top_ids of scores"} <= {
            figure for figure, error in check.errors if error > 1
        }

    def test_timed_calls_see_the_same_logits_each_time(self, monkeypatch):
        """Also those whose gradient takes the logits' place."""
        problems, seen = [], []
        problem_of, verb = gpu_times.Problem, fastxent.cross_entropy_with_grad
        monkeypatch.setattr(gpu_times, "Problem", lambda *about: problems.append(problem_of(*about)) or problems[0])

        def looking(logits, *given, **options):
            if problems and logits is problems[0].logits:
                seen.append(problems[0].fetched(logits.address, 70, logits.dtype).tobytes())
            return verb(logits, *given, **options)

        monkeypatch.setattr(fastxent, "cross_entropy_with_grad", looking)
        gpu_times.time_calls(gpu.runner().machine, (1, 70), "float32")
        assert len(seen) == 2 * (1 + 2) + 3
        assert len(set(seen)) == 1

    def test_a_score_is_timed_behind_what_keeps_the_device_busy(self):
        machine = gpu.runner().machine
        machine.events.clear()
        gpu_times.time_calls(machine, (1, 70), "float32")
        events = list(machine.events)
        behind = [k for k, event in enumerate(events) if event[1] == "after 0"]
        assert len(behind) == 2 * gpu_times._ROUNDS
        assert {events[k - 1] for k in behind} == {(0, "statistics")}
        assert {events[k + 1][0] for k in behind} == {events[k][0] for k in behind}

    def test_what_was_found_is_written_whatever_ends_it(self, monkeypatch, tmp_path):
        file, written = tmp_path / "gpu.json", []

        def interrupted(*about):
            yield [Check("5 x 4, abacus", (("loss", 0.5),))]
            yield []
            written.append(json.loads(file.read_text()))
            raise KeyboardInterrupt

        monkeypatch.setattr(cli_compare, "_BETWEEN", 0.0)
        monkeypatch.setattr(apart, "results", interrupted)
        CliRunner().invoke(cli_compare.compare, ["--suite", "gpu", "--json", str(file)])
        assert [json.loads(file.read_text())] == written
        (check,) = written[0]["checks"]
        assert check == {"problem": "5 x 4, abacus", "errors": {"loss": 0.5}, "right": True, "note": ""}

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo")
    def test_who_reads_a_pipe_gets_one_record(self, monkeypatch, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        monkeypatch.setattr(cli_compare, "_BETWEEN", 0.0)
        monkeypatch.setattr(apart, "results", lambda *about: ([Check(name)] for name in "abc"))
        with ThreadPoolExecutor(1) as reader:
            found = reader.submit(pipe.read_text)
            CliRunner().invoke(cli_compare.compare, ["--suite", "gpu", "--json", str(pipe)])
        assert [check["problem"] for check in json.loads(found.result())["checks"]] == ["a", "b", "c"]

    @pytest.mark.skipif(not Path("/dev/stdout").is_symlink(), reason="needs /dev/stdout")
    def test_a_record_is_no_table(self):
        done = CliRunner().invoke(cli_compare.compare, ["--suite", "gpu", "--json", "/dev/stdout"])
        assert (done.exit_code, "name a file of its own" in done.stderr) == (2, True)

    def test_command(self, monkeypatch, tmp_path):
        pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
        taken = Time("loss", (3, 70), "bfloat16", "fastxent", Seconds(1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 9), 0.87)
        found = [
            Check("a", (("loss", 0.5),)), Check("b", (("loss", 0.5), ("rank", np.inf))), Check("c", note=LEFT_OUT),
            taken, replace(taken, seconds=None, note="absent: needs quack: pip install quack-kernels"),
        ]  # fmt: skip
        found.insert(0, Device("an abacus", (9, 0), (("numba", "0.99"),)))
        monkeypatch.setattr(apart, "results", lambda *about: (part for part in (found[:2], found[2:])))
        files = ["--json", str(tmp_path / "gpu.json"), "--html", str(tmp_path / "gpu.html")]
        done = CliRunner().invoke(cli_compare.compare, ["--suite", "gpu", *files])
        assert done.output.splitlines() == [
            "an abacus",
            "b: rank off by inf of what is allowed",
            "3 x 70 bfloat16, fastxent, loss: 1.2 ms (min 1 ms, IQR 17%), 87% of a copy",
            "3 x 70 bfloat16, fastxent, loss: absent: needs quack: pip install quack-kernels",
            "an abacus: 3 checks, 1 wrong, 1 left out; 1 times",
            "what is asked of an H200: 1 met, 0 missed, 7 not measured",
        ]
        assert str(done.exception) == "1 checks are wrong on this GPU"
        written = (tmp_path / "gpu.html").read_text("utf-8")
        assert "quack-kernels" in written
        assert "an abacus, compute capability 9.0; fastxent " in written
        assert ", numba 0.99; measured " in written


def first_pieces():
    """Of work: three that find something, of which one fails; one that hangs, one that ends its process, one more."""
    works = (
        lambda before: [Check("first", (("loss", 0.5),)), Check(f"{os.getpid()}")],
        lambda before: 1 // 0,
        lambda before: [Check("second", (("found before", float(len(before))),)), Check(f"{os.getpid()}")],
        lambda before: time.sleep(1000),
        lambda before: os._exit(7),
        lambda before: [Check("last", (("loss", 0.0),))],
    )
    return [gpu.Unit(Check(f"piece {k}"), work, 1000.0) for k, work in enumerate(works)]


def is_well():
    return True


def is_not_well():
    return False


def last():
    return gpu.Unit(Check("last"), lambda before: [Check("last", (("loss", 0.0),))], 1000.0)


def nothing_to_list():
    raise KeyError


def nothing_the_second_time():
    yield gpu.Unit(Check("piece 0"), lambda before: os._exit(7), 1000.0)
    raise KeyError


def hanging():
    return [gpu.Unit(Check("piece 0"), lambda before: time.sleep(1000), 1000.0), last()]


def leaving_another():
    """A process that holds the pipe, as a compiler's may."""

    def work(before):
        opened = [number for number in range(3, 64) if Path(f"/proc/self/fd/{number}").exists()]
        nothing = subprocess.DEVNULL
        subprocess.Popen(["sleep", "30"], pass_fds=opened, stdin=nothing, stdout=nothing, stderr=nothing)
        os._exit(7)

    return [gpu.Unit(Check("piece 0"), work, 1000.0), last()]


class TestApart:
    """Work in other processes, real ones."""

    @pytest.mark.parametrize("well", [is_well, is_not_well])
    def test_it_goes_on_behind_what_hangs_or_dies(self, monkeypatch, well):
        monkeypatch.setattr(apart, "_BEGINNING", 100.0)
        found = [one for several in apart.results(first_pieces, well, 2.0, 1000.0) for one in several]
        first, second = (one.problem for one in found if one.problem.isdigit())
        assert (first == second) is well()
        assert [str(one) for one in found if not one.problem.isdigit()] == [
            "first: loss off by 0.5 of what is allowed",
            "piece 1: failed: ZeroDivisionError: integer division or modulo by zero",
            "second: found before off by 3 of what is allowed",
            "piece 3: failed: it has taken more than 2 s",
            "piece 4: failed: it has ended its process, with 7",
            "last: loss off by 0 of what is allowed",
        ]

    @pytest.mark.parametrize(("listed", "piece"), [(nothing_to_list, 0), (nothing_the_second_time, 1)])
    def test_a_process_that_cannot_begin(self, listed, piece):
        with pytest.raises(apart.NothingBegunError, match=f"before it begins piece {piece}"):
            list(apart.results(listed, is_well, 2.0, 1000.0))

    def test_the_last_piece_ends_with_the_whole(self, monkeypatch):
        monkeypatch.setattr(apart, "_BEGINNING", 100.0)
        (found,), (last,) = apart.results(hanging, is_well, 1000.0, 0.0)
        assert (str(found), str(last)) == (
            "piece 0: failed: it has taken more than 1 s",
            "last: loss off by 0 of what is allowed",
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_what_a_process_leaves_behind_keeps_nobody_waiting(self):
        start = time.monotonic()
        (found,), (last,) = apart.results(leaving_another, is_well, 50.0, 1000.0)
        assert (found.note, last.problem) == ("failed: it has ended its process, with 7", "last")
        assert time.monotonic() < start + 25


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.usefixtures("simulated")
def test_a_suite_that_is_told_to_end_leaves_its_record_and_no_process(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "fastxent", "compare", "--suite", "gpu", "--json", str(file)]
    with subprocess.Popen(command) as process:
        while process.poll() is None and not file.exists():
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (work,) = (child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes())
        process.terminate()
        process.terminate()  # as some who end a job do
        assert process.wait(20) == 128 + signal.SIGTERM
    assert json.loads(file.read_text())["checks"]
    assert not Path(f"/proc/{work}").exists()


VERBS = {
    "loss and gradient alone": "statistics",
    "gradient in place": "statistics_and_gradient",
    "score with top 5": "score",
    "softmax": "log_softmax",
    "binary": "binary",
    "counts": "count",
    "divergences": "divergences",
    "blocks of classes": "gradient",
}


@pytest.mark.usefixtures("simulated")
class TestChecks:
    """Each fails where the verb it is for is off by five in a million."""

    @pytest.mark.parametrize("name", VERBS)
    def test_a_wrong_verb_is_seen(self, monkeypatch, name):
        verb = getattr(cuda, VERBS[name])

        def wrong(*arguments, **options):
            result = verb(*arguments, **options)
            off = np.float64(1 + 5e-6)
            if name == "counts":
                return result + 1
            if name == "divergences":
                return tuple(part * off for part in result)
            for array in written(name, arguments, options, result):
                array *= array.dtype.type(off)
            return result

        monkeypatch.setattr(cuda, VERBS[name], wrong)
        check = gpu_checks.of_verb(np.dtype(np.float32), 40, name, np.random.default_rng(0))
        assert check.right is False, check.errors

    def test_a_wrong_gradient_in_few_bits_is_seen(self, monkeypatch):
        verb = cuda.statistics_and_gradient

        def wrong(logits, targets, coefficients, out, **options):
            result = verb(logits, targets, coefficients, out, **options)
            if out.dtype == ml_dtypes.bfloat16:
                out *= out.dtype.type(1 + 2**-7)
            return result

        monkeypatch.setattr(cuda, "statistics_and_gradient", wrong)
        check = gpu_checks.of_options(np.dtype(ml_dtypes.bfloat16), 40, "plain", np.random.default_rng(0))
        assert [figure for figure, error in check.errors if error > 1] == ["gradient in bfloat16"]

    def test_wrong_arrays_of_the_device_are_seen(self, monkeypatch):
        fetched = gpu_checks._fetched
        monkeypatch.setattr(gpu_checks, "_fetched", lambda array: fetched(array) * np.float32(1 + 5e-6))
        check = gpu_checks.of_verb(np.dtype(np.float32), 40, "arrays of the device", np.random.default_rng(0))
        assert check.right is False

    def test_rows_that_are_summed_otherwise_are_seen(self, monkeypatch):
        monkeypatch.setattr(gpu_checks, "MANY_ROWS", 40)
        right = gpu_checks.of_many_rows(np.dtype(np.float32), 20, np.random.default_rng(0))
        assert right.right, right.errors
        fetched = gpu_checks._fetched

        def without_a_row(array):
            values = fetched(array)
            return values * np.float32(39 / 40) if values.shape == () else values

        monkeypatch.setattr(gpu_checks, "_fetched", without_a_row)
        check = gpu_checks.of_many_rows(np.dtype(np.float32), 20, np.random.default_rng(0))
        assert {figure for figure, error in check.errors if error > 1} == {"loss", "mean alone", "sum alone"}

    def test_rows_that_are_not_written_are_seen(self, monkeypatch):
        function = gpu_checks.fastxent.cross_entropy_with_grad

        def elsewhere(*given, out=None, **options):
            return function(*given, **options)

        monkeypatch.setattr(gpu_checks.fastxent, "cross_entropy_with_grad", elsewhere)
        check = gpu_checks.of_large(np.dtype(ml_dtypes.bfloat16), (7, 70))
        assert {figure for figure, error in check.errors if error > 1} == {
            *("gradient", "gradient of the mean", "bits in place"),
        }


def written(name, arguments, options, result):
    """What a verb has filled."""
    if name == "loss and gradient alone":
        return [result.nll]
    if name == "gradient in place":
        return [arguments[3]]
    if name == "score with top 5":
        return [result.nll]
    if name == "softmax":
        return [arguments[1]]
    if name == "binary":
        return [options["losses"]]
    return [arguments[4]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it compiles
class TestPeers:
    @pytest.mark.parametrize("name", ["torch", "torch.compile", "overwriting"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_they_are_checked_then_timed(self, monkeypatch, name, dtype):
        torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
        monkeypatch.setitem(gpu_peers.PEERS, "overwriting", overwriting)
        monkeypatch.setattr(gpu_peers, "_OVERWRITES", ("overwriting",))
        found = gpu_peers._of_tensors(torch, name, (70, 300), dtype, "cpu", timed)
        assert {operation: seconds.rounds for operation, seconds in found.items()} == {
            "loss": 2,
            "loss and gradient": 2,
        }

    def test_one_that_gives_the_gradient_of_the_sum(self, monkeypatch):
        torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
        mean = gpu_peers.PEERS["torch"](torch)

        def summed(logits, targets):
            return mean.gradient(logits, targets) * len(logits)

        monkeypatch.setitem(gpu_peers.PEERS, "summed", lambda torch: gpu_peers.Peer(mean.loss, summed, of_sum=True))
        found = gpu_peers._of_tensors(torch, "summed", (70, 300), "float32", "cpu", timed)
        assert set(found) == {"loss", "loss and gradient"}

    @pytest.mark.parametrize(("of_loss", "of_gradient"), [(1.001, 1.0), (1.0, 1.001)])
    def test_a_wrong_one_is_not_timed(self, monkeypatch, of_loss, of_gradient):
        torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")

        def off_by(torch):
            def cross_entropy(logits, targets):
                right = torch.nn.functional.cross_entropy(logits, targets)
                return right * of_gradient - right.detach() * (of_gradient - of_loss)

            return gpu_peers._by_autograd(cross_entropy)

        monkeypatch.setitem(gpu_peers.PEERS, "torch", off_by)
        found = gpu_peers._of_tensors(torch, "torch", (70, 300), "float32", "cpu", timed)
        assert found.startswith("wrong: off by ")

    def test_absent_ones_say_what_installs_them(self, monkeypatch):
        for name, module, command in (
            ("Liger", "liger_kernel.transformers.functional", "liger-kernel"),
            ("quack", "quack.cross_entropy", "quack-kernels"),
            ("quack, one read", "quack.cross_entropy", "quack-kernels"),
            ("flash-attention", "flash_attn.losses.cross_entropy", "flash-attn"),
            ("cupy", "cupy", "cupy-cuda13x"),
        ):
            monkeypatch.setattr(gpu_peers, "_with_torch", lambda name, *about: gpu_peers.PEERS[name](None))
            monkeypatch.setitem(sys.modules, module, None)
            (found,) = gpu_peers.time_peer(name, (3, 70), "float32", 1.0)
            assert re.match(rf"absent: needs \w+.*: pip install {command}", found.note), found.note


def timed(body, restore):
    samples = []
    for _ in range(2):
        restore()
        start = time.perf_counter()
        body()
        samples.append(time.perf_counter() - start)
    return Seconds.of(samples)


def overwriting(torch):
    """Like those that leave the gradient where the logits were, and never meant to see it again."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(context, logits, targets):
            assert logits.std() > 2
            with torch.enable_grad():
                leaf = logits.detach().clone().requires_grad_()
                loss = torch.nn.functional.cross_entropy(leaf, targets)
            (context.gradient,) = torch.autograd.grad(loss, leaf)
            logits.data.copy_(context.gradient)
            return loss.detach()

        @staticmethod
        def backward(context, upstream):
            return context.gradient * upstream, None

    return gpu_peers._by_autograd(Overwriting.apply)


def took(candidate, operation, seconds, shape=(16_384, 32_000), dtype="bfloat16", of_ceiling=0.9):
    return Time(operation, shape, dtype, candidate, Seconds(*[seconds] * 4, 9), of_ceiling)


def test_the_tables_of_a_record():
    times = [took("plain", "loss", 1e-3), took("softcap", "loss", 1.29e-3), took("softcap", "loss and gradient", 2e-3)]
    times += [
        took("plain", "loss and gradient", 1.6e-3),
        took(gpu_bars.HOST, "loss", 12e-6, (64, 1000), of_ceiling=None),
    ]
    large = (32_768, 32_000)
    times += [took("fastxent", name, 1e-3, large, "float32", 0.91) for name in ("loss", "loss and gradient")]
    times += [took("torch", "loss and gradient", 4.5e-3, large, "float32", 0.2)]
    bars = list(gpu_bars.of(times))
    record = {
        "device": "an abacus", "compute_capability": [9, 0], "fastxent": "1.0", "date": "2026-01-02",
        "software": {"numba": "0.99", "torch": "9.9"}, "checks": [{"right": True}, {"right": None}],
        "times": [asdict(one) for one in times],
        "bars": [{"met": bar.met, "said": str(bar)} for bar in bars],
    }  # fmt: skip
    lines = gpu_tables.section(json.loads(json.dumps(record))).splitlines()
    conditions = "an abacus, compute capability 9.0; fastxent 1.0, numba 0.99, torch 9.9; measured 2026-01-02"
    assert lines[0] == f"{conditions}; 1 of 2 checks right"
    assert lines[2].endswith("| with gradient | of a copy | in place | with scores | torch |")
    assert "| 32,768 x 32,000 | float32 | 1 ms | 91% | 1 ms | 91% |  |  | 4.50 x |" in lines
    assert "| 16,384 x 32,000 | bfloat16 | softcap | 1.29 x | 1.25 x |" in lines
    assert "The host's part of a loss: 12 us." in lines
    assert "- 32,768 x 32,000 float32, loss, of a copy: 91.0%, at least 92.0%: missed" in lines
    assert next(line for line in lines if line.startswith("Of ")) == "Of 6 bars that were measured 5 are met."


def test_a_picture_has_ours_and_peers_of_a_shape_however_they_were_found():
    pytest.importorskip("matplotlib")
    others = (32_768, 32_000)
    times = [
        *(took("fastxent", gpu_bars.GRADIENT, 1e-3, shape) for shape in (others, (4096, 32_000))),
        *(took("quack", gpu_bars.GRADIENT, 2e-3, shape) for shape in (others, (4096, 32_000))),
    ]
    drawn = pictures.of_times([asdict(one) for one in times])
    assert len(drawn) == 2
    assert all(name in picture for picture in drawn for name in ("fastxent", "quack"))


class TestBars:
    """What is asked of an H200."""

    def test_of_a_copy(self):
        for shape, dtype, operation, share, asked in (
            ((32_768, 32_000), "bfloat16", "loss", 0.93, 0.92),
            ((8192, 128_256), "float32", "loss and gradient", 0.89, 0.90),
            ((8192, 128_256), "float32", "loss and gradient in place", 0.91, 0.90),
            ((1_048_576, 1000), "bfloat16", "loss", 0.79, 0.80),
            ((8, 262_144), "bfloat16", "loss", 0.51, 0.50),
        ):
            bars = {bar.what: bar for bar in gpu_bars.of([took("fastxent", operation, 1e-3, shape, dtype, share)])}
            bar = bars[f"{shape[0]:,} x {shape[1]:,} {dtype}, {operation}, of a copy"]
            assert (bar.measured, bar.bar, bar.met) == (share, asked, share > asked)
            others = [bars[name].met for name in bars if "of a copy" in name and bars[name] is not bar]
            assert others == [None, None]

    def test_of_a_shape_without_a_gigabyte(self):
        found = [
            took("fastxent", "loss", 71e-6, (4096, 32_000)),
            took("fastxent", "loss and gradient", 0.2e-3, (4096, 32_000)),
        ]
        said = [str(bar) for bar in gpu_bars.of(found) if "seconds" in bar.what]
        assert said == [
            "4,096 x 32,000 bfloat16, loss, seconds: 71 us, at most 72 us: met",
            "4,096 x 32,000 bfloat16, loss and gradient, seconds: 200 us, at most 140 us: missed",
        ]
        assert not [bar for bar in gpu_bars.of(found) if "of a copy" in bar.what]

    def test_of_the_hosts_part(self):
        found = [took(gpu_bars.HOST, "loss", 16e-6, (64, 1000)), took(gpu_bars.HOST, "loss and gradient", 14e-6)]
        assert [str(bar) for bar in gpu_bars.of(found)] == [
            "loss, the host's part, seconds: 16 us, at most 15 us: missed",
            "loss and gradient, the host's part, seconds: 14 us, at most 15 us: met",
        ]

    def test_of_options(self):
        found = [took("plain", "loss", 1e-3), took("softcap", "loss", 1.29e-3), took("weights", "loss", 1.06e-3)]
        found += [took("90% ignored", "loss", 0.21e-3), took("90% ignored", "loss and gradient", 1e-3)]
        judged = {bar.what.split(", ")[2]: bar.met for bar in gpu_bars.of(found) if bar.met is not None}
        assert judged == {"softcap": True, "weights": False, "90% ignored": False}
        options = {option for option, _ in gpu_bars._OPTIONS}
        assert options <= set(gpu_times.options_of(3))

    def test_of_peers(self):
        found = [took("fastxent", "loss and gradient", 1e-3), took("torch", "loss and gradient", 3.9e-3)]
        found += [took("quack", "loss and gradient", 1.0e-3), took("Liger", "loss", 9e-3)]
        judged = {bar.what.rpartition("fast as ")[2]: bar.met for bar in gpu_bars.of(found) if "as fast" in bar.what}
        known = {"quack": True, "torch": False}
        assert judged == dict.fromkeys(("quack, one read", "Liger", "torch.compile")) | known
        assert set(gpu_bars._PEERS) <= set(gpu_peers.NAMES)
