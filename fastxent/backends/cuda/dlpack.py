"""Capsules of DLPack, by which torch, jax, cupy and others take an array of ours without a copy, and we one of theirs.

As the Python specification of DLPack has it: a capsule "dltensor" holds a DLManagedTensor, whose deleter is called by
whoever took it, or by the capsule if nobody did. Until then an array of ours is held here.
"""

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

CUDA = 2  # kDLCUDA
_NAME = b"dltensor"
_INTEGER, _UNSIGNED, _FLOAT, _BFLOAT, _E4M3FN, _E5M2 = 0, 1, 2, 4, 10, 12
_CODES = {np.dtype(ml_dtypes.bfloat16): _BFLOAT} | dict.fromkeys(map(np.dtype, ("f2", "f4", "f8")), _FLOAT)
_LETTERS = {_INTEGER: "i", _UNSIGNED: "u", _FLOAT: "f"}
_OTHERS = {_BFLOAT: ml_dtypes.bfloat16, _E4M3FN: ml_dtypes.float8_e4m3fn, _E5M2: ml_dtypes.float8_e5m2}
_DEFAULT_STREAM = 1


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


for _thunk in (_delete, _delete_unless_taken):  # capsules of ours may be the last to go when Python ends
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_thunk))


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


class Borrowed:
    """Another library's array as its capsule has it, for the default stream; to be read alone, as no capsule of this
    kind says whether it may be written. It is there as long as this is.

    Attributes
    ----------
    address, device, stream : int
    shape, steps : tuple of int
        ``steps`` in bytes.
    dtype : dtype
    """

    stream = 0

    def __init__(self, array):
        self._capsule = array.__dlpack__(stream=_DEFAULT_STREAM)
        about = _Managed.from_address(_pointer_of(id(self._capsule), _NAME))
        self.device, self.address = about.device_id, (about.data or 0) + about.byte_offset
        self.dtype, axes = _dtype_of(about), range(about.ndim)
        self.shape = tuple(about.shape[k] for k in axes)
        counts = [about.strides[k] for k in axes] if about.strides else in_c_order(self.shape, 1)
        self.steps = tuple(step * self.dtype.itemsize for step in counts)


def _dtype_of(about):
    if about.lanes == 1:
        if about.code in _OTHERS:
            return np.dtype(_OTHERS[about.code])
        if about.code in _LETTERS:
            return np.dtype(f"{_LETTERS[about.code]}{about.bits // 8}")
    raise TypeError(f"arrays of DLPack's type {about.code} with {about.bits} bits and {about.lanes} lanes are not read")


def in_c_order(shape, itemsize):
    """The steps from one number to the next along each axis, the last of ``itemsize``."""
    steps, each = [], itemsize
    for size in reversed(shape):
        steps.append(each)
        each *= size
    return tuple(reversed(steps))
