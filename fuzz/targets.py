"""What is fuzzed: functions of bytes that return, or raise where a promise is broken."""

import io
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np

from fastxent.io import SourceError, open_source
from tests import test_fuzz

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz"))
_MOST = 1 << 20  # elements read


def read(names):
    """Everything of a source: numbers, or one clear line."""
    try:
        with open_source(names) as source:
            size = min(_MOST, math.prod(source.shape))
            found = source.block(0, size)
            assert found.shape == (size,), f"{found.shape} elements of {size}"
            assert not found.dtype.hasobject, "objects"
            found.tobytes()  # every byte is looked at
            if size > 1:
                assert source.block(1, size)[: size - 1].tobytes() == found[1:].tobytes(), "read otherwise from behind"
            source.check_unchanged()
    except SourceError as error:
        assert "\n" not in str(error), f"more than a line: {error!r}"


def one_file(suffix):
    """The target of one format."""

    def target(data):
        path = _FOLDER / f"a{suffix}"
        path.write_bytes(data)
        read(path)

    return target


def zarr(data):
    """Two lines of metadata and chunks: the first line says what the rest is."""
    shutil.rmtree(_FOLDER / "a.zarr", ignore_errors=True)
    for number, part in enumerate(data.split(b"\n---\n")[:4]):
        path = _FOLDER / "a.zarr" / ("zarr.json", "c/0/0", "c/1/0", ".zarray")[number]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    read(_FOLDER / "a.zarr")


def shards(data):
    """Several .npy files as one."""
    names = []
    for number, part in enumerate(data.split(b"\n---\n")[:4]):
        names.append(_FOLDER / f"{number}.npy")
        names[-1].write_bytes(part)
    read(names)


def calls(name):
    """The target of one public function: the property of its test."""
    from hypothesis import given, settings

    run = given(call=test_fuzz.calls(test_fuzz.FUNCTIONS[name]))(lambda call: test_fuzz.check(name, call))
    return settings(database=None, deadline=None)(run).hypothesis.fuzz_one_input


OPENED = {
    "npy": one_file(".npy"),
    "safetensors": one_file(".safetensors"),
    "parquet": one_file(".parquet"),
    "arrow": one_file(".arrow"),
    "zarr": zarr,
    "shards": shards,
}


def find(name):
    """The target of this name."""
    return OPENED[name] if name in OPENED else calls(name)


def seeds(name):
    """Inputs to begin with: small files that are right."""
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    if name in ("npy", "shards"):
        for one in (array, array.astype(">f8"), np.arange(6), array[:, 0], np.array(["a", "bc"]), np.float32(1)):
            with io.BytesIO() as file:
                np.lib.format.write_array(file, np.asarray(one), (len(one.shape) % 2 + 1, 0))
                yield b"\n---\n".join([file.getvalue()] * (2 if name == "shards" else 1))
    if name == "safetensors":
        header = json.dumps({"x": {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]}}).encode()
        yield struct.pack("<Q", len(header)) + header + array.tobytes()
    if name in ("parquet", "arrow"):
        yield from _tables(name, array)
    if name == "zarr":
        yield from _stores(array)
    if name not in OPENED:
        yield from (np.random.default_rng(seed).bytes(2048) for seed in range(16))


def _tables(name, array):
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), 4)
    for column in (lists, pyarrow.array(array[:, 0]), pyarrow.array([1, None, 2]), pyarrow.array(["a", "b"])):
        for compression in ("none" if name == "parquet" else "uncompressed", "zstd"):
            path = _FOLDER / f"seed.{name}"
            if name == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"x": column}), path, compression=compression)
            else:
                pyarrow.feather.write_feather(pyarrow.table({"x": column}), path, compression=compression)
            yield path.read_bytes()


def _stores(array):
    import zarr as library

    for compressors in (None, "auto"):
        path = _FOLDER / "seed.zarr"
        stored = library.create_array(
            path, shape=array.shape, chunks=(3, 4), dtype=array.dtype, compressors=compressors, overwrite=True
        )
        stored[...] = array
        parts = [(path / name).read_bytes() for name in ("zarr.json", "c/0/0", "c/1/0")]
        yield b"\n---\n".join(parts)
