"""Columns of parquet and Arrow files, however their rows are grouped."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastxent.io import SourceError, open_source
from tests.damage import damage_file, readable_or_one_clear_line

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")


def column(array):
    """Rows of numbers as fixed-size lists."""
    flat = pyarrow.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        flat = pyarrow.FixedSizeListArray.from_arrays(flat, size)
    return flat


def save(path, **arrays):
    table = pyarrow.table({name: value if hasattr(value, "type") else column(value) for name, value in arrays.items()})
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=11)
    else:
        feather.write_feather(table, path, chunksize=7, compression="lz4" if path.suffix == ".feather" else None)
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow"])


@SUFFIXES
@pytest.mark.parametrize("step", [1, 12, 100, 10_000])
@pytest.mark.parametrize(("shape", "dtype"), [((40, 12), "f4"), ((40, 3, 4), "f2"), ((40,), "i4"), ((40, 5), "f8")])
def test_blocks_are_the_column(tmp_path, suffix, step, shape, dtype):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    path = save(tmp_path / f"a{suffix}", before=np.arange(40), wanted=array)
    with open_source(f"{path}::wanted") as source:
        assert (source.shape, source.dtype) == (array.shape, array.dtype)
        pieces = [source.block(start, min(array.size, start + step)) for start in range(0, array.size, step)]
        np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
        for start, stop in ((30, 31), (3, 20), (array.size, array.size), (0, 1)):  # back and forth
            np.testing.assert_array_equal(source.block(start, stop), array.reshape(-1)[start:stop])


@SUFFIXES
def test_no_rows(tmp_path, suffix):
    with open_source(save(tmp_path / f"a{suffix}", x=np.zeros((0, 3), "f4"))) as source:
        assert source.shape == (0, 3)
        assert source.block(0, 0).size == 0


@SUFFIXES
def test_what_is_refused(tmp_path, suffix):
    path = save(
        tmp_path / f"a{suffix}",
        words=pyarrow.array(["a", "b"]),
        lists=pyarrow.array([[1.0], [2.0, 3.0]]),
        nulls=pyarrow.array([1.0, None]),
        rows=pyarrow.array([[1.0, 2.0], None], pyarrow.list_(pyarrow.float32(), 2)),
    )
    for name, message in (
        ("", "holds 4 columns; pick one with .*::NAME, one of words, lists, nulls, rows"),
        ("::words", "holds string, not numbers"),
        ("::lists", "lists of any length; cast it to a fixed-size list"),
        ("::no", "has no column 'no', but words"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(f"{path}{name}")
    for name in ("nulls", "rows"):
        with open_source(f"{path}::{name}") as source, pytest.raises(SourceError, match="holds nulls"):
            source.block(0, int(np.prod(source.shape)))


@SUFFIXES
@pytest.mark.parametrize("spoil", [os.unlink, lambda path: os.truncate(path, 100)])
def test_a_file_that_vanishes_or_shrinks(tmp_path, suffix, spoil):
    path = save(tmp_path / f"a{suffix}", x=np.zeros((40, 3), "f4"))
    with open_source(path) as source:
        source.block(0, 3)
        spoil(path)
        with pytest.raises(SourceError, match=r"No such file|changed while it was read"):
            source.block(3, 6)


@SUFFIXES
def test_damaged_files_are_one_clear_error_or_readable(tmp_path_factory, suffix):
    @given(damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
    @settings(deadline=None, max_examples=60)
    def check(damage):
        path = save(tmp_path_factory.mktemp("damaged") / f"a{suffix}", x=np.arange(120.0).reshape(40, 3))
        damage_file(path, damage)
        with readable_or_one_clear_line(), open_source(f"{path}::x") as source:
            source.block(0, min(9, int(np.prod(source.shape))))

    check()
