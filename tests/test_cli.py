"""The command line as real processes: what it writes, what it says, how it ends."""

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import Case

COMMAND = [sys.executable, "-m", "fastxent"]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.fixture
def problem(tmp_path):
    logits, targets, _ = Case(300, 50, ignored=0.1).build()
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "targets.npy", targets)
    return tmp_path, logits, targets


def paths(folder):
    return folder / "logits.npy", folder / "targets.npy", "-o", folder / "scores.npy"


class TestScore:
    def test_records(self, problem):
        folder, logits, targets = problem
        done = run("score", *paths(folder))
        assert (done.returncode, done.stderr) == (0, "")
        assert "perplexity" in done.stdout
        scores = np.load(folder / "scores.npy", allow_pickle=False)
        losses = fastxent.cross_entropy(logits, targets, reduction="none")
        assert scores.dtype == [("log_prob", "<f4"), ("valid", "?"), ("is_greedy", "?")]
        np.testing.assert_array_equal(scores["valid"], targets != -100)
        np.testing.assert_array_equal(scores["log_prob"], np.where(targets == -100, np.nan, -losses))
        assert not (folder / "scores.npy.part").exists()

    def test_json_summary(self, problem):
        folder, logits, targets = problem
        summary = json.loads(run("score", *paths(folder), "--json").stdout)
        valid = targets != -100
        mean = fastxent.cross_entropy(logits.astype(np.float64), targets, backend="reference")
        assert summary["rows"] == 300
        assert summary["valid"] == valid.sum()
        assert summary["mean_nll_nats"] == pytest.approx(mean, rel=5e-7)
        assert summary["mean_nll_bits"] == pytest.approx(mean / np.log(2), rel=5e-7)
        assert summary["perplexity"] == pytest.approx(np.exp(mean), rel=2e-6)
        assert summary["accuracy"] == pytest.approx((logits.argmax(axis=1) == targets)[valid].mean())
        assert summary["bytes_read"] == logits[valid].nbytes
        assert summary["gigabytes_per_second"] > 0

    def test_ties_go_to_the_lowest_id_and_nan_rows_are_counted(self, tmp_path):
        np.save(tmp_path / "logits.npy", np.array([[1.0, 1, 0], [1, 1, 0], [np.nan, 1, 0], [-np.inf, 0, 0]]))
        np.save(tmp_path / "targets.npy", np.array([0, 1, 1, 0]))
        summary = json.loads(run("score", *paths(tmp_path), "--json").stdout)
        assert (summary["valid"], summary["nan"], summary["correct"]) == (4, 1, 1)
        assert summary["mean_nll_nats"] is None

    def test_leading_axes_and_one_row(self, tmp_path):
        for shape in ((2, 3, 7), (7,)):
            np.save(tmp_path / "logits.npy", np.arange(np.prod(shape), dtype=float).reshape(shape))
            np.save(tmp_path / "targets.npy", np.full(shape[:-1], 6))
            assert run("score", *paths(tmp_path), "--force").returncode == 0
            assert np.load(tmp_path / "scores.npy").shape == shape[:-1]

    def test_no_rows(self, tmp_path):
        np.save(tmp_path / "logits.npy", np.empty((0, 7)))
        np.save(tmp_path / "targets.npy", np.empty(0, int))
        assert run("score", *paths(tmp_path), "--json").returncode == 0
        assert np.load(tmp_path / "scores.npy").shape == (0,)

    def test_existing_output_is_refused_without_force(self, problem):
        folder, _, _ = problem
        (folder / "scores.npy").write_text("precious")
        done = run("score", *paths(folder))
        assert done.returncode == 2
        assert "--force" in done.stderr
        assert (folder / "scores.npy").read_text() == "precious"
        assert run("score", *paths(folder), "--force").returncode == 0

    def test_several_logits(self, problem):
        folder, logits, _ = problem
        for number, rows in enumerate((slice(0, 120), slice(120, None))):
            np.save(folder / f"part{number}.npy", logits[rows])
        assert run("score", *paths(folder)).returncode == 0
        for names in (["part0.npy", "part1.npy"], ["part?.npy"]):
            done = run("score", *names, "targets.npy", "-o", "again.npy", "--force", cwd=folder)
            assert (done.returncode, done.stderr) == (0, "")
            assert (folder / "again.npy").read_bytes() == (folder / "scores.npy").read_bytes()

    def test_options_reach_the_run(self, tmp_path):
        logits = np.random.default_rng(5).standard_normal((2, 3, 7)).astype(np.float16)
        targets = np.array([[1, 2, 3], [4, -1, 6]])
        np.save(tmp_path / "logits.npy", logits.view("u2"))
        np.save(tmp_path / "targets.npy", targets)
        options = "--logits-dtype float16 --temperature 0.5 --shift 1 --ignore-index -1 --memory 1MiB --chunk-rows 2"
        done = run("score", *paths(tmp_path), *options.split(), "--format", "npy", "--on-nan", "error", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        scores = np.load(tmp_path / "scores.npy")
        assert scores["valid"].tolist() == [[True, True, False], [False, True, False]]
        shifted = np.array([[2, 3, -1], [-1, 6, -1]])
        losses = fastxent.cross_entropy(logits, shifted, ignore_index=-1, temperature=0.5, reduction="none")
        np.testing.assert_array_equal(scores["log_prob"][scores["valid"]], -losses[shifted != -1])

    def test_output_formats(self, problem):
        zarr, parquet = pytest.importorskip("zarr"), pytest.importorskip("pyarrow.parquet")
        folder, _, targets = problem
        for name, options in (("s.zarr", ()), ("s.parquet", ()), ("s.out", ("--format", "parquet"))):
            done = run("score", *paths(folder)[:3], folder / name, *options)
            assert (done.returncode, done.stderr) == (0, "")
        assert zarr.open_group(folder / "s.zarr", mode="r")["log_prob"].shape == targets.shape
        assert parquet.read_table(folder / "s.parquet").num_rows == 300
        assert (folder / "s.out").read_bytes() == (folder / "s.parquet").read_bytes()
        assert run("score", *paths(folder)[:3], folder / "s.zarr").returncode == 2
        assert run("score", *paths(folder)[:3], folder / "s.zarr", "--force").returncode == 0

    def test_a_summary_file(self, problem):
        folder, _, _ = problem
        done = run("score", *paths(folder), "--summary", folder / "summary.json", "--json")
        assert json.loads((folder / "summary.json").read_text()) == json.loads(done.stdout)
        for name, options, message in (
            ("summary.json", (), "summary.json exists; --force"),
            ("logits.npy", ("--force",), "logits.npy is another file of this run"),
            ("scores.npy", ("--force",), "scores.npy is another file of this run"),
            ("new.npy", (), "new.npy is another file of this run"),
            ("no/s.json", (), "no is not a folder"),
        ):
            output = folder / ("new.npy" if name == "new.npy" else "scores.npy")
            done = run("score", *paths(folder)[:3], output, "--summary", folder / name, *options)
            assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert len(np.load(folder / "logits.npy")) == 300

    @pytest.mark.parametrize("size", ["1MB", "1.5 GiB", "300000", "2kB"])
    def test_sizes(self, problem, size):
        assert run("score", *paths(problem[0]), "--memory", size).returncode == 0

    @pytest.mark.parametrize("size", ["much", "-1", "1XB", ""])
    def test_what_is_no_size(self, problem, size):
        done = run("score", *paths(problem[0]), "--memory", size)
        assert (done.returncode, "is not a number of bytes" in done.stderr) == (2, True)


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-loaded",)


def _truncate(folder):
    size = (folder / "logits.npy").stat().st_size
    os.truncate(folder / "logits.npy", size - 1)


def _replace(folder, name, array, **options):
    np.save(folder / name, array, **options)


def _out_of_range(folder):
    targets = np.load(folder / "targets.npy")
    targets[[17, 200]] = 50, -3
    np.save(folder / "targets.npy", targets)


BAD = {
    "missing": (lambda f: (f / "logits.npy").unlink(), "logits.npy: No such file"),
    "half without a name": (
        lambda f: _replace(f, "logits.npy", np.zeros((300, 50), "V2")),
        "float8_e4m3fn, float8_e5m2; the logits' dtype must be given with --logits-dtype",
    ),
    "the output is an input": (lambda f: os.link(f / "logits.npy", f / "scores.npy.part"), "is an input"),
    "truncated": (_truncate, "truncated: "),
    "empty": (lambda f: (f / "logits.npy").write_bytes(b""), "not a readable .npy file"),
    "text": (lambda f: (f / "logits.npy").write_text("hello, I am not an array"), "not a readable .npy file"),
    "folder": (lambda f: [(f / "targets.npy").unlink(), (f / "targets.npy").mkdir()], "targets.npy: Is a directory"),
    "pickled": (lambda f: _replace(f, "logits.npy", np.array([_Payload()], object), allow_pickle=True), "pickled"),
    "raw pickle": (lambda f: (f / "logits.npy").write_bytes(pickle.dumps(_Payload())), "not a readable .npy file"),
    "Fortran": (lambda f: _replace(f, "logits.npy", np.asfortranarray(np.zeros((300, 50)))), "Fortran order"),
    "integers": (lambda f: _replace(f, "logits.npy", np.zeros((300, 50), int)), "logits must have one of the dtypes"),
    "no classes": (lambda f: _replace(f, "logits.npy", np.zeros((300, 0))), "at least one class"),
    "scalar": (lambda f: _replace(f, "logits.npy", np.float64(1)), "at least one axis"),
    "shape": (lambda f: _replace(f, "targets.npy", np.zeros(299, int)), "(300,); got (299,)"),
    "float targets": (
        lambda f: _replace(f, "targets.npy", np.zeros(300)),
        "integer class indices, or probabilities of the logits' shape; not float64",
    ),
    "out of range": (_out_of_range, "2 of 300 do not, the first in row 17 with value 50"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(problem, spoil, message):
    folder, _, _ = problem
    spoil(folder)
    done = run("score", *paths(folder), cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not (folder / "scores.npy").exists()
    assert not (folder / "scores.npy.journal").exists()
    assert not (folder / "pickle-was-loaded").exists()


def test_a_header_that_promises_too_much_allocates_nothing(problem):
    folder, _, _ = problem
    with (folder / "logits.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (300, 10**15)}
        np.lib.format.write_array_header_1_0(file, header)
    done = run("score", *paths(folder))
    assert (done.returncode, "truncated" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("score",),
        ("score", "a.npy", "b.npy"),
        ("score", "a.npy", "-o", "c.npy"),
        ("score", "a.npy", "b.npy", "-o", "no/such/folder/c.npy"),
        ("no-such",),
    ],
)
def test_bad_usage_is_exit_code_2(arguments, tmp_path):
    assert run(*arguments, cwd=tmp_path).returncode == 2


def test_an_unknown_backend_is_bad_usage(problem):
    folder, _, _ = problem
    done = run("score", *paths(folder), "--backend", "abacus")
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no backend 'abacus'; the backends are cpu, reference\n",
    )


@pytest.fixture
def large(tmp_path):
    """4 GB of logits that take no disk: a file of holes."""
    with (tmp_path / "logits.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 1000)})
        file.truncate(file.tell() + 4 * 10**9)
    np.save(tmp_path / "targets.npy", np.zeros(10**6, np.int64))
    return tmp_path


def anonymous_megabytes(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def start(folder, *options, logits=None):
    files = paths(folder) if logits is None else (logits, *paths(folder)[1:])
    process = subprocess.Popen(
        [*COMMAND, "score", *map(str, files), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "scores.npy.part").exists() and process.poll() is None:
        time.sleep(0.001)
    return process


def journalled(folder):
    """Rows done by the last whole line of the journal; 0 without one."""
    try:
        lines = (folder / "scores.npy.journal").read_bytes().split(b"\n")[1:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["done"] if lines else 0


def wait_until_done(folder, process, rows):
    """Wait for so many rows in the journal."""
    while journalled(folder) < rows:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


ROWS = 40_000


@pytest.fixture
def long(tmp_path):
    """Seconds of work when it is done row by row."""
    rng = np.random.default_rng(20)
    np.save(tmp_path / "logits.npy", rng.standard_normal((ROWS, 64), dtype=np.float32))
    np.save(tmp_path / "targets.npy", rng.integers(0, 64, ROWS))
    assert run("score", *paths(tmp_path)).returncode == 0
    (tmp_path / "scores.npy").rename(tmp_path / "whole.npy")
    return tmp_path


def test_twenty_kills_and_the_same_bytes(long):
    for number in range(20):
        process = start(long, "--chunk-rows", "1", "--resume")
        wait_until_done(long, process, ROWS * (number + 1) // 22)
        assert process.poll() is None
        process.kill()
        _, stderr = process.communicate()
        assert (process.returncode, stderr) == (-signal.SIGKILL, "")
        assert 0 < journalled(long) < ROWS
        assert not (long / "scores.npy").exists()
    done = run("score", *paths(long), "--resume", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < json.loads(done.stdout)["rows_now"] < ROWS
    assert (long / "scores.npy").read_bytes() == (long / "whole.npy").read_bytes()
    assert sorted(path.name for path in long.iterdir()) == ["logits.npy", "scores.npy", "targets.npy", "whole.npy"]


def test_interrupted_is_exit_code_130_and_can_be_resumed(long):
    process = start(long, "--chunk-rows", "1")
    wait_until_done(long, process, 10)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "interrupted; --resume goes on with what is done\n")
    assert 0 < journalled(long) < ROWS
    done = run("score", *paths(long))
    assert (done.returncode, "is unfinished; --resume goes on with it, --force begins again" in done.stderr) == (
        2,
        True,
    )
    done = run("score", *paths(long), "--resume", "--temperature", "2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "was begun with another temperature: 1.0, not 2.0" in done.stderr
    assert run("score", *paths(long), "--resume").returncode == 0
    assert (long / "scores.npy").read_bytes() == (long / "whole.npy").read_bytes()


def test_a_full_disk_ends_with_1_and_keeps_what_is_done(long):
    (long / "disk").mkdir()
    mount = "mount -t tmpfs -o size=100k none disk"
    if subprocess.run(["unshare", "-rm", "bash", "-c", mount], cwd=long, capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    score = shlex.join([*COMMAND, "score", "logits.npy", "targets.npy", "-o", "disk/scores.npy", "--chunk-rows", "100"])
    script = (
        f"{mount} && {{ {score}; echo $?; tail -n 1 disk/scores.npy.journal; mount -o remount,size=10m disk;"
        f"{score} --resume >&2; cmp disk/scores.npy whole.npy && ls disk; }}"
    )
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], cwd=long, capture_output=True, text=True)
    code, last, *left = done.stdout.splitlines()
    assert code == "1"
    assert 10_000 < json.loads(last)["done"] < 17_000
    assert done.stderr.startswith(
        "error: disk/scores.npy: No space left on device; --resume goes on with what is done\n"
    )
    assert left == ["scores.npy"]


def test_a_file_that_may_not_grow(long):
    limited = f"ulimit -f 100; exec {shlex.join(map(str, [*COMMAND, 'score', *paths(long), '--chunk-rows', '100']))}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), "File too large; --resume" in done.stderr) == (1, 1, True)
    assert 10_000 < journalled(long) < 20_000


@pytest.mark.parametrize("size", [0, 5000], ids=["to-nothing", "to-what-was-read"])
def test_an_input_truncated_under_the_run_ends_with_1_and_one_line(long, size):
    process = start(long, "--chunk-rows", "1")
    wait_until_done(long, process, 100)
    os.truncate(long / "logits.npy", size)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert stderr.startswith("error: ")
    assert "truncated" in stderr
    assert stderr.count("\n") == 1
    assert 0 < journalled(long) < ROWS


def test_a_nan_row_may_end_the_run(tmp_path):
    logits = np.zeros((5, 3))
    logits[3, 1] = np.nan
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "targets.npy", np.zeros(5, int))
    done = run("score", *paths(tmp_path), "--on-nan", "error", "--chunk-rows", "1")
    said = "error: the log-probability of row 3 is NaN, the first of its kind; --resume goes on with what is done\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert journalled(tmp_path) == 3
    assert json.loads(run("score", *paths(tmp_path), "--resume", "--json").stdout)["nan"] == 1


def memory_of(process):
    """Megabytes of anonymous memory of a run when it begins to write, and at its highest; it must end well."""
    first = highest = anonymous_megabytes(process.pid)
    while process.poll() is None:
        try:
            highest = max(highest, anonymous_megabytes(process.pid))
        except (StopIteration, FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == 0
    return first, highest


def test_memory_stays_bounded(large):
    first, highest = memory_of(start(large))
    assert highest - first < 200
    assert np.load(large / "scores.npy", mmap_mode="r").shape == (10**6,)


def _parquet(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(10**7, np.float32)), 1000)
    with parquet.ParquetWriter(folder / "logits.parquet", pyarrow.schema([("x", rows.type)])) as writer:
        for _ in range(40):
            writer.write_table(pyarrow.table({"x": rows}))


def _arrow(folder):
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(4 * 10**8, np.float32)), 1000)
    feather.write_feather(pyarrow.table({"x": rows}), folder / "logits.arrow", chunksize=4000)


def _zarr(chunks):
    def save(folder):
        pytest.importorskip("zarr").create_array(
            folder / "logits.zarr", shape=(4 * 10**5, 1000), chunks=chunks, dtype="f4"
        )

    return save


@pytest.mark.parametrize(
    "save",
    [_parquet, _arrow, _zarr((4000, 1000)), _zarr((10_000, 100)), _zarr((10, 1000))],
    ids=["parquet", "arrow", "zarr-rows", "zarr-columns", "zarr-small"],
)
def test_memory_stays_bounded_where_it_is_decoded(tmp_path, save):
    """1.6 GB decoded; what stores zeros well is no less to decode."""
    save(tmp_path)
    (logits,) = tmp_path.iterdir()
    np.save(tmp_path / "targets.npy", np.zeros(4 * 10**5, np.int64))
    first, highest = memory_of(start(tmp_path, logits=logits))
    assert 20 < highest - first < 256


def test_memory_stays_bounded_with_two_classes(tmp_path):
    with (tmp_path / "logits.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 2)})
        file.truncate(file.tell() + 8 * 10**7)
    with (tmp_path / "targets.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": (10**7,)})
        file.truncate(file.tell() + 10**7)
    first, highest = memory_of(start(tmp_path))
    assert highest - first < 200


def test_names_that_look_like_markup(problem):
    folder, _, _ = problem
    awkward = folder / "runs[old] a[b].npy"
    done = run("score", *paths(folder)[:3], awkward.name, cwd=folder)
    assert done.returncode == 0
    assert "runs[old] a[b].npy" in done.stdout
    assert awkward.exists()


def test_info_with_an_unknown_backend_in_the_environment():
    done = run("info", env=os.environ | {"FASTXENT_BACKEND": "abacus"})
    assert done.returncode == 0
    assert "there is no backend 'abacus'" in done.stdout


def test_info():
    done = run("info")
    assert done.returncode == 0
    for word in ("backend cpu", "threads", "kernel cache", "Numba", fastxent.__version__):
        assert word in done.stdout


def test_version():
    assert run("--version").stdout.strip().endswith(fastxent.__version__)


def test_demo(tmp_path):
    done = run("demo", cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2.0611537e-09" in done.stdout
    assert "of the limit" in done.stdout
    folder = tmp_path / "fastxent-demo"
    again = run("score", *paths(folder), "--force", "--json")
    assert json.loads(again.stdout)["accuracy"] > 0.85
