"""Rows on their way through a device: what is copied where, and when it is waited for.

A `Slot` is a stream of the device with memory of its own, page-locked on the host's side. Two take turns, so that one
block of rows is copied while another is computed.
"""

import math

import numpy as np


class Slot:
    """A stream, named pieces of memory on both sides of it, and what is to be done once it has come to its end."""

    def __init__(self, machine):
        self.machine = machine
        self.stream = machine.new_stream()
        self._pieces, self._harvest = {}, None

    def piece(self, name, shape, dtype):
        """``array, address`` of a piece: on the host and on the device. Nothing is copied, both are nonsense."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        held = self._pieces.get(name)
        if held is None or not self.machine.fits(held[0].nbytes, size):
            if held is not None:
                self.machine.release(*self._pieces.pop(name))
            held = self._pieces[name] = self.machine.allocate(size)
        array, address = held
        return array[:size].view(dtype).reshape(shape), address

    def upload(self, name, values, dtype=None):
        """The address of a copy of an array on the device, on the way there."""
        array, address = self.piece(name, values.shape, dtype or values.dtype)
        array[...] = values
        self.machine.copy_to_device(self.stream, array, address)
        return address

    def upload_rows(self, name, values, dtype):
        """``address, stride`` of rows, each of which begins at a multiple of 16 bytes."""
        padded = 16 // np.dtype(dtype).itemsize
        stride = -(-values.shape[1] // padded) * padded
        array, address = self.piece(name, (values.shape[0], stride), dtype)
        array[:, : values.shape[1]] = values
        self.machine.copy_to_device(self.stream, array, address)
        return address, stride

    def reserve(self, name, shape, dtype):
        """The address of a piece that a kernel is to fill."""
        array, address = self.piece(name, shape, dtype)
        self.machine.spoil(self.stream, address, array.nbytes)
        return address

    def zeros(self, name, count):
        """The address of so many int64 that are 0."""
        array, address = self.piece(name, (count,), np.int64)
        self.machine.clear(self.stream, address, array.nbytes)
        return address

    def download(self, name, shape, dtype):
        """An array on the host that a piece of the device is copied to."""
        array, address = self.piece(name, shape, dtype)
        self.machine.copy_to_host(self.stream, array, address)
        return array

    def release(self):
        """Give all memory back; nothing may be on the way."""
        for piece in self._pieces.values():
            self.machine.release(*piece)
        self._pieces.clear()

    def then(self, harvest):
        """What to do with what has been downloaded, once it is there."""
        self._harvest = harvest

    def finish(self):
        """Wait for all that was asked of the stream."""
        if self._harvest is not None:
            harvest, self._harvest = self._harvest, None
            self.machine.wait(self.stream)
            harvest()

    def abandon(self):
        """Wait for all that was asked of the stream, and let what was downloaded go."""
        self._harvest = None
        self.machine.wait(self.stream)


def in_turn(slots, tasks):
    """Give each task the next slot once that is free, and wait for all at the end, whatever that is."""
    try:
        for number, task in enumerate(tasks):
            slot = slots[number % len(slots)]
            slot.finish()
            task(slot)
        for slot in slots:
            slot.finish()
    except BaseException:
        for slot in slots:
            slot.abandon()
        raise
