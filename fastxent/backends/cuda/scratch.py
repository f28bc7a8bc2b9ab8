"""Memory of the device that kernels of one caller's stream leave each other things in, and the news of bad targets."""

import math
import threading
from typing import Any

import numpy as np

_STREAMS: dict[tuple[int, int, int], Any] = {}
_MAKING = threading.Lock()
_OF_A_THREAD = 2  # the handle of its default stream


class Scratch:
    """Named pieces of the device's memory for one stream, on which all that uses them is asked for in order; and the
    two whole numbers, in the host's memory, in which kernels note targets out of range.

    ``pieces`` counts those there have been: as long as it stays, all addresses do.
    """

    def __init__(self, machine, handle):
        self.machine, self.stream = machine, machine.stream_of(handle)
        refuse_capture(machine, self.stream)
        self._pieces, self.pieces, self.lock = {}, 0, threading.RLock()
        noted, self.wrong = machine.mapped(16)
        self._noted = noted.view(np.int64)
        self._noted[:] = 0

    def reserve(self, name, shape, dtype):
        """The address of a piece that a kernel is to fill; larger than what it was, it is a new one."""
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        address = self._piece(name, size, self.machine.take)
        self.machine.spoil(self.stream, address, size)
        return address

    def _piece(self, name, size, take):
        held, address = self._pieces.get(name, (0, 0))
        if not self.machine.fits(held, size):
            refuse_capture(self.machine, self.stream)
            # what has been outgrown stays: a CUDA graph may have been told of it
            size = self.machine.generous(size)
            held, address = self.machine.roomy(size), take(self.stream, size)
            self._pieces[name], self.pieces = (held, address), self.pieces + 1
        return address

    def zeros(self, name, count):
        """The address of so many int64 that are 0."""
        address = self.reserve(name, (count,), np.int64)
        self.machine.clear(self.stream, address, 8 * count)
        return address

    def counters(self, name, count):
        """The address of so many int64 that are 0, and that kernels leave 0."""
        return self._piece(name, 8 * count, self.machine.take_zeros)

    def raise_for_earlier(self, wait):
        """Raise what is known of an earlier call, be it one that failed; with ``wait`` all that there is to know."""
        if wait:
            self.machine.wait(self.stream)
        if self._noted[0] and not self.machine.is_capturing(self.stream):  # no graph survives a wait
            count, _ = self._news()
            raise IndexError(f"targets of an earlier call on this stream are out of range: {count} of them")

    def raise_at_once(self, given, ignored, target_of):
        """Wait for the call that has been asked for, and raise what is wrong with its targets: ``target_of`` a row."""
        count, before_end = self._news()
        if count:
            row = given.rows - before_end
            raise IndexError(
                f"targets must lie in [0, {given.classes - 1}]{'' if ignored is None else f' or be {ignored}'}; "
                f"{count} of {given.rows} do not, the first in row {row} with value {target_of(row)}"
            )

    def _news(self):
        """How many targets are out of range, and the number of rows less that of the first of them; told once."""
        self.machine.wait(self.stream)  # kernels may still be at it
        news = tuple(map(int, self._noted))
        self._noted[:] = 0
        return news


def scratch_of(machine, handle):
    """The one of a stream."""
    # the default stream of a thread is another in each
    key = id(machine), handle, threading.get_ident() if handle == _OF_A_THREAD else 0
    if key not in _STREAMS:
        with _MAKING, machine.current():
            if key not in _STREAMS:
                _STREAMS[key] = Scratch(machine, handle)
    return _STREAMS[key]


def refuse_capture(machine, stream):
    """A RuntimeError while a stream is captured into a CUDA graph: memory cannot be taken for that."""
    if machine.is_capturing(stream):
        raise RuntimeError(
            "a CUDA graph cannot take memory: before it is captured, make one call like this on the same stream, with "
            "arrays of torch or cupy"
        )
