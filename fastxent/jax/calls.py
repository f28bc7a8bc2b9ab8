"""Calls from XLA's programs on the CPU into this package: one handler of XLA's foreign function interface, in Python.

It sees the buffers themselves, where a callback of JAX copies them. The structures are those of
``xla/ffi/api/c_api.h``.
"""

import ctypes
import json

import jax
import ml_dtypes
import numpy as np

_DTYPES = {
    1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16, 8: np.uint32,
    9: np.uint64, 10: np.float16, 11: np.float32, 12: np.float64, 16: ml_dtypes.bfloat16, 19: ml_dtypes.float8_e5m2,
    20: ml_dtypes.float8_e4m3fn,
}  # fmt: skip
_METADATA, _EXECUTE, _INTERNAL = 1, 3, 13


def _structure(name, *fields):
    """A structure that begins, as all do, with its size and a chain of extensions."""
    begin = [("size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]
    return type(name, (ctypes.Structure,), {"_fields_": begin + list(fields)})


class _Extension(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
    )


class _Bytes(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


_Version = _structure("_Version", ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("version", _Version))


_Buffer = _structure(
    "_Buffer",
    ("dtype", ctypes.c_int),
    ("data", ctypes.c_void_p),
    ("rank", ctypes.c_int64),
    ("dims", ctypes.POINTER(ctypes.c_int64)),
)
_Many = _structure(
    "_Many", ("count", ctypes.c_int64), ("kinds", ctypes.c_void_p), ("items", ctypes.POINTER(ctypes.c_void_p))
)
_Named = _structure(
    "_Named",
    ("count", ctypes.c_int64),
    ("kinds", ctypes.c_void_p),
    ("names", ctypes.POINTER(ctypes.POINTER(_Bytes))),
    ("items", ctypes.POINTER(ctypes.c_void_p)),
)
_Error = _structure("_Error", ("message", ctypes.c_char_p), ("code", ctypes.c_int))
_Api = _structure(
    "_Api",
    ("version", _Version),
    ("internal", ctypes.c_void_p),
    ("new_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Error))),
)
_Frame = _structure(
    "_Frame",
    ("api", ctypes.POINTER(_Api)),
    ("context", ctypes.c_void_p),
    ("stage", ctypes.c_int),
    ("inputs", _Many),
    ("outputs", _Many),
    ("attributes", _Named),
)


def _array(address):
    """The memory of a buffer as an array."""
    buffer = _Buffer.from_address(address)
    shape, dtype = tuple(buffer.dims[: buffer.rank]), np.dtype(_DTYPES[buffer.dtype])
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(buffer.data)
    return np.frombuffer(memory, dtype).reshape(shape)


def _attributes(named):
    """Strings by name."""
    found = {}
    for i in range(named.count):
        text = _Bytes.from_address(named.items[i])
        name = named.names[i].contents
        found[ctypes.string_at(name.start, name.length).decode()] = ctypes.string_at(text.start, text.length).decode()
    return found


def _handle(address):
    """XLA's call: to tell the version, or to run a verb over its buffers; an exception becomes its error."""
    frame = _Frame.from_address(address)
    if frame.extension:
        extension = _Extension.from_address(frame.extension)
        if extension.kind == _METADATA:
            version = _Metadata.from_address(extension.metadata).version
            version.major, version.minor = frame.api.contents.version.major, frame.api.contents.version.minor
            return None
    if frame.stage != _EXECUTE:
        return None
    try:
        inputs = [_array(frame.inputs.items[i]) for i in range(frame.inputs.count)]
        outputs = [_array(frame.outputs.items[i]) for i in range(frame.outputs.count)]
        attributes = _attributes(frame.attributes)
        _VERBS[attributes["verb"]](inputs, outputs, json.loads(attributes["options"]))
    except BaseException as error:  # XLA's thread must not see it
        message = f"{type(error).__name__}: {error}".encode()
        return frame.api.contents.new_error(_Error(ctypes.sizeof(_Error), None, message, _INTERNAL))
    return None


_VERBS: dict = {}
_TARGET = "fastxent"
_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_handle)
jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(_HANDLER), platform="cpu")


def verb(function):
    """Register ``function(inputs, outputs, options)``, which writes its outputs, under its name."""
    _VERBS[function.__name__] = function
    return function


def call(name, results, inputs, options):
    """Run a verb in XLA's program: shapes and dtypes of the results, arrays, and what JSON can say of the options."""
    run = jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential")
    return run(*inputs, verb=name, options=json.dumps(options, default=_plain))


def _plain(value):
    """A NumPy scalar as Python's, which JSON knows."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"options must be numbers or names, not {type(value).__name__}")
