"""The number formats of logits: how many of a format are in 16 bytes, and in what they are computed with. And how long
the functions that are built for a kind of logits are kept.
"""

import functools
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Form(NamedTuple):
    """``lanes`` numbers of ``dtype``, ``itemsize`` bytes each, make 16 bytes; ``real`` is computed with."""

    dtype: np.dtype
    itemsize: int
    lanes: int
    real: type


def _form(dtype, real):
    dtype = np.dtype(dtype)
    return Form(dtype, dtype.itemsize, 16 // dtype.itemsize, real)


FORMS = {
    "float32": _form(np.float32, np.float32),
    "float64": _form(np.float64, np.float64),
    "bfloat16": _form(ml_dtypes.bfloat16, np.float32),
    "float16": _form(np.float16, np.float32),
    "float8_e4m3fn": _form(ml_dtypes.float8_e4m3fn, np.float32),
    "float8_e5m2": _form(ml_dtypes.float8_e5m2, np.float32),
}

# What has been compiled of a function serves every kernel that calls it: of the kernels of a kind, one after the other,
# each but the first takes a third of its time. That is some 40 MB a kind, so only those of the last few are kept.
of_kind = functools.lru_cache(maxsize=4)
