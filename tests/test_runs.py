"""Scoring in blocks gives the bits of the whole, however the blocks fall and whatever file they come from."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import fastxent
from fastxent import io, runs
from fastxent.arguments import ScoreOptions
from fastxent.bench.cases import Case
from fastxent.io import publish
from fastxent.io.spool import ResumeError
from fastxent.runs import RunError, score_file


@pytest.fixture
def arrays(tmp_path):
    logits, targets, _ = Case(9, 20_000, "confident", ignored=0.3).build()
    logits[4] = -np.inf
    targets[3] = 5
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "targets.npy", targets)
    return logits, targets


def paths(folder, output="scores.npy"):
    return folder / "logits.npy", folder / "targets.npy", folder / output


@pytest.mark.parametrize("backend", fastxent.backends.available())
@pytest.mark.parametrize("step", [1, 2, 5, 9, 100], ids=lambda step: f"{step}-rows")
def test_any_blocks_give_the_bits_of_the_whole(arrays, tmp_path, backend, step):
    logits, targets = arrays
    options, verbs = ScoreOptions(), fastxent.backends.get(backend)
    with io.open_source(tmp_path / "logits.npy") as source, io.open_source(tmp_path / "targets.npy") as marks:
        records = np.concatenate(list(runs.score_blocks([source], marks, options, verbs, step)))
        from_fourth = np.concatenate(list(runs.score_blocks([source], marks, options, verbs, step, first=4)))
    assert from_fourth.tobytes() == records[4:].tobytes()
    losses = fastxent.cross_entropy(logits, targets, reduction="none", backend=backend)
    want = np.where(targets == -100, np.nan, -losses)
    if backend == "cpu":
        np.testing.assert_array_equal(records["log_prob"], want)
    np.testing.assert_allclose(records["log_prob"], want, rtol=5e-7)
    scored = (targets != -100) & np.isfinite(losses)
    assert scored.sum() > 3
    np.testing.assert_array_equal(records["is_greedy"][scored], (logits.argmax(axis=1) == targets)[scored])


def test_bad_targets_are_found_before_a_logit_is_read(arrays, tmp_path):
    _, targets = arrays
    targets[8] = 20_000
    np.save(tmp_path / "targets.npy", targets)
    with pytest.raises(IndexError, match="row 8 with value 20000"):
        score_file(*paths(tmp_path))
    assert not (tmp_path / "scores.npy.part").exists()


class TestShift:
    @pytest.mark.parametrize("shift", [1, 2, 5, 6])
    @pytest.mark.parametrize("step", [1, 4, 30])
    @pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (30,)])
    def test_is_scoring_what_was_shifted_by_hand(self, tmp_path, shift, step, shape):
        rng = np.random.default_rng(3)
        logits, targets = rng.standard_normal((*shape, 11), dtype=np.float32), rng.integers(0, 11, shape)
        targets[..., 2] = -100
        targets[..., 0] = 99  # the first token is nobody's next
        by_hand = np.full(shape, -100)
        by_hand[..., : max(0, shape[-1] - shift)] = targets[..., shift:]
        np.save(tmp_path / "logits.npy", logits)
        np.save(tmp_path / "targets.npy", targets)
        score_file(*paths(tmp_path), ScoreOptions(shift=shift), chunk_rows=step)
        np.save(tmp_path / "targets.npy", by_hand)
        score_file(*paths(tmp_path, "by_hand.npy"), chunk_rows=step)
        scores = np.load(tmp_path / "scores.npy")
        assert scores.shape == shape
        assert not scores["valid"][..., -1].any()
        assert scores.tobytes() == np.load(tmp_path / "by_hand.npy").tobytes()

    def test_needs_a_sequence(self, tmp_path):
        np.save(tmp_path / "logits.npy", np.zeros(3))
        np.save(tmp_path / "targets.npy", np.int64(1))
        with pytest.raises(ValueError, match="shift needs an axis of positions"):
            score_file(*paths(tmp_path), ScoreOptions(shift=1))


def test_temperature(arrays, tmp_path):
    logits, targets = arrays
    score_file(*paths(tmp_path), ScoreOptions(temperature=0.7))
    want = -fastxent.cross_entropy(logits, targets, temperature=0.7, reduction="none")
    scores = np.load(tmp_path / "scores.npy")
    np.testing.assert_array_equal(scores["log_prob"][scores["valid"]], want[targets != -100])
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            score_file(*paths(tmp_path, "bad.npy"), ScoreOptions(temperature=bad))


def save_everywhere(folder, logits, targets):
    """The problem in every format; ``logits, targets`` of each."""
    arrow, safetensors, zarr = map(pytest.importorskip, ("pyarrow", "safetensors.numpy", "zarr"))
    from pyarrow import feather, parquet

    columns = {"logits": arrow.FixedSizeListArray.from_arrays(arrow.array(logits.ravel()), 50), "targets": targets}
    table = arrow.table(columns)
    parquet.write_table(table, folder / "a.parquet", row_group_size=70)
    feather.write_feather(table, folder / "a.feather", chunksize=64)
    safetensors.save_file({"logits": logits, "targets": targets}, folder / "a.safetensors")
    group = zarr.open_group(folder / "a.zarr", mode="w")
    for name, array in (("logits", logits), ("targets", targets)):
        group.create_array(name, shape=array.shape, chunks=(64, 20)[: array.ndim], dtype=array.dtype)[...] = array
    np.save(folder / "part0.npy", logits[:100])
    np.save(folder / "part1.npy", logits[100:])
    np.save(folder / "targets.npy", targets)
    names = [f"{folder}/a{suffix}" for suffix in (".parquet", ".feather", ".safetensors", ".zarr")]
    return [(f"{name}::logits", f"{name}::targets") for name in names] + [
        (folder / "part?.npy", folder / "targets.npy"),
        ([folder / "part0.npy", folder / "part1.npy"], f"{names[0]}::targets"),
    ]


def test_every_format_gives_the_same_bytes(tmp_path):
    logits, targets, _ = Case(300, 50, ignored=0.1).build()
    np.save(tmp_path / "logits.npy", logits)
    pairs = save_everywhere(tmp_path, logits, targets)
    score_file(*paths(tmp_path))
    want = (tmp_path / "scores.npy").read_bytes()
    for number, pair in enumerate(pairs):
        for chunk_rows in (37, None):
            summary = score_file(*pair, tmp_path / f"{number}.npy", chunk_rows=chunk_rows, replace=True)
            assert (tmp_path / f"{number}.npy").read_bytes() == want
            assert summary.bytes_read == logits[targets != -100].nbytes


def test_every_output_holds_the_same_records(tmp_path):
    logits, targets, _ = Case(300, 50, ignored=0.1).build()
    save_everywhere(tmp_path, logits, targets)
    import zarr
    from pyarrow import parquet

    for name in ("s.npy", "s.parquet", "s.zarr", "s.other"):
        score_file(tmp_path / "part?.npy", tmp_path / "targets.npy", tmp_path / name)
    score_file(tmp_path / "part?.npy", tmp_path / "targets.npy", tmp_path / "s.pq", file_format=".parquet")
    scores = np.load(tmp_path / "s.npy")
    for field in scores.dtype.names:
        np.testing.assert_array_equal(zarr.open_group(tmp_path / "s.zarr", mode="r")[field][...], scores[field])
        column = parquet.read_table(tmp_path / "s.parquet")[field].to_numpy()
        np.testing.assert_array_equal(column, scores[field])
    assert (tmp_path / "s.pq").read_bytes() == (tmp_path / "s.parquet").read_bytes()
    assert (tmp_path / "s.other").read_bytes() == (tmp_path / "s.npy").read_bytes()


@pytest.mark.parametrize("name", io.NAMELESS)
def test_half_logits(tmp_path, name):
    logits, targets, _ = Case(40, 300, dtype=name).build()
    np.save(tmp_path / "logits.npy", logits.view(f"V{logits.itemsize}"))
    np.save(tmp_path / "targets.npy", targets)
    with pytest.raises(io.SourceError, match=rf"logits\.npy: holds \|V{logits.itemsize}, which may be any of float16"):
        score_file(*paths(tmp_path))
    score_file(*paths(tmp_path), logits_dtype=name)
    scores = np.load(tmp_path / "scores.npy")
    assert scores["log_prob"].dtype == np.float32
    np.testing.assert_array_equal(-scores["log_prob"], fastxent.cross_entropy(logits, targets, reduction="none"))


class TestMemory:
    def test_what_is_mapped_may_have_rows_of_any_length(self, arrays, tmp_path):
        score_file(*paths(tmp_path), memory=1000)
        score_file(*paths(tmp_path, "wide.npy"))
        assert (tmp_path / "scores.npy").read_bytes() == (tmp_path / "wide.npy").read_bytes()

    def test_what_is_decoded_needs_its_rows_and_pieces(self, arrays, tmp_path):
        zarr = pytest.importorskip("zarr")
        logits, _ = arrays
        zarr.create_array(tmp_path / "a.zarr", data=logits, chunks=(2, 20_000))
        with pytest.raises(
            ValueError, match=r"a\.zarr: a row of 80,000 bytes, .* at least 42,263,040 bytes; got 42,263,039"
        ):
            score_file(tmp_path / "a.zarr", *paths(tmp_path)[1:], memory=42_263_039)
        score_file(tmp_path / "a.zarr", *paths(tmp_path)[1:], memory=42_263_040)

    def test_records_count(self, arrays, tmp_path):
        with io.open_source(tmp_path / "logits.npy") as logits, io.open_source(tmp_path / "targets.npy") as targets:
            logits.shape = (10**9, 2)
            assert 10_000 < runs.rows_at_a_time([logits], targets, ScoreOptions(), 256 << 20) < (64 << 20) / 256
            assert runs.rows_at_a_time([logits], targets, ScoreOptions(), chunk_rows=7) == 7


class TestResume:
    def interrupt(self, folder, after=3, error=KeyboardInterrupt, **options):
        def stop(done, rows):
            if done >= after:
                raise error

        with pytest.raises(error):
            score_file(*paths(folder), chunk_rows=1, advance=stop, **options)

    def test_goes_on_and_reads_nothing_twice(self, arrays, tmp_path):
        logits, targets = arrays
        self.interrupt(tmp_path)
        told = []
        summary = score_file(*paths(tmp_path), resume=True, advance=lambda done, rows: told.append((done, rows)))
        assert told[0] == (3, 9)
        assert (summary.rows, summary.rows_now) == (9, 6)
        assert summary.bytes_read == logits[3:][targets[3:] != -100].nbytes
        whole = score_file(*paths(tmp_path, "whole.npy"))
        assert (tmp_path / "scores.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
        this_process = {"seconds": 0, "rows_now": 0, "bytes_read": 0}
        assert asdict(summary) | this_process == asdict(whole) | this_process

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"options": ScoreOptions(ignore_index=None, shift=0)}, "another ignore index: -100, not None"),
            ({"options": ScoreOptions(temperature=2.0)}, r"another temperature: 1\.0, not 2\.0"),
            ({"options": ScoreOptions(shift=1)}, "another shift: 0, not 1"),
            ({"backend": "reference"}, "another backend: cpu, not reference"),
        ],
    )
    def test_refuses_other_options(self, arrays, tmp_path, change, message):
        targets = arrays[1]
        targets[:] = 3
        np.save(tmp_path / "targets.npy", targets)
        self.interrupt(tmp_path)
        with pytest.raises(ResumeError, match=message):
            score_file(*paths(tmp_path), resume=True, **change)

    def test_refuses_another_version(self, arrays, tmp_path, monkeypatch):
        self.interrupt(tmp_path)
        monkeypatch.setattr(fastxent, "__version__", "0.0.1")
        with pytest.raises(ResumeError, match="another version"):
            score_file(*paths(tmp_path), resume=True)

    @pytest.mark.parametrize("name", ["logits", "targets"])
    def test_refuses_changed_inputs(self, arrays, tmp_path, name):
        self.interrupt(tmp_path)
        os.utime(tmp_path / f"{name}.npy", ns=(0, 0))
        with pytest.raises(ResumeError, match=rf"another {name}: \[.*{name}\.npy'"):
            score_file(*paths(tmp_path), resume=True)

    def test_memory_and_chunks_may_differ(self, arrays, tmp_path):
        self.interrupt(tmp_path)
        score_file(*paths(tmp_path), resume=True, memory=1 << 20, chunk_rows=2)
        score_file(*paths(tmp_path, "whole.npy"))
        assert (tmp_path / "scores.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()

    def test_the_journal_says_what_the_run_is(self, arrays, tmp_path):
        self.interrupt(tmp_path)
        run, *_, last = map(json.loads, (tmp_path / "scores.npy.journal").read_text().splitlines())
        assert run["version"] == fastxent.__version__
        status = (tmp_path / "logits.npy").stat()
        assert run["logits"] == [str(tmp_path / "logits.npy"), status.st_size, status.st_mtime_ns]
        assert (run["ignore index"], run["logits dtype"], run["shape"]) == (-100, "float32", [9])
        assert last == {"done": 3}


class TestNan:
    def test_is_counted(self, arrays, tmp_path):
        assert score_file(*paths(tmp_path)).nan == 1

    def test_may_end_the_run_and_keeps_what_was_done(self, arrays, tmp_path):
        with pytest.raises(RunError, match="row 4 is NaN"):
            score_file(*paths(tmp_path), on_nan="error", chunk_rows=2)
        assert json.loads((tmp_path / "scores.npy.journal").read_text().splitlines()[-1]) == {"done": 4}
        assert score_file(*paths(tmp_path), resume=True).nan == 1
        with pytest.raises(ValueError, match="on_nan must be count or error"):
            score_file(*paths(tmp_path), on_nan="ignore")

    def test_ends_a_resumed_run_too(self, arrays, tmp_path):
        def stop(done, rows):
            if done >= 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score_file(*paths(tmp_path), chunk_rows=1, advance=stop)
        for _ in range(2):
            with pytest.raises(RunError, match="row 4 is NaN"):
                score_file(*paths(tmp_path), resume=True, on_nan="error")
        assert not (tmp_path / "scores.npy").exists()
        assert score_file(*paths(tmp_path), resume=True).nan == 1

    @pytest.mark.parametrize("name", ["scores.npy", "scores.parquet"])
    def test_ends_a_run_that_was_killed_on_its_way_to_the_output(self, arrays, tmp_path, monkeypatch, name):
        pytest.importorskip("pyarrow")
        rename = publish.rename

        def killed(*names):
            rename(*names)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(publish, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                score_file(*paths(tmp_path, name))
        with pytest.raises(RunError, match="1 of the records are NaN, and on their way to the output already"):
            score_file(*paths(tmp_path, name), resume=True, on_nan="error")
        assert score_file(*paths(tmp_path, name), resume=True).nan == 1


class TestJob:
    def open_files(self, folder):
        files = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return sorted(file.name for file in files if folder in file.parents)

    def job(self, folder, stamps=None, logits="logits.npy"):
        with io.open_source(folder / logits) as model, io.open_source(folder / "targets.npy") as targets:
            stamps = json.dumps([model.stamp(), targets.stamp()]) if stamps is None else stamps
        names = ((str(folder / logits),), (str(folder / "targets.npy"),))
        return runs.Job(fastxent.__version__, names[:1], names[1], None, ScoreOptions(), "cpu", stamps)

    def test_files_are_open_once_and_closed_for_the_next(self, arrays, tmp_path):
        np.save(tmp_path / "others.npy", arrays[0])
        first, second = self.job(tmp_path), self.job(tmp_path, logits="others.npy")
        for _ in range(2):
            assert len(first.score(0, 4)) == 4
            assert self.open_files(tmp_path) == ["logits.npy", "targets.npy"]
        second.score(0, 4)
        assert self.open_files(tmp_path) == ["others.npy", "targets.npy"]
        with pytest.raises(io.SourceError, match="is another file here"):
            self.job(tmp_path, stamps="").score(0, 4)
        assert self.open_files(tmp_path) == []
        second.score(0, 4)
        (tmp_path / "others.npy").unlink()
        with pytest.raises(io.SourceError, match="No such file"):
            second.score(4, 9)
        assert self.open_files(tmp_path) == []


def _replace(path):
    np.save(path.with_name("new.npy"), np.zeros((3, 4)))
    path.with_name("new.npy").replace(path)


SPOILS = {
    "vanished": (lambda path: path.unlink(), "No such file"),
    "changed": (lambda path: os.utime(path, ns=(0, 0)), "changed while"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "truncated|changed while"),
    "another shape": (_replace, "changed while"),
}


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize(("spoil", "message"), SPOILS.values(), ids=SPOILS)
def test_an_input_that_changes_ends_the_run_and_keeps_what_was_done(arrays, tmp_path, shards, spoil, message):
    logits, _ = arrays
    files = [tmp_path / "logits.npy"]
    if shards:
        files = [tmp_path / f"shard{number}.npy" for number in range(3)]
        for number, path in enumerate(files):
            np.save(path, logits[3 * number : 3 * number + 3])

    def advance(done, rows):
        if done == 2:
            spoil(files[-1])

    with pytest.raises(RunError, match=message) as caught:
        score_file(files, *paths(tmp_path)[1:], chunk_rows=1, advance=advance)
    assert str(files[-1]) in str(caught.value)
    assert "\n" not in str(caught.value)
    done = json.loads((tmp_path / "scores.npy.journal").read_text().splitlines()[-1])["done"]
    assert 2 <= done <= (6 if shards else 3)
    assert not (tmp_path / "scores.npy").exists()
