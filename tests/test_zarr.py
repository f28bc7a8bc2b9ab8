"""Arrays in zarr stores, however they are chunked, and stores that go away."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxent.io.zarr
from fastxent.io import SourceError, open_source
from fastxent.io.zarr import _boxes
from tests.damage import damage_file, readable_or_one_clear_line

zarr = pytest.importorskip("zarr")


def save(path, array, chunks, **options):
    stored = zarr.create_array(path, shape=array.shape, chunks=chunks, dtype=array.dtype, overwrite=True, **options)
    stored[...] = array


@given(
    shape=st.lists(st.integers(1, 5), max_size=4),
    cuts=st.tuples(st.integers(0, 700), st.integers(0, 700)),
    limit=st.sampled_from([1, 10, 1000]),
)
@settings(deadline=None)
def test_boxes_are_the_flat_range(shape, cuts, limit):
    array = np.arange(int(np.prod(shape))).reshape(shape)
    start, stop = sorted(min(cut, array.size) for cut in cuts)
    boxes = list(_boxes(array.shape, start, stop, limit))
    pieces = [array[index] if len(index) == array.ndim else array[(*index, slice(a, b))] for index, a, b in boxes]
    flat = np.concatenate([np.ravel(piece) for piece in pieces]) if pieces else np.empty(0, int)
    np.testing.assert_array_equal(flat, np.arange(start, stop))
    assert limit < 1000 or len(boxes) <= max(1, 2 * len(shape))
    assert all(
        b - a == 1 or np.prod(shape[len(index) + 1 :]) <= limit for index, a, b in boxes if len(shape) > len(index) + 2
    )


@pytest.mark.parametrize("request_bytes", [8 << 20, 100])
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("step", [1, 5, 35, 49, 1000])
@pytest.mark.parametrize(("shape", "chunks"), [((9, 7), (4, 3)), ((4, 6, 7), (3, 4, 7)), ((60,), (7,)), ((), ())])
def test_blocks_are_the_array(tmp_path, monkeypatch, request_bytes, zarr_format, step, shape, chunks):
    monkeypatch.setattr(fastxent.io.zarr, "_REQUEST", request_bytes)
    array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    save(tmp_path / "a.zarr", array, chunks, zarr_format=zarr_format)
    with open_source(tmp_path / "a.zarr") as source:
        assert (source.shape, source.dtype) == (array.shape, array.dtype)
        pieces = [source.block(start, min(array.size, start + step)) for start in range(0, array.size, step)]
        np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
        assert source.block(0, 0).size == 0


def test_each_chunk_is_decoded_once(tmp_path, monkeypatch):
    """Blocks of 3 rows over chunks of 4: chunks already taken are gone, and nobody asks for them again."""
    monkeypatch.setattr(fastxent.io.zarr, "_REQUEST", 100)
    array = np.arange(48.0).reshape(12, 4)
    save(tmp_path / "a.zarr", array, (4, 4))
    with open_source(tmp_path / "a.zarr") as source:
        for start in range(0, 48, 12):
            np.testing.assert_array_equal(source.block(start, start + 12), np.arange(start, start + 12))
            shutil.rmtree(tmp_path / "a.zarr" / "c" / str(start // 16), ignore_errors=True)


def test_groups_urls_and_folders_of_any_name(tmp_path):
    group = zarr.open_group(tmp_path / "store", mode="w")
    group.create_array("x", shape=(3,), dtype="f4")[:] = 1
    group.create_array("deep/y", shape=(4,), dtype="i8")[:] = 2
    for name, shape in (
        ("store::x", (3,)),
        ("store::deep/y", (4,)),
        ("store/deep/y", (4,)),
    ):
        for prefix in (f"{tmp_path}/", f"file://{tmp_path}/"):
            with open_source(prefix + name) as source:
                assert source.shape == shape
    with open_source(tmp_path / "store") as source:
        assert source.shape == (3,)
    for name, message in (
        ("store::z", "has no array 'z', but x"),
        ("store::deep/z", "not a readable zarr array"),
        ("store::deep", "has no array 'deep'"),
        ("store/x::y", "is an array itself"),
        ("none.zarr", "not a readable zarr array"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(f"{tmp_path}/{name}")


def test_a_store_that_vanishes_or_changes_is_not_read_as_zeros(tmp_path):
    save(tmp_path / "a.zarr", np.ones((8, 4)), (4, 4))
    with open_source(tmp_path / "a.zarr") as source:
        source.block(0, 8)
        (tmp_path / "a.zarr").rename(tmp_path / "b.zarr")
        with pytest.raises(SourceError, match="can no longer be read"):
            source.block(8, 16)
        save(tmp_path / "a.zarr", np.ones((8, 5)), (4, 4))
        with pytest.raises(SourceError, match="changed while it was read"):
            source.block(8, 16)


def test_a_stamp_tells_changed_chunks(tmp_path):
    save(tmp_path / "a.zarr", np.ones((8, 4)), (4, 4))
    with open_source(tmp_path / "a.zarr") as one, open_source(tmp_path / "a.zarr") as other:
        assert one.stamp() == other.stamp()
        chunk = tmp_path / "a.zarr" / "c" / "0" / "0"
        os.utime(chunk, ns=(0, chunk.stat().st_mtime_ns + 10**9))
        assert one.stamp() != other._stamp


@given(
    damage=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4), chunk=st.booleans()
)
@settings(deadline=None, max_examples=100)
def test_a_damaged_store_is_one_clear_error_or_readable(tmp_path_factory, damage, chunk):
    folder = tmp_path_factory.mktemp("damaged") / "a.zarr"
    save(folder, np.arange(32.0).reshape(8, 4), (4, 4))
    damage_file(folder / ("c/0/0" if chunk else "zarr.json"), damage)
    with readable_or_one_clear_line(), open_source(folder) as source:
        source.block(0, min(8, int(np.prod(source.shape))))
