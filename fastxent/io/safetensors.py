"""Tensors in .safetensors files, as memory maps.

The library checks the header and tells names, shapes, dtypes and the order of the tensors. It copies what it reads
and has no float8 for NumPy, so the bytes are mapped here: the format allows no gaps, and the library refuses them, so
the tensors lie one after the other at the end of the file.
"""

import math

import ml_dtypes
import numpy as np

from fastxent.io.npy import MappedSource
from fastxent.io.source import SourceError, line, package, pick, plain

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip


class SafetensorsSource(MappedSource):
    """The tensor ``tensor`` of a .safetensors file, or its only one."""

    def __init__(self, path, tensor=None):
        self._tensor = tensor
        super().__init__(path)

    def _read_header(self):
        library = package("safetensors", self.name)
        try:
            with library.safe_open(self._path, "numpy") as file:
                names = file.offset_keys()
                slices = [file.get_slice(name) for name in names]
                tensors = [(one.get_dtype(), tuple(one.get_shape())) for one in slices]
        except Exception as error:
            raise SourceError(f"{self.name}: not a readable .safetensors file: {line(error)}") from error
        chosen = names.index(pick(self.name, self._tensor, names, "tensor"))
        for name, (kind, _) in list(zip(names, tensors, strict=True))[chosen:]:
            if kind not in _DTYPES:
                raise SourceError(f"{self.name}: tensor {name!r} is of the kind {kind}, which is not read")
        left = sum(math.prod(shape) * _DTYPES[kind].itemsize for kind, shape in tensors[chosen:])
        kind, self.shape = tensors[chosen]
        self.dtype, self._offset = _DTYPES[kind], self._path.stat().st_size - left
        self.name = f"{self._path}::{plain(names[chosen])}"
