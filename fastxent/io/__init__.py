"""Arrays on disk: sources that are read in pieces, and a spool whose records appear under their name when whole.

`open_source` says which file is of which format. What a source is: `fastxent.io.source`. How records are kept until
they are whole: `fastxent.io.spool`; as what they appear: `fastxent.io.publish`.
"""

import functools
import glob
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from fastxent.io.arrow import ArrowSource, ParquetSource
from fastxent.io.npy import NpySource
from fastxent.io.safetensors import SafetensorsSource
from fastxent.io.shards import Shards
from fastxent.io.source import Source, SourceError
from fastxent.io.zarr import ZarrSource

__all__ = ["NAMELESS", "NpySource", "Source", "SourceError", "absolute", "expand", "open_source"]

# dtypes that .npy and zarr store without their name
NAMELESS = {
    name: np.dtype(dtype)
    for name, dtype in {
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
    }.items()
}

_FORMATS: dict[str, Callable[..., Source]] = {
    ".safetensors": SafetensorsSource,
    ".zarr": ZarrSource,
    ".parquet": ParquetSource,
    ".pq": ParquetSource,
    ".arrow": ArrowSource,
    ".feather": ArrowSource,
    ".ipc": ArrowSource,
}
_REFUSED = {
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "runs code when it is loaded; save a .safetensors file"),
    **dict.fromkeys((".pkl", ".pickle"), "runs code when it is loaded; save a .npy or .safetensors file"),
    ".bin": "may be a pickle, which runs code when it is loaded; save a .safetensors file",
    ".npz": "is an archive that cannot be mapped; save its arrays as .npy files",
}


def open_source(names, dtype=None):
    """The source of one or several FILE or FILE::NAME, which may be globs; several are one after the other.

    Parameters
    ----------
    names : path-like or sequence of path-like
        The suffix says the format: .safetensors, .zarr (or any folder or URL), .parquet or .pq, .arrow, .feather or
        .ipc; every other is .npy. A glob means its files in the order of their names, as in a shell.
    dtype : str, optional
        One of `NAMELESS`: what elements are that their file cannot name.

    Raises
    ------
    SourceError
        For what is not there, cannot be read, or does not fit together.
    ValueError
        For another ``dtype``.
    """
    names = [names] if isinstance(names, (str, os.PathLike)) else names
    if dtype is not None:
        if dtype not in NAMELESS:
            raise ValueError(f"logits_dtype must be one of {', '.join(NAMELESS)}; got {dtype!r}")
        dtype = NAMELESS[dtype]
    openers = [functools.partial(_open, path, part, dtype) for name in names for path, part in expand(name)]
    return openers[0]() if len(openers) == 1 else Shards(openers)


def expand(name):
    """``path, part`` of every file that ``name``, a FILE or FILE::NAME or a glob of such, means.

    A file of this very name is no glob; ``part`` is None where there is no NAME.
    """
    name = os.fspath(name)
    path, mark, part = name.rpartition("::")
    if not mark or "://" in part or Path(name).exists():
        path, part = name, None
    if "://" in path or Path(path).exists() or not glob.has_magic(path):
        return [(path, part)]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (pathlib takes no absolute pattern)
    if not found:
        raise SourceError(f"{path}: matches no file")
    return [(one, part) for one in found]


def absolute(names):
    """Every FILE or FILE::NAME that ``names`` means, the same wherever a process stands."""
    names = [names] if isinstance(names, (str, os.PathLike)) else names
    files = [(path, part) for name in names for path, part in expand(name)]
    places = [(path if "://" in path else str(Path(path).absolute()), part) for path, part in files]
    return tuple(path if part is None else f"{path}::{part}" for path, part in places)


def _open(path, part, dtype):
    source = _kind(path, part)
    try:
        if dtype is not None:
            source.read_as(dtype)
    except SourceError:
        source.close()
        raise
    return source


def _kind(path, part):
    suffix = Path(path).suffix.lower()
    if suffix in _REFUSED:
        raise SourceError(f"{path}: {_REFUSED[suffix]}")
    if "://" in path:
        if suffix in _FORMATS.keys() - {".zarr"} | {".npy"}:
            raise SourceError(f"{path}: of what lies behind a URL, only zarr stores are read")
        return ZarrSource(path, part)
    if suffix in _FORMATS:
        return _FORMATS[suffix](path, part)
    if any((Path(path) / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
        return ZarrSource(path, part)
    if part is not None:
        raise SourceError(f"{path}: a .npy file holds one array, without a name; there is no {part!r} in it")
    return NpySource(path)
