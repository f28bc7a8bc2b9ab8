"""Logits on a device for calls that are timed there: made, made anew, and some of their rows looked at afterwards."""

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
from fastxent.bench import exact
from fastxent.state import IGNORED

_IGNORE_INDEX = -100
# launches' bytes: a gigabyte is written ahead of a call, which takes a device longer than the host needs to ask for it
AHEAD = 16
# of logits in bfloat16, more than a cache holds: they are read then, else it would write back while the call is timed
READ = 8192, 8192
_PIECE = (1 << 26) - 16  # bytes that logits repeat: such that none is the same as those 2^32 before it
_LOOKED_AT = 1 << 20  # logits, at most, where rows are looked at


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
        self._piece = self._placed((4 * rng.standard_normal(piece, np.float32)).astype(self.dtype))
        self.restore()
        indices = rng.integers(0, self.classes, self.rows)
        self.indices = np.where(rng.random(self.rows) < ignored, IGNORED, indices)
        self.targets = self._placed(self._given_targets())
        self._options: dict[str, Any] = options or {}
        placed = {name: self._placed(value) for name, value in self._options.items() if isinstance(value, np.ndarray)}
        self.options = self._options | placed
        self._read = self._placed(np.zeros(READ, np.dtype("bfloat16"))), self._placed(np.zeros(READ[0], np.int64))
        machine.wait(self.stream)

    def _placed(self, values) -> Any:
        array = DeviceArray(self.machine, 0, values.shape, values.dtype)
        self.machine.copy_to_device(self.stream, values, array.address)
        self.machine.wait(self.stream)
        return array

    def _given_targets(self):
        return np.where(self.indices == IGNORED, _IGNORE_INDEX, self.indices)

    def release(self):
        """Give the device its memory back."""
        self.machine.wait(self.stream)
        del self.logits, self.out, self.targets, self.options, self._ahead, self._read, self._piece
        self.slot.release()

    def scoring(self, top_k):
        """What scores with the ``top_k`` largest classes ask of the device."""
        slot, scaling, count = self.slot, scaling_of(self.dtype, None, 1.0), self.rows
        kind = kind_of(slot.machine, self.dtype, self.classes, self.indices, scaling, None)
        places = slot.upload("targets", self.indices, np.int64), slot.zeros("flag", 1)
        given = Rows(
            self.logits.address, self.classes, places[0], count, self.classes, -(-self.classes // kind.strip), places[1]
        )
        shares = shares_of(slot, slice(0, count), None, kind, checks.loss_dtype(self.dtype), self.classes)
        columns = [slot.reserve(f"score {k}", (count,), np.float64) for k in range(len(Found._fields) - 2)]
        found = Found._make((*columns, slot.reserve("top_ids", (count, top_k), np.int64), top_k))
        known = slot.reserve("known", (count, KNOWN), np.uint8)
        picked = Picked(found.top_ids, top_k, slot.reserve("top_log_probs", (count, top_k), np.float64))

        def score():
            launches.score(slot, kind, given, shares, scaling, found, known)
            if top_k:
                launches.log_probs(slot, kind, given, scaling, known, picked)

        return score

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

    def some(self):
        """Rows to look at, in order: the first two, the last two, those about logit 2^31, and as many others as do not
        take long.
        """
        count = max(6, min(32, _LOOKED_AT // self.classes))
        middle = min(2**31 // self.classes, self.rows - 1)
        edges = {0, 1, middle, middle + 1, self.rows - 2, self.rows - 1}
        others = np.random.default_rng().integers(0, self.rows, max(0, count - len(edges)))
        return [i for i in sorted(edges | set(others.tolist())) if 0 <= i < self.rows]

    def figures(self):
        """Of a check of `some` rows, whose gradients have overwritten nonsense: see `fastxent.bench.exact`."""
        some, function = self.some(), fastxent.cross_entropy_with_grad
        step = self.classes * self.dtype.itemsize
        poison = self._placed(np.full(self.classes, np.nan, self.dtype))
        for i in some:
            self.machine.copy(self.stream, poison.address, self.out.address + i * step, step)
        losses, _ = function(self.logits, self.targets, reduction="none", out=self.out, **self.options)
        alone = fastxent.cross_entropy(self.logits, self.targets, reduction="none", **self.options)
        found, of_loss = (self._fetched(array.address, self.rows, array.dtype)[some] for array in (losses, alone))
        logits, gradient = (
            np.stack([self._fetched(array.address + i * step, self.classes, array.dtype) for i in some])
            for array in (self.logits, self.out)
        )
        options: dict[str, Any] = {
            name: value.astype(float) if isinstance(value, np.ndarray) else value
            for name, value in self._options.items()
        }
        targets = self._given_targets()[some]
        wanted = function(logits.astype(float), targets, reduction="none", backend="reference", **options)
        scale = np.abs(wanted[1]).max(axis=1, keepdims=True) if options else None  # options add and subtract
        more = exact.SOFTCAP if "softcap" in options else 0.0
        yield from exact.loss_and_gradient((found, gradient), wanted, self.dtype, scale=scale, more=more)
        yield "loss alone", of_loss, wanted[0], exact.promised(self.dtype)[0] + more

    def _fetched(self, address, count, dtype):
        values = np.empty(count, dtype)
        self.machine.copy_to_host(self.stream, values, address)
        self.machine.wait(self.stream)
        return values
