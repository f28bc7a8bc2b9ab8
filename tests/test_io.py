"""Files that are read in pieces, and files that appear whole or not at all."""

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastxent.io import NpySink, NpySource, SourceError


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|u1"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_blocks_are_the_array(tmp_path, dtype, version):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    with NpySource(tmp_path / "a.npy") as source:
        assert (source.shape, source.dtype) == (array.shape, array.dtype)
        pieces = [source.block(start, min(60, start + 7)) for start in range(0, 60, 7)]
    np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
    assert not pieces[0].flags.writeable


def test_a_file_that_vanishes_can_be_read_and_one_that_shrinks_not(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(1000))
    with NpySource(path) as source:
        path.unlink()
        np.testing.assert_array_equal(source.block(0, 10), 0)
    np.save(path, np.zeros(1000))
    with NpySource(path) as source:
        os.truncate(path, 500)
        with pytest.raises(SourceError, match="truncated"):
            source.block(0, 10)


@given(damage=st.lists(st.tuples(st.integers(8, 120), st.integers(0, 255)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_one_clear_error_or_readable(tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("damaged") / "a.npy"
    np.save(path, np.arange(6.0).reshape(2, 3))
    content = bytearray(path.read_bytes())
    for at, byte in damage:
        content[at] = byte
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = ""
        try:
            with NpySource(path) as source:
                source.block(0, min(6, math.prod(source.shape)))
        except SourceError as error:
            said = str(error)
    assert "\n" not in said


def test_a_format_of_the_future(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x09\x00" + bytes(200))
    with pytest.raises(SourceError, match=r"version \(9, 0\)"):
        NpySource(tmp_path / "a.npy")


def test_a_sink_is_whole_or_absent(tmp_path):
    records = np.arange(10, dtype=np.int32)
    with NpySink(tmp_path / "a.npy", np.int32, (2, 5)) as sink:
        sink.append(records[:4])
        assert not (tmp_path / "a.npy").exists()
        sink.append(records[4:])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), records.reshape(2, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_sink_left_by_an_exception_leaves_nothing(tmp_path, error):
    def interrupted():
        with NpySink(tmp_path / "a.npy", np.int32, (4,)) as sink:
            sink.append(np.zeros(2, np.int32))
            raise error

    with pytest.raises(error):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_records_that_were_never_written(tmp_path):
    with pytest.raises(ValueError, match="2 records were never written"), NpySink(tmp_path / "a", "i4", (4,)) as sink:
        sink.append(np.zeros(2, np.int32))
    assert not list(tmp_path.iterdir())


class TestWhatASinkRefuses:
    def test_its_inputs(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(3))
        (tmp_path / "b.npy.part").symlink_to(tmp_path / "a.npy")
        os.link(tmp_path / "a.npy", tmp_path / "c.npy.part")
        for name in ("a.npy", "b.npy", "c.npy"):
            with pytest.raises(FileExistsError, match="is an input"):
                NpySink(tmp_path / name, "i4", (1,), replace=True, inputs=[tmp_path / "a.npy"])
        assert len(np.load(tmp_path / "a.npy")) == 3

    def test_what_is_no_regular_file(self, tmp_path):
        for path in ("/dev/null", tmp_path):
            with pytest.raises(FileExistsError, match="not a regular file"):
                NpySink(path, "i4", (1,), replace=True)

    def test_an_existing_file(self, tmp_path):
        (tmp_path / "a.npy").write_text("precious")
        with pytest.raises(FileExistsError, match="exists"):
            NpySink(tmp_path / "a.npy", "i4", (1,))

    def test_a_file_that_appears_while_it_writes(self, tmp_path):
        def late():
            with NpySink(tmp_path / "a.npy", "i4", (1,)) as sink:
                sink.append(np.zeros(1, np.int32))
                (tmp_path / "a.npy").write_text("precious")

        with pytest.raises(FileExistsError):
            late()
        assert (tmp_path / "a.npy").read_text() == "precious"
        assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]

    def test_a_part_another_process_is_writing(self, tmp_path):
        code = (
            "import sys, numpy as np; from fastxent.io import NpySink\n"
            "with NpySink(sys.argv[1], 'i4', (1,)) as sink:\n"
            "    print('open', flush=True); sys.stdin.readline(); sink.append(np.ones(1, 'i4'))"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a.npy")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout.readline() == "open\n"
        with pytest.raises(FileExistsError, match="another process"):
            NpySink(tmp_path / "a.npy", "i4", (1,)).__enter__()
        other.communicate("\n")
        assert other.returncode == 0
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), [1])

    def test_nothing_of_a_part_left_by_a_killed_run(self, tmp_path):
        (tmp_path / "a.npy.part").write_bytes(bytes(10_000))
        with NpySink(tmp_path / "a.npy", "i4", (1,)) as sink:
            sink.append(np.ones(1, np.int32))
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), [1])
