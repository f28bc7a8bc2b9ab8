"""Capsules of DLPack, by which torch, jax, cupy and others take an array of ours without a copy.

As the Python specification of DLPack has it: a capsule "dltensor" holds a DLManagedTensor, whose deleter is called by
whoever took it, or by the capsule if nobody did. Until then the array is held here.
"""

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

CUDA = 2  # kDLCUDA
_NAME = b"dltensor"
_FLOAT, _BFLOAT = 2, 4
_CODES = {np.dtype(ml_dtypes.bfloat16): _BFLOAT} | dict.fromkeys(map(np.dtype, ("f2", "f4", "f8")), _FLOAT)


class _Managed(ctypes.Structure):
    """DLManagedTensor, its DLTensor, DLDevice and DLDataType in one."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


_HELD: dict[int, Any] = {}  # by the address of their structure


def _of_python(name, result, *arguments):
    """A function of Python's own; what others have said of its types is theirs."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _of_python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = _of_python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer_of = _of_python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(managed):
    _HELD.pop(managed, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _delete_unless_taken(capsule):
    if _is_valid(capsule, _NAME):  # who takes it renames it
        _HELD.pop(_pointer_of(capsule, _NAME), None)


def capsule_of(array, device_type):
    """A capsule of an array in C order with ``address``, ``shape`` and ``dtype``, on the first device of a type.

    Raises
    ------
    BufferError
        If DLPack, or most who read it, has no name for its dtype.
    """
    if array.dtype not in _CODES:
        raise BufferError(f"DLPack capsules of {array.dtype} are not made")
    shape = (ctypes.c_int64 * max(1, len(array.shape)))(*array.shape)
    managed = _Managed(
        data=array.address, device_type=device_type, ndim=len(array.shape), code=_CODES[array.dtype],
        bits=8 * array.dtype.itemsize, lanes=1, shape=shape, deleter=ctypes.cast(_delete, ctypes.c_void_p),
    )  # fmt: skip
    _HELD[ctypes.addressof(managed)] = managed, shape, array
    return _new(ctypes.addressof(managed), _NAME, ctypes.cast(_delete_unless_taken, ctypes.c_void_p))
