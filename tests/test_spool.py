"""Records that appear whole or not at all, and that survive whatever ends a run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fastxent.io.spool import ResumeError, Spool

RECORD = np.dtype([("score", "<f4"), ("ids", "<i4", (2,))])
RUN = {"version": "1", "inputs": [["a.npy", 10, 1], ["b.npy", 20, 2]], "option": 0.5}


def records(count):
    found = np.zeros(count, RECORD)
    found["score"] = np.arange(count) / 7
    found["ids"][:, 1] = np.arange(count)
    return found


def spool(folder, count=10, name="a.npy", run=RUN, **options):
    return Spool(folder / name, RECORD, (count,), run, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupt(folder, done=4, error=KeyboardInterrupt, **options):
    def go():
        with spool(folder, **options) as one:
            one.append(records(10)[:done])
            raise error

    with pytest.raises(error):
        go()


def finish(one):
    with one:
        one.append(records(10)[one.done :])
        one.publish({})


def test_whole_or_absent(tmp_path):
    with Spool(tmp_path / "a.npy", RECORD, (2, 5), RUN) as one:
        one.append(records(10)[:4])
        assert names(tmp_path) == ["a.npy.journal", "a.npy.part"]
        one.append(records(10)[4:])
        np.testing.assert_array_equal(one.records(), records(10))
        one.publish({})
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), records(10).reshape(2, 5))
    assert names(tmp_path) == ["a.npy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_left_by_an_exception_what_is_done_is_kept(tmp_path, error):
    interrupt(tmp_path, error=error)
    assert names(tmp_path) == ["a.npy.journal", "a.npy.part"]
    with spool(tmp_path, resume=True) as one:
        assert one.done == 4
        one.append(records(10)[4:])
        one.publish({})
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), records(10))
    assert names(tmp_path) == ["a.npy"]


def test_nothing_is_left_of_nothing(tmp_path):
    interrupt(tmp_path, done=0)
    assert names(tmp_path) == []


def test_without_a_part_a_resumed_run_begins(tmp_path):
    finish(spool(tmp_path, resume=True))
    assert len(np.load(tmp_path / "a.npy")) == 10


def test_records_that_were_never_written(tmp_path):
    def early():
        with spool(tmp_path) as one:
            one.append(records(4))
            one.publish({})

    with pytest.raises(ValueError, match="6 records were never written"):
        early()
    assert names(tmp_path) == ["a.npy.journal", "a.npy.part"]


class TestJournal:
    def test_a_line_cut_off_counts_for_nothing(self, tmp_path):
        interrupt(tmp_path)
        journal = tmp_path / "a.npy.journal"
        whole, part = journal.read_bytes(), (tmp_path / "a.npy.part").read_bytes()
        assert json.loads(whole.splitlines()[-1]) == {"done": 4}
        for cut in range(1, len(whole.splitlines()[-1])):
            journal.write_bytes(whole[:-cut])
            for done in (0, 3):  # the second time after a line that follows the one cut off
                with spool(tmp_path, resume=True) as one:
                    assert one.done == done
                    one.append(records(10)[done : done + 3])
            (tmp_path / "a.npy.part").write_bytes(part)
        journal.write_bytes(whole)
        finish(spool(tmp_path, resume=True))
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), records(10))

    def test_records_beyond_it_are_written_again(self, tmp_path):
        interrupt(tmp_path)
        with (tmp_path / "a.npy.part").open("ab") as part:
            part.write(b"\xff" * 1000)
        finish(spool(tmp_path, resume=True))
        finish(spool(tmp_path, name="whole.npy"))
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": "2"}, "another version: 1, not 2"),
            ({"option": None}, r"another option: 0\.5, not None"),
            ({"inputs": [["a.npy", 10, 1], ["b.npy", 21, 2]]}, r"another inputs: \['b.npy', 20, 2\], not .* 21"),
            ({"more": 1}, "another more: None, not 1"),
        ],
    )
    def test_of_another_run(self, tmp_path, change, message):
        interrupt(tmp_path)
        before = (tmp_path / "a.npy.part").read_bytes(), (tmp_path / "a.npy.journal").read_bytes()
        with pytest.raises(ResumeError, match=message):
            spool(tmp_path, resume=True, run=RUN | change).__enter__()
        with pytest.raises(ResumeError, match="another shape"):
            spool(tmp_path, 11, resume=True).__enter__()
        assert before == ((tmp_path / "a.npy.part").read_bytes(), (tmp_path / "a.npy.journal").read_bytes())

    def test_that_says_more_than_the_part_holds(self, tmp_path):
        interrupt(tmp_path)
        os.truncate(tmp_path / "a.npy.part", 150)
        with pytest.raises(ResumeError, match="fewer records than its journal says"):
            spool(tmp_path, resume=True).__enter__()

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"no\n", b"[]\n", b'{"version": "1"}\n{"done": 11}\n', b"{}\n{}\n"]
    )
    def test_that_is_damaged(self, tmp_path, content):
        interrupt(tmp_path)
        (tmp_path / "a.npy.journal").write_bytes(content)
        with pytest.raises(ResumeError, match="is damaged"):
            spool(tmp_path, resume=True).__enter__()
        assert (tmp_path / "a.npy.part").stat().st_size > 128


class TestWhatItRefuses:
    def test_a_part_that_nobody_said_what_to_do_with(self, tmp_path):
        interrupt(tmp_path)
        with pytest.raises(FileExistsError, match=r"a\.npy\.part is unfinished$"):
            spool(tmp_path).__enter__()
        with spool(tmp_path, resume=True) as one:
            assert one.done == 4
        with spool(tmp_path, replace=True) as one:
            assert one.done == 0

    def test_its_inputs(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(3))
        (tmp_path / "b.npy.part").symlink_to(tmp_path / "a.npy")
        for name in ("c.npy.part", "d.npy.journal", "e.parquet.new"):
            os.link(tmp_path / "a.npy", tmp_path / name)
        for name in ("a.npy", "b.npy", "c.npy", "d.npy", "e.parquet"):
            with pytest.raises(FileExistsError, match="is an input"):
                spool(tmp_path, name=name, replace=True, inputs=[tmp_path / "a.npy"], file_format=f".{name[2:]}")
        assert len(np.load(tmp_path / "a.npy")) == 3

    def test_links(self, tmp_path):
        (tmp_path / "a.npy.journal").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FileExistsError, match="is a link"):
            spool(tmp_path)

    def test_what_is_no_regular_file(self, tmp_path):
        for path in ("/dev/null", tmp_path):
            with pytest.raises(FileExistsError, match="not a regular file"):
                Spool(path, RECORD, (1,), RUN, replace=True)
        with pytest.raises(FileExistsError, match="not a zarr store"):
            spool(tmp_path.parent, name=tmp_path.name, file_format=".zarr", replace=True)

    def test_an_existing_file(self, tmp_path):
        (tmp_path / "a.npy").write_text("precious")
        for options in ({}, {"resume": True}):
            with pytest.raises(FileExistsError, match=r"exists$"):
                spool(tmp_path, **options).__enter__()
        assert names(tmp_path) == ["a.npy"]

    def test_a_file_that_appears_while_it_writes(self, tmp_path):
        def late():
            with spool(tmp_path) as one:
                one.append(records(10))
                (tmp_path / "a.npy").write_text("precious")
                one.publish({})

        with pytest.raises(FileExistsError):
            late()
        assert (tmp_path / "a.npy").read_text() == "precious"
        (tmp_path / "a.npy").unlink()
        with spool(tmp_path, resume=True) as one:
            assert one.done == 10
            one.publish({})
        assert names(tmp_path) == ["a.npy"]

    def test_a_part_another_process_is_writing(self, tmp_path):
        code = (
            "import sys; from pathlib import Path; from tests.test_spool import spool, records\n"
            "with spool(Path(sys.argv[1])) as one:\n"
            "    one.append(records(10)); print('open', flush=True); sys.stdin.readline(); one.publish({})"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout.readline() == "open\n"
        for options in ({}, {"resume": True}, {"replace": True}):
            with pytest.raises(FileExistsError, match="another process"):
                spool(tmp_path, **options).__enter__()
        other.communicate("\n")
        assert other.returncode == 0
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), records(10))


CRASH = """
import os, sys
from pathlib import Path
from fastxent.io import publish
from tests.test_spool import records, spool
folder, name, where = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def end(*_): os.kill(os.getpid(), 9)
def rename_and_end(*arguments, rename=publish.rename):
    rename(*arguments)
    end()
if where == "writing": publish.WRITERS = dict.fromkeys(publish.WRITERS, end)
if where == "written": publish.rename = end
if where == "renamed": publish.rename = rename_and_end
with spool(folder, name=name, file_format=Path(name).suffix, resume=True) as one:
    one.append(records(10)[one.done:])
    if where == "removed":
        Path.unlink = lambda path, unlink=Path.unlink, **how: (unlink(path, **how), path.suffix == ".part" and end())
    if where == "linked":
        os.link = lambda new, path, link=os.link: (link(new, path), end())
    one.publish({"sum": 7})
"""


@pytest.mark.parametrize("name", ["a.npy", "a.parquet", "a.zarr"])
@pytest.mark.parametrize("where", ["writing", "written", "linked", "renamed", "removed"])
def test_killed_while_it_is_published(tmp_path, name, where):
    """Wherever the end falls between the last record and the last file removed, a resumed run gives the same bytes."""
    pytest.importorskip("pyarrow" if name == "a.parquet" else "zarr")
    if (name, where) in (("a.npy", "writing"), ("a.zarr", "linked")):
        return  # nothing is written, or linked
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    finish(spool(whole, name=name, file_format=f".{name[2:]}"))
    done = subprocess.run([sys.executable, "-c", CRASH, cut, name, where], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-9, "")
    assert names(cut) != [name]
    with spool(cut, name=name, file_format=f".{name[2:]}", resume=True) as one:
        assert one.done == 10
        assert one.published == (None if where in ("writing", "written") else {"sum": 7})
        one.publish({"sum": 7})
    assert names(cut) == [name]
    assert content(cut / name) == content(whole / name)


def content(path):
    """The bytes of a file, or of every file of a folder."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
