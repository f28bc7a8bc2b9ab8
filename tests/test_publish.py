"""Records written out as parquet and zarr hold what the records hold."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastxent.io import publish

RECORD = np.dtype([("score", "<f4"), ("valid", "?"), ("rank", "<i8"), ("ids", "<i4", (3,)), ("grid", "<f8", (2, 3))])


def test_text_goes_where_a_link_leads(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)
    publish.write_text(link, "after")
    assert (link.is_symlink(), file.read_text()) == (True, "after")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo")
def test_text_is_written_to_what_is_no_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        found = reader.submit(pipe.read_text)
        publish.write_text(pipe, "text")
    assert (found.result(), pipe.is_fifo()) == ("text", True)


@pytest.fixture(params=[0, 1, 10, 1000])
def records(request):
    rng = np.random.default_rng(7)
    found = np.frombuffer(rng.integers(0, 256, request.param * RECORD.itemsize, np.uint8), RECORD).copy()
    found["valid"] = rng.random(request.param) < 0.5
    found["score"][: request.param // 2] = np.nan
    return found


@pytest.fixture(params=[97, 16 << 20], ids=["small-pieces", "one-piece"])
def piece(request, monkeypatch):
    monkeypatch.setattr(publish, "_PIECE", 10 * request.param)


def test_parquet(tmp_path, records, piece):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("a", "b"):
        publish.write_parquet(records, (len(records),), tmp_path / name)
    table = parquet.read_table(tmp_path / "a")
    assert table.column_names == list(RECORD.names)
    for name in RECORD.names:
        column, sizes = table[name].combine_chunks(), ()
        while column.type.num_fields:
            column, sizes = column.flatten(), (*sizes, column.type.list_size)
        assert sizes == RECORD[name].shape
        np.testing.assert_array_equal(column.to_numpy(zero_copy_only=False), records[name].reshape(-1))
        assert column.null_count == 0
    assert table.schema.metadata[b"shape"] == str([len(records)]).encode()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_zarr(tmp_path, records, piece):
    zarr = pytest.importorskip("zarr")
    shape = (len(records) // 2, 2) if len(records) > 1 else (len(records),)
    for _ in range(2):  # the second time over what a killed run has left
        publish.write_zarr(records, shape, tmp_path / "a")
    group = zarr.open_group(tmp_path / "a", mode="r")
    assert sorted(name for name, _ in group.arrays()) == sorted(RECORD.names)
    for name in RECORD.names:
        np.testing.assert_array_equal(group[name][...], records[name].reshape(shape + RECORD[name].shape))


def test_a_single_record(tmp_path):
    zarr, parquet = pytest.importorskip("zarr"), pytest.importorskip("pyarrow.parquet")
    record = np.zeros(1, RECORD)
    publish.write_zarr(record, (), tmp_path / "a")
    assert zarr.open_group(tmp_path / "a", mode="r")["grid"].shape == (2, 3)
    publish.write_parquet(record, (), tmp_path / "b")
    assert parquet.read_table(tmp_path / "b").num_rows == 1


def test_a_store_gives_way_whole(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(FileExistsError, match="old exists"):
        publish.rename(tmp_path / "new", tmp_path / "old", replace=False)
    publish.rename(tmp_path / "new", tmp_path / "old", replace=True)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old", "old/new"]
