"""Tensors in .safetensors files are what the library itself says they are."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastxent.io import SourceError, open_source
from tests.damage import damage_file, readable_or_one_clear_line

safetensors = pytest.importorskip("safetensors.numpy")

DTYPES = ["<f8", "<f4", "<f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, "<i8", "<i4", "u1"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_blocks_are_the_tensor_wherever_it_lies(tmp_path, dtype):
    tensors = {
        "before": np.arange(7, dtype="<i2"),
        "wanted": np.arange(60).reshape(3, 4, 5).astype(dtype),
        "behind": np.arange(3, dtype="u1"),
        "wide": np.arange(4.0),
    }
    safetensors.save_file(tensors, tmp_path / "a.safetensors", metadata={"made": "here"})
    for name, array in tensors.items():
        with open_source(f"{tmp_path}/a.safetensors::{name}") as source:
            assert (source.shape, source.dtype) == (array.shape, array.dtype)
            pieces = [source.block(start, min(array.size, start + 7)) for start in range(0, array.size, 7)]
            np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
            assert source.block(3, 3).size == 0
    assert not pieces[0].flags.writeable


def test_names(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"one": np.zeros(3)}, path)
    with open_source(path) as source:
        assert source.shape == (3,)
    safetensors.save_file({"one": np.zeros(3), "two": np.zeros(3)}, path)
    with pytest.raises(SourceError, match=r"holds 2 tensors; pick one with .*::NAME, one of one, two"):
        open_source(path)
    with pytest.raises(SourceError, match="has no tensor 'three', but one, two"):
        open_source(f"{path}::three")


@given(damage=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 255)), min_size=1, max_size=6), cut=st.integers(0))
@settings(deadline=None, max_examples=200)
def test_a_damaged_file_is_one_clear_error_or_readable(tmp_path_factory, damage, cut):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    safetensors.save_file({"a": np.arange(6.0).reshape(2, 3), "b": np.arange(4)}, path)
    damage_file(path, damage)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut % 3 * 8])
    with readable_or_one_clear_line(), open_source(f"{path}::a") as source:
        assert len(source.block(0, min(6, int(np.prod(source.shape))))) <= 6
