"""How the logits of hidden states are cut: rows with all classes in `Blocks`, or in `Tiles` of some classes each.

The cuts follow from shapes and the memory allowed, never from the number of threads, so neither do the results.
"""

import threading

import numpy as np

from fastxent.products import Workers, slices, taken
from fastxent.rows import take
from fastxent.state import FIELDS, STRIP
from fastxent.threads import get_num_threads

MEMORY = 64 << 20  # bytes, where the caller names none
_SHARE = 0.75  # of the memory, for logits and hidden states; the rest is BLAS's and the threads' own
_TILE = 16 << 20  # bytes of a tile of logits, rows times `STRIP` classes
_PER_TILE = 24 << 20  # bytes that go with each
_STATE = 8 * len(FIELDS)  # bytes of a row's `LseState`
_CHUNK = 1 << 21  # logits given to a kernel at a time
_SMALL = 1 << 21  # multiplications that are not worth waking threads for


class Rows:
    """The rows that count, at most so many at a time."""

    def __init__(self, layer, counted, most):
        self.layer, self._counted = layer, None if counted is True else np.flatnonzero(counted)
        self.count = layer.shape[0] if self._counted is None else len(self._counted)
        blocks = -(-self.count // max(1, most))
        self.rows = -(-self.count // max(1, blocks))
        self.threads = 1 if self.count * layer.shape[1] * layer.width < _SMALL else get_num_threads()

    def __len__(self):
        return -(-self.count // max(1, self.rows))

    def __iter__(self):
        """Rows, a slice or indices, with their hidden states."""
        for part in slices(0, self.count, max(1, self.rows)):
            rows = part if self._counted is None else self._counted[part]
            yield rows, taken(take(self.layer.hidden, rows), self.layer.dtype)


class Blocks(Rows):
    """Rows with the logits of all their classes in one buffer.

    ``copies`` is how many arrays of the hidden states' width a block needs beside its logits.
    """

    def __init__(self, layer, counted, memory, *, copies=1):
        cells = int(_SHARE * memory) // layer.dtype.itemsize
        super().__init__(layer, counted, cells // (layer.shape[1] + copies * layer.width))
        self._buffer = np.empty((self.rows, layer.shape[1]), layer.dtype)
        self.workers = Workers(self.threads)

    def logits(self, hidden):
        """The logits of a block's hidden states: overwritten by the next."""
        logits = self._buffer[: len(hidden)]
        self.layer.all_logits(self.workers, hidden, logits)
        return logits

    def each(self, function, logits, rows):
        """Call ``function(logits, rows)`` for a few rows of a block at a time."""
        chunks = slices(0, len(logits), max(1, _CHUNK // logits.shape[1]))
        self.workers.run((lambda chunk: function(logits[chunk], within(rows, chunk)), chunks))


class Tiles(Rows):
    """Rows with their logits in tiles of `STRIP` classes, each made and used by one thread while it is in the cache.

    Of the memory a quarter is for hidden states and for a state of each row and tile; the tiles have the rest, as many
    at a time as there is room for. By default there is room for one a thread; none of it changes how rows are cut.
    """

    def __init__(self, layer, counted, memory):
        itemsize, self._own = layer.dtype.itemsize, threading.local()
        room = int(_SHARE * (memory or MEMORY))
        self.stripes = slices(0, layer.shape[1], STRIP)
        super().__init__(layer, counted, room // 4 // (layer.width * itemsize + len(self.stripes) * _STATE))
        of_row = STRIP * itemsize
        self._step = max(1, min(self.rows, min(_TILE, 3 * room // 4) // of_row))
        room = max(room, self.threads * _PER_TILE) if memory is None else room
        self.workers = Workers(max(1, min(self.threads, 3 * room // 4 // (self._step * of_row))))

    def each(self, function, hidden):
        """Call ``function(logits, rows, number)`` for every tile: rows of a block, and the number of the stripe.

        Those of the last stripes are cut in halves, so that threads wait less for the last of them.
        """

        def tile(place):
            rows, number = place
            classes = self.stripes[number]
            logits = self._buffer()[: rows.stop - rows.start, : classes.stop - classes.start]
            self.layer.logits(hidden[rows], classes, logits)
            function(logits, rows, number)

        last = len(self.stripes) - len(self.stripes) // 4
        self.workers.run((tile, [
            (rows, number)
            for number in range(len(self.stripes))
            for rows in slices(0, len(hidden), self._step if number < last else -(-self._step // 2))
        ]))  # fmt: skip

    def _buffer(self):
        if not hasattr(self._own, "buffer"):
            self._own.buffer = np.empty((self._step, STRIP), self.layer.dtype)
        return self._own.buffer


def within(rows, part):
    """The rows that a slice of a block has, whose own are a slice or indices."""
    return slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]
