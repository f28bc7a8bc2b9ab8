"""How finished records appear: what they are written out as, and how a file gets its name.

Records are written in pieces of a fixed number of bytes, so the same records always make the same file.
"""

import contextlib
import math
import os
import shutil
import uuid

import numpy as np

from fastxent.io.source import package

_PIECE = 16 << 20  # bytes of records written at a time: a row group, a chunk


def write_parquet(records, shape, path):
    """A column a field; an array within a record becomes a fixed-size list. Metadata ``shape`` is the targets'."""
    arrow, parquet = package("pyarrow", path), package("pyarrow.parquet", path)
    schema = arrow.schema(
        [(name, _arrow_type(arrow, records.dtype[name])) for name in records.dtype.names],
        metadata={"shape": str(list(shape))},
    )
    step = max(1, _PIECE // records.dtype.itemsize)
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(records), step):
            rows = records[start : start + step]
            columns = [_arrow_array(arrow, rows[name], schema.field(name).type) for name in rows.dtype.names]
            writer.write_table(arrow.table(columns, schema=schema), row_group_size=step)
    _sync(path)


def _arrow_type(arrow, dtype):
    kind = arrow.from_numpy_dtype(dtype.base)
    for size in reversed(dtype.shape):
        kind = arrow.list_(kind, size)
    return kind


def _arrow_array(arrow, values, kind):
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    types = []
    while arrow.types.is_fixed_size_list(kind):
        types.append(kind)
        kind = kind.value_type
    for one in reversed(types):
        flat = arrow.FixedSizeListArray.from_arrays(flat, type=one)
    return flat


def write_zarr(records, shape, path):
    """A group with an array a field, of the targets' shape and the field's own behind it."""
    library = package("zarr", path)
    if path.exists():  # of a run that was killed
        shutil.rmtree(path)
    group = library.open_group(path, mode="w", zarr_format=3)
    for name in records.dtype.names:
        values = records[name].reshape(shape + records.dtype[name].shape)
        inner = math.prod(values.shape[1:]) * values.dtype.itemsize
        step = max(1, _PIECE // max(1, inner))
        chunks = tuple(max(1, size) for size in (*(min(step, size) for size in values.shape[:1]), *values.shape[1:]))
        array = group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)
        if values.ndim == 0:
            array[...] = values
        for start in range(0, len(values) if values.ndim else 0, step):
            array[start : start + step] = values[start : start + step]


# what writes records in each format; the part is a .npy file already
WRITERS = {".parquet": write_parquet, ".zarr": write_zarr}
FORMATS = (".npy", *WRITERS)


def is_store(path):
    """Whether this folder is a zarr store, and so may give way to one."""
    return (path / "zarr.json").is_file()


def write_text(path, text):
    """A file that has all of a text, or what it had before; a link's is the one it leads to, and what is no file, such
    as a terminal, just has it.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, "utf-8", "backslashreplace")
        return
    path = path.resolve()
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, "utf-8", "backslashreplace")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def rename(new, path, replace):
    """Give ``new`` its name; FileExistsError if that is taken and may not be ``replace``d."""
    if new.is_dir():
        old = path.with_name(f"{path.name}.{uuid.uuid4().hex}.old")
        if path.exists():
            if not replace:
                raise FileExistsError(f"{path} exists")
            path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    elif replace:
        new.replace(path)
    else:
        _link(new, path)


def _link(new, path):
    """Unlike a rename, a link refuses a file that has appeared meanwhile."""
    try:
        os.link(new, path)
        new.unlink()
    except FileExistsError:
        raise FileExistsError(f"{path} exists") from None
    except OSError:  # a file system without links
        new.rename(path)


def _sync(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
