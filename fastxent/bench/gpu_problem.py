"""Logits on a device for calls that are timed there: made, and made anew."""

import functools
import math
from typing import Any

import numpy as np

import fastxent
from fastxent import checks
from fastxent.backends.cuda import launches
from fastxent.backends.cuda.arrays import DeviceArray
from fastxent.backends.cuda.inputs import kind_of, scaling_of, shares_of
from fastxent.backends.cuda.places import Rows
from fastxent.backends.cuda.scores import KNOWN, Found, Picked
from fastxent.backends.cuda.stream import Slot
from fastxent.bench.gpu_bars import GRADIENT, IN_PLACE, LOSS
from fastxent.state import IGNORED, RowScores

_IGNORE_INDEX = -100
# launches' bytes: a gigabyte is written ahead of a call, which takes a device longer than the host needs to ask for it
AHEAD = 16
# of logits in bfloat16, more than a cache holds: they are read then, else it would write back while the call is timed
READ = 8192, 8192
_OF_TOP = "top_ids", "top_log_probs"
_COLUMNS = Found._fields[: Found._fields.index("top_ids")]
_PIECE = (1 << 26) - 16  # bytes that logits repeat: such that none is the same as those 2^32 before it


def calls_of(logits, targets, out, options):
    """What is timed of some arrays, by name."""
    function = fastxent.cross_entropy_with_grad
    return {
        LOSS: lambda: fastxent.cross_entropy(logits, targets, **options),
        GRADIENT: lambda: function(logits, targets, out=out, **options),
        IN_PLACE: lambda: function(logits, targets, out=logits, **options),
    }


@functools.cache
def _normals(count):
    """So many of a process's own, of deviation 4: they take a second to draw."""
    return 4 * np.random.default_rng().standard_normal(count, np.float32)


class Problem:
    """Logits, targets, options and room for a gradient on the device's default stream, for calls that are timed."""

    def __init__(self, machine, shape, dtype, ignored=0.0, options=None):
        (self.rows, self.classes), self.dtype = shape, np.dtype(dtype)
        self.machine, self.stream, self.slot = machine, machine.stream_of(0), Slot(machine)
        self.logits: Any = DeviceArray(machine, 0, shape, self.dtype)
        self.out: Any = DeviceArray(machine, 0, shape, self.dtype)
        self._ahead: Any = DeviceArray(machine, 0, (AHEAD * machine.layout.launch,), np.dtype(np.uint8))
        self.size = self.rows * self.classes * self.dtype.itemsize
        rng = np.random.default_rng()
        piece = min(self.size, _PIECE) // self.dtype.itemsize
        self._piece = self.placed(_normals(piece).astype(self.dtype))
        self.restore()
        indices = rng.integers(0, self.classes, self.rows)
        some = np.arange(self.rows) > 0  # a mean over no row is none
        self.indices = np.where((rng.random(self.rows) < ignored) & some, IGNORED, indices)
        self.targets = self.placed(self.given_targets())
        self.given: dict[str, Any] = options or {}
        placed = {name: self.placed(value) for name, value in self.given.items() if isinstance(value, np.ndarray)}
        self.options = self.given | placed
        self._read = self.placed(np.zeros(READ, np.dtype("bfloat16"))), self.placed(np.zeros(READ[0], np.int64))
        machine.wait(self.stream)

    def placed(self, values) -> Any:
        """The same numbers on the device."""
        array = DeviceArray(self.machine, 0, values.shape, values.dtype)
        self.machine.copy_to_device(self.stream, values, array.address)
        self.machine.wait(self.stream)
        return array

    def given_targets(self):
        """Class indices, as a caller has them."""
        return np.where(self.indices == IGNORED, _IGNORE_INDEX, self.indices)

    def release(self):
        """Give the device its memory back."""
        for stream in (self.stream, self.slot.stream):
            self.machine.wait(stream)
        del self.logits, self.out, self.targets, self.options, self._ahead, self._read, self._piece
        self.slot.release()

    def restore(self):
        """The logits as they were made."""
        step = self._piece.shape[0] * self.dtype.itemsize
        for start in range(0, self.size, step):
            length = min(step, self.size - start)
            self.machine.copy(self.stream, self._piece.address, self.logits.address + start, length)

    def keep_busy(self):
        """Give the device what takes it longer than the host needs to ask for a call, and leaves nothing of the call's
        in its caches, and nothing that is still to be written.
        """
        self.machine.clear(self.stream, self._ahead.address, *self._ahead.shape)
        fastxent.cross_entropy(*self._read)

    def calls(self):
        """Those that are timed, by name."""
        return calls_of(self.logits, self.targets, self.out, self.options)

    def fetched(self, address, count, dtype):
        """Numbers of the device."""
        values = np.empty(count, dtype)
        self.machine.copy_to_host(self.stream, values, address)
        self.machine.wait(self.stream)
        return values


class Scoring:
    """Scores of a `Problem` with the ``top_k`` largest classes, as `fastxent.score` asks them of the device."""

    def __init__(self, problem, top_k):
        self.slot, self._rows, self._top_k = problem.slot, problem.rows, top_k
        slot, count, indices = self.slot, self._rows, problem.indices
        self._scaling = scaling_of(problem.dtype, None, 1.0)
        self._kind = kind_of(slot.machine, problem.dtype, problem.classes, indices, self._scaling, None)
        places = slot.upload("targets", indices, np.int64), slot.zeros("flag", 1)
        strips = -(-problem.classes // self._kind.strip)
        self._given = Rows(
            problem.logits.address, problem.classes, places[0], count, problem.classes, strips, places[1]
        )
        real = checks.loss_dtype(problem.dtype)
        self._shares = shares_of(slot, slice(0, count), None, self._kind, real, problem.classes)
        self._places: dict[str, tuple[int, ...]] = dict.fromkeys(_COLUMNS, (count,))
        if top_k:
            self._places |= dict.fromkeys(_OF_TOP, (count, top_k))
        at = {name: slot.reserve(self._piece(name), shape, np.int64) for name, shape in self._places.items()}
        top, log_probs = (at.pop(name, 0) for name in _OF_TOP)
        self._found = Found._make((*at.values(), top, top_k))
        self._known = slot.reserve("known", (count, KNOWN), np.uint8)
        self._picked = Picked(top, top_k, log_probs)

    def ask(self):
        """Ask for them."""
        about = self._kind, self._given
        launches.score(self.slot, *about, self._shares, self._scaling, self._found, self._known)
        if self._top_k:
            launches.log_probs(self.slot, *about, self._scaling, self._known, self._picked)

    def _piece(self, name):
        return f"{name} of {self._top_k}"

    def forget(self):
        """Let there be no scores: zeros are none."""
        for name, shape in self._places.items():
            self.slot.zeros(self._piece(name), math.prod(shape))

    def found(self, some):
        """`fastxent.state.RowScores` of some rows, of what was asked for last."""
        result = RowScores.allocate(len(some), self._top_k, 0)
        for name, shape in self._places.items():
            dtype = np.int64 if name == "top_ids" else np.float64  # a kernel's ranks are float64
            filled = self.slot.download(self._piece(name), shape, dtype)
            self.slot.machine.wait(self.slot.stream)
            getattr(result, name)[...] = filled[some]
        return result
