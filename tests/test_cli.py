"""The command line as real processes: what it writes, what it says, how it ends."""

import json
import os
import pickle

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import Case
from tests.processes import paths, run


@pytest.fixture
def problem(tmp_path):
    logits, targets, _ = Case(300, 50, ignored=0.1).build()
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "targets.npy", targets)
    return tmp_path, logits, targets


class TestScore:
    def test_records(self, problem):
        folder, logits, targets = problem
        done = run("score", *paths(folder))
        assert (done.returncode, done.stderr) == (0, "")
        assert "perplexity" in done.stdout
        scores = np.load(folder / "scores.npy", allow_pickle=False)
        losses = fastxent.cross_entropy(logits, targets, reduction="none")
        assert fastxent.Scores.load(folder / "scores.npy") == fastxent.score(logits, targets)
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
        "error: there is no backend 'abacus'; the backends are cpu, cuda, reference\n",
    )


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
    done = run("info", env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"})
    reason = fastxent.backends.why_unavailable("cuda")
    assert reason is None or reason in " ".join(done.stdout.split())
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
