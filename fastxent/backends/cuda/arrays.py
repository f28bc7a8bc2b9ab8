"""Arrays of a device, whoseever they are: where their numbers lie, which stream works on them, and new ones like them.

torch and cupy are asked in their own words, where that is quick; anything else by DLPack (`lent`) or the CUDA array
interface. Nothing here imports a framework, copies or waits.
"""

import contextlib
import functools
import math
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fastxent import checks
from fastxent.backends.cuda import dlpack
from fastxent.backends.cuda.dlpack import Borrowed, in_c_order
from fastxent.backends.cuda.scratch import refuse_capture


class View(NamedTuple):
    """Where an array is: byte address, shape, bytes from one number to the next along each axis, and dtype."""

    address: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    dtype: np.dtype


class DeviceArray:
    """An array in memory of its own on the device, in C order; it speaks the CUDA array interface and DLPack. Who takes
    it for a stream of its own keeps it until that stream is done with it.

    Attributes
    ----------
    shape, steps : tuple of int
        ``steps`` in bytes.
    dtype : dtype
    stream : int
        The one its numbers are being written on: whoever reads them waits for that.
    held : object
        Whatever that stream is there for as long as.
    is_handed_on : bool
        Whether only a framework takes capsules of it, whose streams outlive its arrays.
    """

    device = 0
    is_handed_on = False

    def __init__(self, machine, handle, shape, dtype, held=None):
        self.shape, self.dtype, self.stream = tuple(shape), np.dtype(dtype), handle
        self.steps = in_c_order(self.shape, self.dtype.itemsize)
        self.held, self._readers = held, set()
        self._machine, stream = machine, machine.stream_of(handle)
        with machine.current():
            refuse_capture(machine, stream)
            size = max(1, math.prod(self.shape) * self.dtype.itemsize)
            self.address = machine.take(stream, size)
            machine.spoil(stream, self.address, size)

    def __del__(self):
        """It goes when those have read it whose streams are there still: the default one, and a framework's own."""
        if not hasattr(self, "address") or sys.is_finalizing():
            return
        machine, stream = self._machine, self._machine.stream_of(self.stream)
        with machine.current():
            for handle in self._readers:
                with contextlib.suppress(RuntimeError):  # of the default stream, while another is captured
                    if not machine.is_capturing(machine.stream_of(handle)):
                        machine.follow(stream, handle)
            machine.give(stream, self.address)

    @property
    def __cuda_array_interface__(self):
        """Version 3: 1 stands for the default stream."""
        where = {"data": (self.address, False), "shape": self.shape, "strides": None}
        return where | {"typestr": self.dtype.str, "version": 3, "stream": self.stream or 1}

    def __dlpack_device__(self):
        """The first GPU."""
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A capsule, for which ``stream`` waits: a handle, None for the default stream, or -1 where nobody is to.

        Raises
        ------
        BufferError
            If a copy is asked for, or another device, or DLPack has no name for the dtype.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("arrays of a GPU are handed over as they are, there")
        capsule = dlpack.capsule_of(self, self.__dlpack_device__()[0])
        handle = 0 if stream in (None, 1) else stream  # the default stream goes by both
        if handle not in (-1, self.stream):
            with self._machine.current():
                self._machine.follow(self._machine.stream_of(handle), self.stream)
            if handle == 0 or self.is_handed_on:  # of another stream nobody says how long its handle is one
                self._readers.add(handle)
        return capsule


class _Interface:
    """Whatever has the CUDA array interface, ours, and what is borrowed; what it is given back is a `DeviceArray`."""

    one_stream = False

    def __init__(self, machine):
        self._machine = machine

    def device(self, array):
        if isinstance(array, _TOLD):
            return array.device
        return array.__dlpack_device__()[1] if hasattr(array, "__dlpack_device__") else 0

    def glance(self, array):
        address, *about = self.view(array)
        return address, (*about, self.is_read_only(array))

    def address(self, array):
        return self.view(array).address

    def is_read_only(self, array):
        if isinstance(array, _TOLD):
            return isinstance(array, Borrowed)
        return bool(array.__cuda_array_interface__["data"][1])

    def view(self, array):
        if isinstance(array, _TOLD):
            return View(array.address, array.shape, array.steps, array.dtype)
        about = array.__cuda_array_interface__
        shape, dtype = tuple(about["shape"]), np.dtype(about["typestr"])
        return View(about["data"][0], shape, tuple(about.get("strides") or in_c_order(shape, dtype.itemsize)), dtype)

    def stream(self, array):
        handle = array.stream if isinstance(array, _TOLD) else array.__cuda_array_interface__.get("stream") or 0
        return 0 if handle == 1 else handle  # the default stream goes by both

    def empty(self, array, shape, dtype):
        stream = getattr(array, "stream", None)  # numba's arrays have theirs
        held = getattr(array, "held", None) or (stream if hasattr(stream, "handle") else None)
        return DeviceArray(self._machine, self.stream(array), shape, dtype, held)


class _Torch:
    """Tensors, and the stream that is torch's current one."""

    one_stream = True

    def __init__(self, torch):
        self._torch = torch
        self._sums_wider = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # mm's out_dtype
        # as inductor's code asks: no stream object is made
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def device(self, array):
        return array.get_device()

    def address(self, array):
        return array.data_ptr()

    def glance(self, array):
        return array.data_ptr(), (array.shape, array.stride(), array.dtype, array.get_device())

    def view(self, array):
        dtype, each = _dtype_named(str(array.dtype).rpartition(".")[2]), array.element_size()
        return View(array.data_ptr(), tuple(array.shape), tuple(each * step for step in array.stride()), dtype)

    def is_read_only(self, array):
        return False

    def stream(self, array):
        if self._raw_stream is None:
            return self._torch.cuda.current_stream(array.device).cuda_stream
        return self._raw_stream(array.get_device())

    def empty(self, array, shape, dtype):
        return self._torch.empty(shape, dtype=self._named(dtype), device=array.device)

    @functools.cache  # noqa: B019  there is one torch, and it stays
    def _named(self, dtype):
        return getattr(self._torch, dtype.name)

    def product(self, a, b, dtype):
        wanted = self._named(dtype)
        with self._torch.autocast(a.device.type, enabled=False):  # which would round a float32 product
            if a.dtype == wanted:
                return self._torch.mm(a, b)
            if not self._sums_wider:
                raise NotImplementedError(
                    f"hidden states in half on a device need torch 2.8 or newer; got {self._torch.__version__}"
                )
            return self._torch.mm(a, b, out_dtype=wanted)

    def converted(self, array, dtype):
        return array.to(self._named(dtype))

    def classes_last(self, array, axis):
        return array.movedim(axis, -1)

    def classes_back(self, array, axis):
        return array.movedim(-1, axis)

    def contiguous(self, array):
        return array.contiguous()

    def write(self, into, array):
        into.copy_(array)


class _Cupy:
    """Arrays, and the stream that is cupy's current one."""

    one_stream = True

    def __init__(self, cupy):
        self._cupy = cupy

    def device(self, array):
        return array.device.id

    def address(self, array):
        return array.data.ptr

    def glance(self, array):
        return array.data.ptr, (array.shape, array.strides, array.dtype, array.device.id)

    def view(self, array):
        return View(array.data.ptr, array.shape, array.strides, np.dtype(array.dtype))

    def is_read_only(self, array):
        return False

    def stream(self, array):
        return self._cupy.cuda.get_current_stream().ptr

    def empty(self, array, shape, dtype):
        return self._cupy.empty(shape, dtype)

    def product(self, a, b, dtype):
        return self._cupy.matmul(a, b, dtype=dtype)

    def converted(self, array, dtype):
        return array.astype(dtype, copy=False)

    def classes_last(self, array, axis):
        return self._cupy.moveaxis(array, axis, -1)

    def classes_back(self, array, axis):
        return self._cupy.moveaxis(array, -1, axis)

    def contiguous(self, array):
        return self._cupy.ascontiguousarray(array)

    def write(self, into, array):
        into[...] = array


_TOLD = (DeviceArray, Borrowed)  # by their attributes
_OWN_WORDS: dict[str, Any] = {"torch": _Torch, "cupy": _Cupy}
_KNOWN: dict[type, Any] = {}


def library_of(array, machine):
    """``view``, ``stream`` and ``empty`` in the words of an array's own library, of which all arrays may be on
    ``one_stream``; the number of its ``device``, -1 for the host; whether it ``is_read_only``; its ``address``; and
    ``glance``, that and all else that its plan depends on. Those that compute have ``product`` of two matrices of
    one dtype, summed and returned in that or a wider one, ``converted``, ``classes_last`` and ``classes_back``,
    ``contiguous`` and ``write``.

    Raises
    ------
    TypeError
        If it has neither words of its own here nor the CUDA array interface.
    """
    kind = type(array)
    if kind in _KNOWN:
        return _KNOWN[kind]
    name = kind.__module__.partition(".")[0]
    if name in _OWN_WORDS:
        return _KNOWN.setdefault(kind, _OWN_WORDS[name](sys.modules[name]))
    if not isinstance(array, _TOLD) and not hasattr(array, "__cuda_array_interface__"):
        raise TypeError(f"arrays of {name} on a device are not known here: DLPack or the CUDA array interface")
    return _Interface(machine)


def has_own_words(array):
    """Whether `library_of` asks an array's library in its own words, or the array is ours."""
    kind = type(array)
    return kind in _KNOWN or isinstance(array, _TOLD) or kind.__module__.partition(".")[0] in _OWN_WORDS


def library_of_logits(logits, machine):
    """`library_of` logits that can be taken as they are, and are on the device that kernels run on."""
    checks.refuse_misread(logits, "logits")
    library = library_of(logits, machine)
    check_device(library, logits, "logits")
    return library


def may_be_on_device(array, like):
    """Whether `library_of` knows an array, which may be of the kind of ``like``."""
    return isinstance(array, (type(like), *_TOLD)) or hasattr(array, "__cuda_array_interface__")


def check_device(library, array, name):
    """An array is on the device that kernels run on: a TypeError for one of the host, a NotImplementedError for one of
    another device.
    """
    device = library.device(array)
    if device < 0:
        raise TypeError(f"{name} must be on the device too; got one of the host")
    if device:
        raise NotImplementedError(f"{name} must be on the first GPU, not on GPU {device}: CUDA_VISIBLE_DEVICES chooses")


@functools.cache
def _dtype_named(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def lies_in_line(view):
    """Whether `in_line` takes it."""
    try:
        in_line(view, "")
    except ValueError:
        return False
    return True


def in_line(view, name):
    """How many bytes apart the numbers of an array are, seen as one row of them; a ValueError if they do not lie so."""
    if 0 in view.shape:
        return view.dtype.itemsize
    apart = None
    for size, step in zip(reversed(view.shape), reversed(view.steps), strict=True):
        if size == 1:
            continue
        if apart is None:
            apart, count = step, size
        elif step != apart * count:
            raise ValueError(f"{name} on a device must lie in one line; got shape {view.shape}, steps {view.steps}")
        else:
            count *= size
    return view.dtype.itemsize if apart is None else apart
