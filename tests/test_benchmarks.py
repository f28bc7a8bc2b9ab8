"""Every asv benchmark runs, every value of its parameters in one; and the history is a branch of its own."""

import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from click.testing import CliRunner

import fastxent

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmarks():
    sys.path.insert(0, str(FOLDER))
    try:
        for path in sorted(FOLDER.glob("benchmarks/[!_]*.py")):
            module = importlib.import_module(f"benchmarks.{path.stem}")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                for method, _ in inspect.getmembers(kind, inspect.isfunction):
                    if re.fullmatch("(time|track|peakmem)_.+", method):  # as asv finds them
                        yield kind, method
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def keep_threads():
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def runs():
    """Each benchmark once, and settings that together have each value of each parameter."""
    of_kind = {}
    for kind, method in benchmarks():
        of_kind.setdefault(kind, []).append(method)
    for kind, methods in of_kind.items():
        params = getattr(kind, "params", ())
        count = max(map(len, params), default=1)
        # a parameter begins one value later than the one before: the reference has one thread
        settings = [tuple(values[(i + k) % len(values)] for k, values in enumerate(params)) for i in range(count)]
        for i in range(max(count, len(methods))):
            yield kind, methods[min(i, len(methods) - 1)], settings[i if i < count else 0]


@pytest.mark.parametrize(
    ("kind", "method", "setting"), list(runs()),
    ids=lambda part: "-".join(part) if isinstance(part, tuple) else getattr(part, "__name__", part),
)  # fmt: skip
def test_benchmark_runs(kind, method, setting):
    benchmark = kind()
    try:
        benchmark.setup(*setting)
    except NotImplementedError as lack:  # which asv leaves out too
        pytest.skip(str(lack))
    result = getattr(benchmark, method)(*setting)
    assert method.startswith(("time_", "peakmem_")) or result > 0


def test_every_value_of_a_parameter_runs():
    for kind, _ in benchmarks():
        for k, values in enumerate(getattr(kind, "params", ())):
            assert {setting[k] for one, _, setting in runs() if one is kind} == set(values)


def test_every_kind_of_benchmark_is_found():
    found = {f"{kind.__name__}.{method}" for kind, method in benchmarks()}
    assert {
        "Operation.time_call", "Operation.track_ns_per_element", "Operation.track_peak_bytes", "Start.track_import",
        "Start.track_first_call_from_the_cache", "Memory.peakmem_loss", "Call.time_smallest", "LinearLoss.time_loss",
    } <= found  # fmt: skip


def test_parameters_name_no_machine():
    for kind, _ in benchmarks():
        for values in getattr(kind, "params", ()):
            assert all(isinstance(value, str) for value in values), kind


def zeros(logits, targets, out, backend):
    return np.zeros(len(logits), np.float32)


def gradient_without_small_entries(logits, targets, out, backend):
    found = fastxent.cross_entropy_with_grad(logits, targets, reduction="none", out=out, backend=backend)
    out[np.abs(out) < 1e-7] = 0
    return found


def last_rank_wrong(logits, targets, out, backend):
    scores = fastxent.score(logits, targets, top_k=5, backend=backend)
    scores.rank[-1] += 1
    return scores


@pytest.mark.parametrize(
    ("operation", "wrong", "figure"),
    [
        ("loss", zeros, "loss"),
        ("loss and gradient", gradient_without_small_entries, "gradient"),
        ("score with the top five", last_rank_wrong, "rank"),
    ],
)
def test_a_wrong_operation_is_not_timed(monkeypatch, operation, wrong, figure):
    kind = next(kind for kind, method in benchmarks() if method == "track_peak_bytes")
    monkeypatch.setitem(inspect.getmodule(kind).OPERATIONS, operation, wrong)
    with pytest.raises(AssertionError, match=f"Not equal to tolerance .*\n{figure}\n"):
        kind().setup(operation, "512x32000", "float32", "cpu", "one thread")


@pytest.mark.parametrize("wrong", ["dweight", "entropy"])
def test_a_wrong_linear_loss_is_not_timed(monkeypatch, wrong):
    kind = next(kind for kind, method in benchmarks() if method == "time_scores")
    gradients, scores = kind.loss_and_gradients, kind.scores

    def off(benchmark):
        found = (gradients if wrong == "dweight" else scores)(benchmark)
        (found[2][-1:] if wrong == "dweight" else found.entropy)[...] *= 1.001
        return found

    monkeypatch.setattr(kind, "loss_and_gradients" if wrong == "dweight" else "scores", off)
    with pytest.raises(AssertionError, match=f"{wrong} is off"):
        kind().setup("256x256x16000")


def _git(*arguments, cwd):
    return subprocess.check_output(["git", *arguments], cwd=cwd, text=True).strip()


@pytest.fixture
def history(tmp_path, monkeypatch):
    """The module over a repository of one commit, and what asv is asked, which ends as ``ends`` says."""
    repository(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("history")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "git", functools.partial(_git, cwd=tmp_path))
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "PAGES", tmp_path / "pages")
    asked, ends = [], {}

    def run(command, cwd, **named):
        asked.append(command[3:])
        if command[3] == "run" and "--dry-run" not in command:
            result = tmp_path / "results" / "machine" / f"{_git('rev-parse', 'HEAD', cwd=tmp_path)[:8]}-env.json"
            result.parent.mkdir(exist_ok=True)
            result.write_text("{}")
        return subprocess.CompletedProcess(command, ends.get(command[3], 0))

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
    return SimpleNamespace(module=module, asked=asked, ends=ends, git=functools.partial(_git, cwd=tmp_path))


def repository(path):
    git = functools.partial(_git, cwd=path)
    git("init", "-q", "-b", "main")
    for name, value in (("name", "Somebody"), ("email", "somebody@example.org")):
        git("config", f"user.{name}", value)
    (path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "Code")


def test_the_history_is_kept_on_a_branch_without_the_code(history, tmp_path):
    git, module = history.git, history.module
    for number in range(2):
        module.check_out()
        (tmp_path / "results" / f"{number}.json").write_text("{}")
        module.keep(f"commit {number}")
        module.keep("nothing new")
    assert git("ls-tree", "--name-only", "benchmark-results").split() == ["0.json", "1.json"]
    assert git("log", "--format=%s", "benchmark-results").splitlines()[1].startswith("Results of commit 0 at ")
    assert git("log", "--format=%s", "main") == "Code"


def test_history_measures_what_is_new_and_nothing_twice(history):
    measure = functools.partial(CliRunner().invoke, history.module.main)
    assert measure([]).exit_code == 0
    assert [command[-1] for command in history.asked if command[0] == "run"] == ["HEAD^!"]
    done = measure([])
    assert (done.exit_code, done.output.splitlines()[0]) == (
        0,
        "nothing is new since the last commit that was measured",
    )
    assert [command[0] for command in history.asked] == ["machine", "run", "publish", "machine", "publish"]
    history.git("commit", "-q", "--allow-empty", "-m", "More")
    assert measure([]).exit_code == 0
    assert history.asked[-2][-1] == "NEW"


def test_a_benchmark_that_fails_takes_no_other_with_it(history):
    history.ends["run"] = 2
    done = CliRunner().invoke(history.module.main, ["HEAD^!"])
    assert done.exit_code == 2
    assert "some benchmarks failed; the others are kept" in done.output
    assert history.git("ls-tree", "-r", "--name-only", "benchmark-results").endswith("-env.json")
    assert history.asked[-1][0] == "publish"
    history.ends["run"] = 1
    done = CliRunner().invoke(history.module.main, ["HEAD^!"])
    assert (done.exit_code, done.output) == (1, "Error: asv run has ended with 1\n")


def test_a_quick_look_is_not_kept(history):
    assert CliRunner().invoke(history.module.main, ["--quick"]).exit_code == 0
    assert history.asked == [["machine", "--yes"], ["run", "--quick", "--dry-run", "HEAD^!"]]
    assert not history.git("branch", "--list", "benchmark-results")


def test_a_clone_goes_on_with_the_history_of_its_remote(history, tmp_path, monkeypatch):
    CliRunner().invoke(history.module.main, [])
    clone = tmp_path / "clone"
    history.git("clone", "-q", str(tmp_path), str(clone))
    monkeypatch.setattr(history.module, "git", functools.partial(_git, cwd=clone))
    monkeypatch.setattr(history.module, "RESULTS", clone / "results")
    history.module.check_out()
    assert len(list((clone / "results").glob("machine/*-env.json"))) == 1
