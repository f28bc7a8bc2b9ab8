""".npy files that are read in pieces."""

import math
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastxent.io import NpySource, SourceError
from tests.damage import damage_file, readable_or_one_clear_line


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


def test_a_file_that_shrinks(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(1000))
    with NpySource(path) as source:
        os.truncate(path, 500)
        with pytest.raises(SourceError, match="truncated"):
            source.block(0, 10)


@pytest.mark.parametrize("size", [0, 130])
def test_a_file_that_shrinks_once_its_size_was_looked_at(tmp_path, monkeypatch, size):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(1000))
    with NpySource(path) as source:
        monkeypatch.setattr(source, "_check_size", lambda: os.truncate(path, size))
        with pytest.raises(SourceError, match=r"a\.npy: truncated while it was read"):
            source.block(0, 10)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: np.save(path, np.ones(1001))])
def test_a_file_that_vanishes_or_changes(tmp_path, spoil):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(1000))
    with NpySource(path) as source:
        source.check_unchanged()
        spoil(path)
        with pytest.raises(SourceError, match=r"a\.npy: (No such file|changed while)"):
            source.check_unchanged()


@given(damage=st.lists(st.tuples(st.integers(8, 120), st.integers(0, 255)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_one_clear_error_or_readable(tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("damaged") / "a.npy"
    np.save(path, np.arange(6.0).reshape(2, 3))
    damage_file(path, damage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with readable_or_one_clear_line(), NpySource(path) as source:
            source.block(0, min(6, math.prod(source.shape)))


def test_a_format_of_the_future(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x09\x00" + bytes(200))
    with pytest.raises(SourceError, match=r"version \(9, 0\)"):
        NpySource(tmp_path / "a.npy")
