"""Several files as one array."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastxent.io import NpySource, SourceError, open_source


@pytest.fixture
def shards(tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(10, 3, 2)
    for number, rows in enumerate((slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 10))):
        np.save(tmp_path / f"s{number}.npy", array[rows])
    return tmp_path, array


@pytest.mark.parametrize("step", [1, 7, 24, 25, 60])
def test_blocks_are_the_concatenation(shards, step):
    folder, array = shards
    with open_source(folder / "s?.npy") as source:
        assert (source.shape, source.dtype, source.mapped) == (array.shape, array.dtype, True)
        pieces = [source.block(start, min(60, start + step)) for start in range(0, 60, step)]
        np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
        np.testing.assert_array_equal(source.block(2, 5), [2, 3, 4])  # back
        assert source.block(5, 5).size == 0
        source.check_unchanged()


def test_formats_mix_and_the_order_is_the_one_given(shards):
    safetensors = pytest.importorskip("safetensors.numpy")
    folder, array = shards
    safetensors.save_file({"x": array[:4]}, folder / "x.safetensors")
    with open_source([folder / "s3.npy", f"{folder}/x.safetensors::x", folder / "s2.npy"]) as source:
        np.testing.assert_array_equal(source.block(0, 60).reshape(10, 3, 2), array[[5, 6, 7, 8, 9, 0, 1, 2, 3, 4]])
        assert [path.name for path in source.paths()] == ["s3.npy", "x.safetensors", "s2.npy"]


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_are_open_however_many_shards(tmp_path):
    for number in range(100):
        np.save(tmp_path / f"{number:03}.npy", np.full(3, number))
    before = open_files()
    with open_source(tmp_path / "*.npy") as source:
        for start in range(0, 300, 3):
            assert source.block(start, start + 3).tolist() == [start // 3] * 3
            assert open_files() <= before + 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (np.zeros((2, 3, 3), "f4"), r"x.npy: holds rows of shape \(3, 3\)"),
        (np.zeros((2, 3, 2), "f8"), r"x.npy: .* float64, where .*s0.npy holds \(3, 2\) and float32"),
        (np.float32(1), "x.npy: is a scalar"),
    ],
)
def test_shards_that_do_not_fit(shards, other, message):
    folder, _ = shards
    np.save(folder / "x.npy", other)
    with pytest.raises(SourceError, match=message):
        open_source([folder / "s0.npy", folder / "x.npy"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 140),
        lambda path: np.save(path, np.zeros((5, 4, 2), "f4")),
    ],
)
def test_a_shard_that_changes_before_it_is_reached(shards, spoil):
    folder, _ = shards
    with open_source(folder / "s?.npy") as source:
        source.block(0, 24)
        spoil(folder / "s3.npy")
        with pytest.raises(SourceError, match=r"s3\.npy: (No such file|truncated|changed)"):
            source.block(24, 60)


def test_a_shard_that_changes_while_its_block_is_used(shards):
    folder, _ = shards
    with open_source(folder / "s?.npy") as source:
        source.block(0, 24)
        source.block(30, 60)
        np.save(folder / "s0.npy", np.ones((4, 3, 2), "f4"))
        os.utime(folder / "s0.npy", ns=(0, 0))
        with pytest.raises(SourceError, match=r"s0\.npy: changed"):
            source.check_unchanged()


def test_one_file_is_no_shard(shards):
    folder, _ = shards
    with open_source([folder / "s0.*"]) as source:
        assert isinstance(source, NpySource)
