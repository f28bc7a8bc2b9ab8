"""Files that are read in pieces, and files that appear whole or not at all."""

import os

import numpy as np
import pytest

from fastxent.io import NpySink, NpySource, SourceError


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|u1"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_blocks_are_the_array(tmp_path, dtype, version):
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    source = NpySource.open(tmp_path / "a.npy")
    assert (source.shape, source.dtype) == (array.shape, array.dtype)
    pieces = [source.block(start, min(60, start + 7)) for start in range(0, 60, 7)]
    np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
    assert not pieces[0].flags.writeable


def test_a_file_that_shrinks_or_vanishes(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(1000))
    source = NpySource.open(path)
    os.truncate(path, 500)
    with pytest.raises(SourceError, match="truncated"):
        source.block(0, 10)
    path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        source.block(0, 10)


def test_a_format_of_the_future(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x09\x00" + bytes(200))
    with pytest.raises(SourceError, match=r"version \(9, 0\)"):
        NpySource.open(tmp_path / "a.npy")


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
