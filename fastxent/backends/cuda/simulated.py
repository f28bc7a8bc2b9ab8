"""A GPU in NumPy: the functions of `primitives` and a scheduler, so that every kernel runs where there is no device.

A kernel is run as the Python it is written in, a thread of the operating system for each of CUDA's, one at a time.
Many blocks may be on the way at once, so that blocks which wait for each other are simulated too, and in any order, as
on a GPU. What a GPU would leave unsaid is an error: an address outside the buffers of a launch or not a multiple of
what is loaded there, a shuffle that not all its threads take part in, threads that wait for ever. Lanes are
arrays. Shared memory starts as nonsense.
"""

import contextlib
import functools
import threading
import time
from collections import deque
from typing import Any

import numpy as np

from fastxent.backends.cuda import compiler
from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.layout import SIMULATED
from fastxent.backends.cuda.plans import Place
from fastxent.backends.cuda.scheduler import NONSENSE, Launch, SimulationError
from fastxent.rowmath import NumpyOps, Table

_EX2_UNITS = 2  # last places that the CUDA C++ programming guide allows exp2f, which is ex2.approx
_RCP_UNITS = 1  # and at most so many has the PTX ISA's 2^-23 of rcp.approx


class Machine:
    """The methods of `machine.Machine` without a GPU. Copies are immediate, and so is what a kernel does."""

    layout, name, architecture = SIMULATED, "simulated", (9, 0)
    checked = True  # what kernels are to fill holds nonsense before, always
    together = 4  # blocks that wait for each other; so many are on the way
    at_once = 1  # as far as anyone asks: then a group has several rows wherever there are any

    def __init__(self):
        self._memory, self._streams = {}, 0
        # what has been asked of which stream, the last of it
        self.events: deque[tuple[Any, str]] = deque(maxlen=1000)
        # streams that are captured into a CUDA graph, and whether marks of any are still ahead
        self.captured, self.busy = set(), False
        self._of_thread = threading.local()
        # blocks come in any order on a GPU
        self._order = np.random.default_rng(0)

    @contextlib.contextmanager
    def current(self):
        """Within it this thread speaks to the GPU."""
        before = getattr(self._of_thread, "depth", 0)
        self._of_thread.depth = before + 1
        try:
            yield
        finally:
            self._of_thread.depth = before

    def _demand_current(self):
        if not getattr(self._of_thread, "depth", 0):
            raise SimulationError("the GPU is spoken to by a thread on which it is not current")

    def new_stream(self):
        """A name that no other has; those of callers are numbers."""
        self._demand_current()
        self._streams += 1
        return f"stream {self._streams}"

    def mark(self, stream):
        """The number of the mark."""
        self._demand_current()
        self.events.append((stream, "mark"))
        return len(self.events)

    def wait_for(self, event):
        """The device is busy no more."""
        self._demand_current()
        self.busy = False

    def has_passed(self, event):
        """Unless a test has said that the device is busy."""
        self._demand_current()
        return not self.busy

    def is_capturing(self, stream):
        """Whether a test has said so."""
        self._demand_current()
        return stream in self.captured

    def stream_of(self, handle):
        """A stream is its handle."""
        return handle

    def follow(self, stream, handle):
        """Let a stream wait for another."""
        self._demand_current()
        self.events.append((stream, f"after {handle}"))

    def fits(self, held, size):
        """Only what is wanted, so that an access beyond it is found."""
        return held == _whole_words(size)

    def roomy(self, size):
        """What is allocated for so many bytes."""
        return _whole_words(size)

    def allocate(self, size):
        """Two arrays of their own, each at a multiple of 16 bytes."""
        self._demand_current()
        host, device = (_aligned(_whole_words(size)) for _ in range(2))
        self._memory[device.ctypes.data] = device
        return host, device.ctypes.data

    def mapped(self, size):
        """An array that kernels write to."""
        self._demand_current()
        memory = _aligned(_whole_words(size))
        self._memory[memory.ctypes.data] = memory
        return memory, memory.ctypes.data

    def release(self, array, address):
        """Forget the device's."""
        self._demand_current()
        del self._memory[address]

    def generous(self, size):
        """Only what is wanted."""
        return size

    def spoil(self, stream, address, size):
        """What a kernel is to fill holds nonsense before."""
        self._memory[address][:] = NONSENSE

    def reserve(self, size):
        """So many bytes."""
        memory = _aligned(_whole_words(size))
        self._memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def unreserve(self, address):
        """Forget them."""
        del self._memory[address]

    def take(self, stream, size):
        """So many bytes."""
        self._demand_current()
        self.events.append((stream, "take"))
        return self.reserve(size)

    def take_zeros(self, stream, size):
        """The same, of zeros."""
        address = self.take(stream, size)
        self.clear(stream, address, self.roomy(size))
        return address

    def give(self, stream, address):
        """Forget them."""
        self._demand_current()
        self.unreserve(address)

    def copy_to_device(self, stream, array, address):
        """From an array."""
        self._demand_current()
        self.events.append((stream, "to device"))
        self._memory[address][: array.nbytes] = array.reshape(-1).view(np.uint8)

    def copy_to_host(self, stream, array, address):
        """To an array."""
        self._demand_current()
        self.events.append((stream, "to host"))
        array.reshape(-1).view(np.uint8)[:] = self._bytes(address, array.nbytes)

    def clear(self, stream, address, size):
        """Zeros."""
        self._demand_current()
        self._bytes(address, size)[:] = 0

    def copy(self, stream, source, target, size):
        """At once."""
        self._demand_current()
        self._bytes(target, size)[:] = self._bytes(source, size)

    def _bytes(self, address, size):
        """Some of a piece of memory, from any address within."""
        (piece,) = (memory for first, memory in self._memory.items() if first <= address < first + memory.nbytes)
        return piece[address - piece.ctypes.data :][:size]

    def seconds(self, stream, body, before):
        """Of the simulation: a number to test with, and no more."""
        self._demand_current()
        before()
        start = time.perf_counter()
        body()
        return time.perf_counter() - start

    def wait(self, stream):
        """Nothing is on the way."""
        self._demand_current()
        self.events.append((stream, "wait"))

    def prepared(self, name, kind, arguments, blocks, **how):
        """What `run` takes to run a kernel with arguments like these."""
        return name, kind, arguments, blocks, how

    def run(self, stream, prepared, numbers):
        """Run a kernel with the numbers of its arguments."""
        (name, kind, arguments, blocks, how), left = prepared, iter(numbers)
        given = [
            type(argument)(*(next(left) for _ in argument)) if isinstance(argument, tuple) else next(left)
            for argument in arguments
        ]
        self.launch(stream, name, kind, given, blocks, **how)

    def launch(
        self, stream, name, kind, arguments, blocks, shared=0, resident=None, written=None, entries="gradient",
        ends="verb",
    ):  # fmt: skip
        """Run a kernel to its end."""
        self._demand_current()
        self.events.append((stream, name))
        _check_kinds(name, arguments)
        code = compiler.Code(name, kind, written, entries, ends, self.architecture)
        self.carry_out(code, arguments, self._order.permutation(blocks).tolist(), shared, resident or self.together)

    def carry_out(self, code, arguments, blocks, shared, resident):
        """Run a kernel's Python on ``blocks`` in this order, ``resident`` of them at a time."""
        buffers = [(first, first + array.nbytes) for first, array in self._memory.items()]
        threads, function = code.kind.threads * code.kind.rows, compiler.function_of(OPS, code)
        Launch(buffers).run(function, arguments, blocks, threads, shared, resident)


def _check_kinds(name, arguments):
    """Exactly the kinds of number that a kernel is compiled for: a driver takes eight bytes of each as they are."""
    for argument in arguments:
        kinds = type(argument).__annotations__.values() if isinstance(argument, tuple) else (int,)
        for number, kind in zip(argument if isinstance(argument, tuple) else (argument,), kinds, strict=True):
            if type(number) is not kind and not (kind is int and isinstance(number, Place)):
                raise SimulationError(f"{name} is launched with {number!r} for {kind.__name__} in {argument}")


def _whole_words(size):
    """So many bytes that a word of 16 which holds one of them is whole."""
    return -(-max(size, 1) // 16) * 16


def _aligned(size):
    room = np.full(size + 16, NONSENSE, np.uint8)
    start = -room.ctypes.data % 16
    return room[start : start + size]


def _me():
    return threading.current_thread()


def _of_memory(dtype, count=None):
    dtype = np.dtype(dtype)

    def load(address):
        found = _me().launch.memory(address, dtype.itemsize * (count or 1)).view(dtype)
        return found.copy() if count else found[0]

    def store(address, value):
        _me().launch.memory(address, dtype.itemsize * (count or 1)).view(dtype)[:] = value

    return load, store


def _of_shared(dtype, count=None):
    dtype = np.dtype(dtype)

    def where(offset):
        size = dtype.itemsize * (count or 1)
        shared = _me().block.shared
        if offset % size or not 0 <= offset <= len(shared) - size:
            raise SimulationError(f"{size} bytes at {offset} of {len(shared)} bytes of shared memory")
        return shared[offset : offset + size].view(dtype)

    def load(offset):
        found = where(int(offset))
        return found.copy() if count else found[0]

    def store(offset, value):
        where(int(offset))[:] = value

    return load, store


load_word, store_word = _of_memory(np.int32, 4)
load_float64, store_float64 = _of_memory(np.float64)
load_int64, store_int64 = _of_memory(np.int64)
load_int32, _ = _of_memory(np.int32)
shared_load_word, shared_store_word = _of_shared(np.int32, 4)
shared_load_float64, shared_store_float64 = _of_shared(np.float64)


def _meet_neighbours(width, value=None):
    me = _me()
    return me.meet(me.block.around(me.index, width), value)


def _shuffle_xor(x, distance, width):
    if not 0 < distance < width:
        raise SimulationError(f"a shuffle over {distance} lanes among {width}")
    return _meet_neighbours(width, x)[_me().index ^ int(distance)]


def _sync_block():
    _me().meet(_me().block.everyone)


def _fetch_add(address, value):
    number = load_int64(address)
    store_int64(address, number + value)
    return number


def _wait_for(address, value):
    while load_int64(address) != value:
        me = _me()
        me.launch.idle += 1
        me.launch.ready.append(me)
        me.pause()


def _publish(address, value):
    _me().launch.idle = 0
    store_int64(address, value)


def _raise_flag(address, value):
    store_int64(address, max(load_int64(address), value))


def _add_to(address, value):
    store_int64(address, load_int64(address) + value)


def _off_by(units, nearest, x):
    """A result off by as much as a GPU's may be, up or down as the last bit of ``x`` has it; none is subnormal."""
    off = np.where(np.asarray(x).view(np.int32) & 1, units, -units).astype(np.int32)
    result = np.where(np.isfinite(nearest) & (nearest != 0), (nearest.view(np.int32) + off).view(np.float32), nearest)
    return np.where(np.abs(nearest) < np.finfo(np.float32).tiny, np.float32(0), result)


def _exp2(x):
    nearest = np.exp2(np.asarray(x, np.float64)).astype(np.float32)
    return np.where(np.asarray(x) == 0, np.float32(1), _off_by(_EX2_UNITS, nearest, x))


def _reciprocal(x):
    return _off_by(_RCP_UNITS, (1.0 / np.asarray(x, np.float64)).astype(np.float32), x)


def _fma(a, b, c):
    """Veltkamp's split makes a NaN of an infinity, and of what becomes one in it."""
    plain, exactly = np.asarray(a) * b + c, NumpyOps.fma(a, b, c)
    return np.where(np.isfinite(plain) & ~np.isnan(exactly), exactly, plain)[()]


def _weighted(weight, x):
    return np.where(weight != 0, weight * x, weight.dtype.type(0))


def _flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _flushed_product(x, y):
    return _flushed(_flushed(x) * _flushed(y))


def _fold(combine):
    def fold(x):
        while len(x) > 1:
            x = combine(x[: len(x) // 2], x[len(x) // 2 :])
        return x[0]

    return fold


def _realigned(first, second, shift):
    both = np.concatenate([first, second]).view(np.uint8)
    return both[int(shift) : int(shift) + 16].copy().view(np.int32)


@functools.cache
def form(name):
    """What a kernel knows of the number format ``name``."""
    about = FORMS[name]

    load_one, store_one = _of_memory(about.real)

    def highest(*words):
        return np.fmax.reduce(np.concatenate(words).view(about.dtype).astype(about.real))

    def store_some(address, word, first, stop):
        for k in range(max(0, int(first)), min(about.lanes, int(stop))):
            place = slice(k * about.itemsize, (k + 1) * about.itemsize)
            _me().launch.memory(address + k * about.itemsize, about.itemsize)[:] = word.view(np.uint8)[place]

    return Table(
        itemsize=about.itemsize,
        count=about.lanes,
        real=about.real,
        decode=lambda word: word.view(about.dtype).astype(about.real),
        encode=lambda x: x.astype(about.dtype).view(np.int32),
        highest=highest if about.itemsize > 1 else None,
        load_one=load_one,
        store_one=store_one,
        store_some=store_some,
        realigned=_realigned,
        lanes_of=lambda value: np.full(about.lanes, value, about.real),
        from_bits=lambda bits: np.array([bits], np.int64).view(about.real)[0],
        to_real=lambda x: np.asarray(x).astype(about.real)[()],
    )


OPS = Table(
    function=NumpyOps.function,
    fma=_fma,
    at_least=NumpyOps.at_least,
    bits=NumpyOps.bits,
    shifted_onto=lambda k, places, low: ((k.view(np.int32) << places) + np.int32(low)).view(np.float32),
    flushed_product=_flushed_product,
    where=np.where,
    rint=np.rint,
    to_float64=NumpyOps.to_float64,
    exp2=_exp2,
    reciprocal=_reciprocal,
    absolute=np.abs,
    copysign=np.copysign,
    everywhere=np.all,
    larger=np.fmax,
    less_the_base=np.subtract,
    weighted=_weighted,
    numbered=lambda like: np.arange(len(like), dtype=np.int32),
    sum_lanes=_fold(np.add),
    peak_of_lanes=_fold(np.fmax),
    lane=lambda x, k: x[int(k)],
    concatenated=lambda x, y: np.concatenate([x, y]),
    first_half=lambda x: x[: len(x) // 2],
    second_half=lambda x: x[len(x) // 2 :],
    leading=lambda x, like: x[: len(like)],
    thread=lambda: _me().index,
    block=lambda: _me().block.number,
    anew=int,
    shuffle_xor=_shuffle_xor,
    sync_block=_sync_block,
    sync_warp=_meet_neighbours,
    load_word=load_word,
    store_word=store_word,
    shared_load_word=shared_load_word,
    shared_store_word=shared_store_word,
    load_float64=load_float64,
    store_float64=store_float64,
    load_int64=load_int64,
    load_int32=load_int32,
    store_int64=store_int64,
    shared_load_float64=shared_load_float64,
    shared_store_float64=shared_store_float64,
    fetch_add=_fetch_add,
    publish=_publish,
    wait_for=_wait_for,
    raise_flag=_raise_flag,
    add_to=_add_to,
    int32=int,
    int64=int,
    form=form,
)
