"""How runs of the command line end: killed, interrupted, out of disk, robbed of an input; and the memory they take."""

import json
import os
import shlex
import signal
import subprocess

import numpy as np
import pytest

import fastxent
from fastxent.scoring import record_dtype
from tests.processes import COMMAND, journalled, memory_of, paths, run, start, wait_until_done

ROWS = 40_000
FITS = 100 * 1024 // record_dtype(np.dtype(np.float32), 0).itemsize  # records in 100 KB


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """A compiler takes memory and seconds that are not the run's."""
    for rows, classes in ((1, 3), (10_000, 100), (1, 300), (3000, 300)):
        fastxent.score(np.zeros((rows, classes), np.float32), np.zeros(rows, int))


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
    assert 0.6 * FITS < json.loads(last)["done"] < FITS
    assert done.stderr.startswith(
        "error: disk/scores.npy: No space left on device; --resume goes on with what is done\n"
    )
    assert left == ["scores.npy"]


def test_a_file_that_may_not_grow(long):
    limited = f"ulimit -f 100; exec {shlex.join(map(str, [*COMMAND, 'score', *paths(long), '--chunk-rows', '100']))}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), "File too large; --resume" in done.stderr) == (1, 1, True)
    assert 0.6 * FITS < journalled(long) < FITS


@pytest.mark.parametrize("size", [0, 5000], ids=["to-nothing", "to-what-was-read"])
def test_an_input_truncated_under_the_run_ends_with_1_and_one_line(long, size):
    process = start(long, "--chunk-rows", "1")
    wait_until_done(long, process, 100)
    os.truncate(long / "logits.npy", size)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1, stderr
    assert stderr.startswith("error: ")
    assert "truncated" in stderr or "changed while it was read" in stderr  # whichever is looked at next, size or stamp
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


@pytest.fixture
def large(tmp_path):
    """4 GB of logits that take no disk: a file of holes."""
    with (tmp_path / "logits.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 1000)})
        file.truncate(file.tell() + 4 * 10**9)
    np.save(tmp_path / "targets.npy", np.zeros(10**6, np.int64))
    return tmp_path


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
