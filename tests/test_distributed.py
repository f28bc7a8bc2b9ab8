"""`fastxent score` on real schedulers and workers: the bytes of one process, and what happens when they die."""

import contextlib
import logging
import os
import re
import signal
import threading

import numpy as np
import pytest

import fastxent
from fastxent.bench import scale
from fastxent.runs import RunError
from tests import cluster, processes
from tests.processes import paths, run, start, wait_until_done

distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
from fastxent import distributed as ours  # noqa: E402

ROWS = 4000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Logits, targets, and whole.npy with the scores of one process."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((ROWS, 500), dtype=np.float32)
    np.save(folder / "logits.npy", logits)
    for number in range(4):
        np.save(folder / f"shard{number}.npy", logits[1000 * number : 1000 * (number + 1)])
    targets = rng.integers(0, 500, ROWS)
    targets[::7] = -100
    np.save(folder / "targets.npy", targets)
    assert run("score", *paths(folder), "--top-k", "3").returncode == 0
    (folder / "scores.npy").rename(folder / "whole.npy")
    return folder


@pytest.fixture
def folder(files, tmp_path):
    for path in files.glob("*.npy"):
        os.link(path, tmp_path / path.name)
    return tmp_path


def same(folder):
    return (folder / "scores.npy").read_bytes() == (folder / "whole.npy").read_bytes()


@contextlib.contextmanager
def two_workers(folder):
    with (
        cluster.scheduler(folder) as (_, address),
        cluster.worker(folder, address, "one") as one,
        cluster.worker(folder, address, "two") as two,
    ):
        yield address, one, two


def test_workers_on_this_machine(folder):
    done = run("score", *paths(folder), "--top-k", "3", "--workers", "2", "--chunk-rows", "100")
    assert (done.returncode, done.stderr) == (0, "")
    assert same(folder)


def test_a_scheduler_and_its_workers_and_one_is_killed(folder):
    shards = [str(folder / f"shard{number}.npy") for number in range(4)]
    with two_workers(folder) as (address, one, _):
        options = ["--top-k", "3", "--scheduler", address, "--chunk-rows", "5"]
        process = start(folder, *options)
        wait_until_done(folder, process, 100)
        one.send_signal(signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=100)
        assert (process.returncode, stderr) == (0, ""), stdout
        assert same(folder)
        (folder / "scores.npy").unlink()
        done = run("score", *shards, *paths(folder)[1:], *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert same(folder)


def test_the_scheduler_is_lost_and_the_run_is_resumed(folder):
    with cluster.scheduler(folder) as (scheduler, address), cluster.worker(folder, address, "one"):
        process = start(folder, "--top-k", "3", "--scheduler", address, "--chunk-rows", "2")
        wait_until_done(folder, process, 100)
        scheduler.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.startswith(f"error: the scheduler at {address} was lost")
    assert stderr.endswith("; --resume goes on with what is done\n")
    assert stderr.count("\n") == 1
    assert 0 < processes.journalled(folder) < ROWS
    done = run("score", *paths(folder), "--top-k", "3", "--resume", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert same(folder)


def test_a_shard_that_one_worker_cannot_read_is_read_by_the_other(folder):
    """What a worker cannot read it is never given again; the run says so only when no worker is left."""
    (folder / "blind").mkdir()
    (folder / "blind" / "sitecustomize.py").write_text(
        "import builtins, io\n"
        "whole = io.open\n"
        "def blind(file, *arguments, **options):\n"
        "    if 'shard2' in str(file):\n"
        "        raise OSError(5, 'Input/output error', str(file))\n"
        "    return whole(file, *arguments, **options)\n"
        "builtins.open = io.open = blind\n"
    )
    shards = [str(folder / f"shard{number}.npy") for number in range(4)]
    blind = {"PYTHONPATH": str(folder / "blind")}
    with cluster.scheduler(folder) as (_, address), cluster.worker(folder, address, "blind", **blind):
        options = ["--top-k", "3", "--scheduler", address, "--chunk-rows", "50"]
        done = run("score", *shards, *paths(folder)[1:], *options)
        assert done.returncode == 1
        assert "error: no worker can read the files; tcp://127.0.0.1" in done.stderr
        assert "Input/output error" in done.stderr
        with cluster.worker(folder, address, "sound"):
            done = run("score", *shards, *paths(folder)[1:], *options, "--resume")
            assert (done.returncode, done.stderr) == (0, "")
    assert same(folder)


def test_workers_out_of_memory_are_a_clear_error_and_the_run_is_resumed(folder):
    """Every worker dies of one block, as the kernel's killer would have it."""
    (folder / "full").mkdir()
    (folder / "full" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'fastxent.runs':\n"
        "            from importlib.machinery import PathFinder\n"
        "            spec = PathFinder.find_spec(name, path, target)\n"
        "            run = spec.loader.exec_module\n"
        "            def execute(module):\n"
        "                run(module)\n"
        "                score = module.Job.score\n"
        "                def full(self, start, stop):\n"
        "                    if start == 1000: os.kill(os.getpid(), 9)\n"
        "                    return score(self, start, stop)\n"
        "                module.Job.score = full\n"
        "            spec.loader.exec_module = execute\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    environment = {"PYTHONPATH": str(folder / "full")}
    with contextlib.ExitStack() as stack:
        _, address = stack.enter_context(cluster.scheduler(folder))
        for number in range(5):
            stack.enter_context(cluster.worker(folder, address, f"full{number}", **environment))
        done = run("score", *paths(folder), "--top-k", "3", "--scheduler", address, "--chunk-rows", "1000")
    assert done.returncode == 1
    assert "cost one worker after another its life" in done.stderr
    assert done.stderr.endswith("; --resume goes on with what is done\n")
    done = run("score", *paths(folder), "--top-k", "3", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert same(folder)


def test_errors_of_usage(folder):
    done = run("score", *paths(folder), "--workers", "2", "--scheduler", "tcp://127.0.0.1:1")
    assert done.returncode == 2
    assert "two ways to say where" in done.stderr
    assert not (folder / "scores.npy").exists()


def test_the_measurement_checks_what_it_times(tmp_path):
    tasks, seconds, size = scale.time_tasks(40)
    assert 40 <= tasks <= 100
    assert seconds > 0
    assert size > 0
    logits, targets = scale.generate(tmp_path, 0.01)
    assert abs(logits.stat().st_size - 0.01e9) < 0.002e9
    assert len(np.load(targets)) == len(np.load(logits, mmap_mode="r"))


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(ours, "_PATIENCE", 0.5)
    with (
        pytest.raises(RunError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1: "),
        ours.connect("tcp://127.0.0.1:1"),
    ):
        pass


class Job:
    """Stands for a `fastxent.runs.Job` whose files are no matter."""

    def __init__(self, trouble=None, version=fastxent.__version__):
        self.trouble, self.version = trouble, version

    def score(self, start, stop):
        if self.trouble is not None:
            raise self.trouble
        return np.arange(start, stop)


@contextlib.contextmanager
def in_this_process():
    with (
        distributed.LocalCluster(
            n_workers=1, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield local, ours.Cluster(client)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(version="0.0.0"), rf"worker .*: has fastxent {re.escape(fastxent.__version__)}, the run 0\.0\.0"),
        (Job(MemoryError("4 GB")), "worker .*: out of memory: 4 GB"),
        (Job(OSError("gone")), "no worker can read the files; .*: gone"),
    ],
)
def test_trouble_is_named_with_its_worker(job, message):
    with in_this_process() as (_, workers), pytest.raises(RunError, match=message):
        list(workers.score_blocks(job, 10, 5, 0))


def test_blocks_come_in_order_and_few_are_under_way():
    with in_this_process() as (_, workers):
        blocks = list(workers.score_blocks(Job(), 1000, 7, 14))
    np.testing.assert_array_equal(np.concatenate(blocks), np.arange(14, 1000))


def test_no_worker_is_left(monkeypatch):
    monkeypatch.setattr(ours, "_PATIENCE", 2.0)
    with in_this_process() as (local, workers):
        blocks = workers.score_blocks(Job(), 1000, 1, 0)
        next(blocks)
        local.scale(0)
        with pytest.raises(RunError, match="has no worker left"):
            list(blocks)


class BlindOnTheFirst(Job):
    """Whose files the first worker cannot read."""

    def score(self, start, stop):
        if distributed.get_worker().name == 0:
            raise OSError("gone")
        return super().score(start, stop)


def test_a_worker_that_comes_back_elsewhere_goes_on(monkeypatch):
    """One worker is given no more, and the blocks kept to the other are lost with it; a third is new."""
    monkeypatch.setattr(ours, "_PATIENCE", 2.0)
    with in_this_process() as (local, workers):
        local.scale(2)
        local.wait_for_workers(2)
        blocks = workers.score_blocks(BlindOnTheFirst(), 60, 1, 0)
        rows = [*next(blocks)]
        while len(rows) < 30:
            rows += [*next(blocks)]
        (blind,) = workers._shunned
        assert blind == local.workers[0].address
        local.sync(local.workers[1].close)
        later = threading.Timer(1.0, local.scale, [3])
        later.start()
        assert np.concatenate([rows, *blocks]).tolist() == list(range(60))
        later.join()


def test_only_the_librarys_own_lines_are_kept_from_stderr(caplog):
    with in_this_process() as (local, _):
        theirs = logging.getLogger("distributed.client")
        before = theirs.level
        with ours.connect(local.scheduler_address):
            logging.getLogger("somebody").warning("heard")
            assert not theirs.isEnabledFor(logging.CRITICAL)
        assert theirs.level == before
    assert "heard" in caplog.text


@pytest.mark.slow
def test_ten_gigabytes_in_shards_and_a_worker_is_killed(tmp_path):
    """Two real workers, one killed on the way: the bytes of one process; `pytest -m slow` runs it."""
    rows, classes, shards, block = 20_000, 128_256, 8, 250
    rng = np.random.default_rng(2026)
    noise = 4 * rng.standard_normal((block, classes), dtype=np.float32)
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows // shards, classes)}
    names = [tmp_path / f"shard{number}.npy" for number in range(shards)]
    try:
        for name in names:
            with name.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(rows // shards // block):
                    np.roll(noise, int(rng.integers(classes)), axis=1).tofile(file)
        assert sum(name.stat().st_size for name in names) > 10e9
        np.save(tmp_path / "targets.npy", rng.integers(0, classes, rows))
        assert run("score", *names, *paths(tmp_path)[1:], "--top-k", "5").returncode == 0
        (tmp_path / "scores.npy").rename(tmp_path / "whole.npy")
        with two_workers(tmp_path) as (address, one, _):
            options = ["--top-k", "5", "--scheduler", address]
            process = processes.start_on(names, tmp_path, *options)
            wait_until_done(tmp_path, process, rows // 3)
            one.send_signal(signal.SIGKILL)
            assert processes.journalled(tmp_path) < rows
            stdout, stderr = process.communicate(timeout=600)
            assert (process.returncode, stderr) == (0, ""), stdout
        assert same(tmp_path)
    finally:
        for name in names:
            name.unlink(missing_ok=True)
