"""What a name on the command line means, and what is refused."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from fastxent.io import NAMELESS, SourceError, expand, open_source


def test_names_and_globs(tmp_path):
    for name in ("b1.npy", "b0.npy", "odd[1].npy", "x::y.npy"):
        (tmp_path / name).touch()
    for name, want in {
        "b?.npy": [("b0.npy", None), ("b1.npy", None)],
        "b0.npy::x": [("b0.npy", "x")],
        "b?.npy::x": [("b0.npy", "x"), ("b1.npy", "x")],
        "odd[1].npy": [("odd[1].npy", None)],
        "x::y.npy": [("x::y.npy", None)],
        "gone.npy": [("gone.npy", None)],
    }.items():
        assert expand(tmp_path / name) == [(str(tmp_path / path), part) for path, part in want]
    assert expand("s3://bucket/a*.zarr::x") == [("s3://bucket/a*.zarr", "x")]
    assert expand("simplecache::s3://bucket/a.zarr") == [("simplecache::s3://bucket/a.zarr", None)]
    with pytest.raises(SourceError, match=r"c\?\.npy: matches no file"):
        expand(tmp_path / "c?.npy")


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "pkl", "pickle", "bin", "PT"])
def test_what_may_be_a_pickle_is_refused(tmp_path, suffix):
    with pytest.raises(SourceError, match=r"runs code when it is loaded; save a .*\.safetensors"):
        open_source(tmp_path / f"a.{suffix}")


def test_what_has_another_way(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    for name, message in (
        (f"{tmp_path}/a.npz", "an archive that cannot be mapped"),
        (f"{tmp_path}/a.npy::x", "holds one array, without a name"),
        ("https://example.org/a.npy", "only zarr stores are read"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(name)


@pytest.mark.parametrize("name", NAMELESS)
def test_what_a_file_cannot_name(tmp_path, name):
    array = np.arange(12).reshape(3, 4).astype(NAMELESS[name])
    np.save(tmp_path / "a.npy", array.view(f"V{array.itemsize}"))
    np.save(tmp_path / "b.npy", array.view(f"u{array.itemsize}"))
    for file in ("a.npy", "b.npy"):
        with open_source(tmp_path / file, name) as source:
            assert source.dtype == NAMELESS[name]
            np.testing.assert_array_equal(source.block(0, 12), array.reshape(-1))


def test_what_it_cannot_be(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "b.npy", np.zeros(3, np.float16))
    for name, dtype in (("a.npy", "bfloat16"), ("b.npy", "bfloat16"), ("b.npy", "float8_e5m2")):
        with pytest.raises(SourceError, match=f"cannot be read as {dtype}"):
            open_source(tmp_path / name, dtype)


@pytest.mark.parametrize("package", ["safetensors", "zarr", "pyarrow"])
def test_a_package_that_is_not_there(tmp_path, package):
    suffix = {"safetensors": "safetensors", "zarr": "zarr", "pyarrow": "parquet"}[package]
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from fastxent.io import SourceError, open_source\n"
        "try: open_source(sys.argv[1])\n"
        "except SourceError as error: print(error)"
    )
    (tmp_path / f"a.{suffix}").touch()
    run = [sys.executable, "-c", code, tmp_path / f"a.{suffix}"]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert f"needs the package {package}, which pip install fastxent[io] brings" in said


def test_a_light_import():
    code = (
        "import sys, fastxent.io; print([n for n in ('zarr', 'pyarrow', 'safetensors', 'fsspec') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_what_numpy_writes_without_a_name(tmp_path):
    """The reason for ``NAMELESS``; when this fails, NumPy has learned the names."""
    np.save(tmp_path / "a.npy", np.ones(3, ml_dtypes.bfloat16))
    assert np.load(tmp_path / "a.npy").dtype == "V2"
    np.save(tmp_path / "a.npy", np.ones(3, ml_dtypes.float8_e4m3fn))
    with open_source(tmp_path / "a.npy", "float8_e4m3fn") as source:
        np.testing.assert_array_equal(source.block(0, 3).astype(float), 1)
    np.save(tmp_path / "a.npy", np.ones(3, ml_dtypes.float8_e5m2))
    with pytest.raises(SourceError, match=r"'<f1'.*; save its view\('uint8'\)"):
        open_source(tmp_path / "a.npy")
