"""Blocks of rows of the host taken through a machine's kernels: which kernels, on what, and where the results go."""

import importlib
import os
import threading
from typing import Any

import numpy as np

from fastxent.backends.cuda import launches
from fastxent.backends.cuda.counts import Beside
from fastxent.backends.cuda.elements import Elements
from fastxent.backends.cuda.ends import Results
from fastxent.backends.cuda.inputs import coefficients_of, kind_of, mass_of_others, scaling_of, shares_of
from fastxent.backends.cuda.places import RECORD, Rows
from fastxent.backends.cuda.resident import DeviceRows, rows_of
from fastxent.backends.cuda.scores import KNOWN, Found, Picked
from fastxent.backends.cuda.stream import Slot, in_turn
from fastxent.backends.cuda.write import Written
from fastxent.checks import loss_dtype
from fastxent.state import FIELDS, IGNORED, Statistics

_RUNNERS: list[Any] = []  # that of this process, once it is asked for
_FIELDS = Statistics.__slots__
_DLPACK_CUDA = 2
_MASS = FIELDS.index("mass")


class Runner:
    """The kernels of a machine, and two slots that take turns; one thread's call at a time."""

    def __init__(self, machine):
        self.machine, self._lock = machine, threading.RLock()
        with machine.current():
            self._slots = [Slot(machine), Slot(machine)]

    def statistics(self, logits, targets, spread, scaling, result):
        """Fill `fastxent.state.Statistics`."""
        kind = kind_of(self.machine, logits.dtype, logits.shape[1], targets, scaling, spread)

        def of_rows(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, spread, kind)
            launches.statistics(slot, kind, given, shares, scaling, results_of(slot, _count(rows), wanted_of(result)))
            slot.then(_harvest_results(slot, rows, result))

        self._each_block(logits, of_rows)

    def entries(self, logits, targets, coefficients, spread, scaling, result, out, entries):
        """Fill `Statistics`, and ``out`` with the gradient or the log-softmax."""
        kind = kind_of(self.machine, logits.dtype, logits.shape[1], targets, scaling, spread)
        written = _written_as(logits.dtype, out)
        how, stays = {"written": written.name, "entries": entries}, isinstance(out, DeviceRows)
        in_place = stays and isinstance(logits, DeviceRows) and out.address == logits.address

        def of_rows(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, spread, kind)
            of_loss = coefficients_of(slot, coefficients.of(rows))
            results = results_of(slot, _count(rows), wanted_of(result))
            place = Written(out[rows].address, out.stride) if stays else _room_for(slot, rows, out, written)
            launches.entries(slot, kind, given, shares, of_loss, scaling, results, place, in_place, **how)
            harvest = _harvest_results(slot, rows, result)
            fill = None if stays else _harvest_written(slot, rows, out, written, place)

            def take():
                harvest()
                if fill is not None:
                    fill()

            slot.then(take)

        self._each_block(logits, of_rows, stays)

    def accumulate(self, logits, targets, spread, scaling, columns):
        """Add the sums of all rows to ``columns`` (N, 9)."""
        kind = kind_of(self.machine, logits.dtype, logits.shape[1], targets, scaling, spread, mergeable=True)

        def of_rows(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, spread, kind)
            place = slot.upload("columns", columns[rows])
            launches.accumulate(slot, kind, given, shares, scaling, place)
            filled = slot.download("columns", columns[rows].shape, np.float64)

            def take():
                mass = columns[rows, _MASS].copy()
                columns[rows] = filled
                if kind.spread == "weights":  # a kernel's sum of them has the digits of what it computes with
                    columns[rows, _MASS] = mass + mass_of_others(spread.weight, targets[rows])

            slot.then(take)

        self._each_block(logits, of_rows)

    def score(self, logits, targets, ids, scaling, result):
        """Fill `fastxent.state.RowScores`."""
        kind, kept = (
            kind_of(self.machine, logits.dtype, logits.shape[1], targets, scaling, None),
            result.top_ids.shape[1],
        )

        def of_rows(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, None, kind)
            count, columns = _count(rows), len(Found._fields) - 2
            place, known = (
                slot.reserve("found", (columns, count), np.float64),
                slot.reserve("known", (count, KNOWN), np.uint8),
            )
            top = slot.reserve("top_ids", (count, kept), np.int64)
            found = Found._make((*(place + 8 * k * count for k in range(columns)), top, kept))
            launches.score(slot, kind, given, shares, scaling, found, known)
            filled = [
                slot.download("found", (columns, count), np.float64),
                slot.download("top_ids", (count, kept), np.int64),
            ]
            for name, classes, number in (("top", top, kept), ("id", 0, ids.shape[1])):
                if number:
                    classes = classes or slot.upload("ids", ids[rows])
                    picked = Picked(classes, number, slot.reserve(f"{name}_log_probs", (count, number), np.float64))
                    launches.log_probs(slot, kind, given, scaling, known, picked)
                filled.append(slot.download(f"{name}_log_probs", (count, number), np.float64))

            def take():
                for column, found in zip(result, (*filled[0], *filled[1:]), strict=True):
                    column[rows] = found

            slot.then(take)

        self._each_block(logits, of_rows)

    def gradient(self, logits, targets, of_rows, spread, scaling, out):
        """Fill ``out`` with entries; ``of_rows``, float64 (N,) each: base, exponent, factor, smooth, own."""
        kind = kind_of(self.machine, logits.dtype, logits.shape[1], targets, scaling, spread, mergeable=True)
        written, stays = _written_as(logits.dtype, out), isinstance(out, DeviceRows)

        def of_block(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, spread, kind)
            base, exponent, factor, smooth, own = (column[rows] for column in of_rows)
            plans = np.zeros((_count(rows), RECORD // 8))
            plans[:, :6] = np.stack([base, exponent, factor, -smooth * shares.scale, own, targets[rows]], axis=1)
            place = Written(out[rows].address, out.stride) if stays else _room_for(slot, rows, out, written)
            plans = slot.upload("plans", plans)
            launches.gradient(slot, kind, given, shares, scaling, plans, place, written=written.name)
            slot.then(lambda: None) if stays else slot.then(_harvest_written(slot, rows, out, written, place))

        self._each_block(logits, of_block, stays)

    def count(self, logits, levels, counts):
        """Fill ``counts`` (N, 2) with how many logits are above and level with ``levels`` (N,)."""
        targets = np.full(len(logits), IGNORED)
        kind = kind_of(self.machine, logits.dtype, logits.shape[1], targets, scaling_of(logits.dtype, None, 1.0), None)

        def of_rows(slot, rows):
            given, _ = self._inputs(slot, logits, targets, rows, None, kind)
            launches.count(
                slot, kind, given, slot.upload("levels", levels[rows]), slot.zeros("counts", 2 * _count(rows))
            )
            filled = slot.download("counts", (2 * _count(rows),), np.int64)

            def take():
                counts[rows] = filled.reshape(-1, 2)

            slot.then(take)

        self._each_block(logits, of_rows)

    def divergences(self, logits_p, logits_q, lse_p, lse_q, parts):
        """Fill ``parts`` (N, strips, 2); see `strips_of`."""
        targets, dtype = np.full(len(logits_p), IGNORED), _common(logits_p, logits_q)
        scaling = scaling_of(dtype, None, 1.0)
        kind = kind_of(self.machine, dtype, logits_p.shape[1], targets, scaling, None)

        def of_rows(slot, rows):
            given, _ = self._inputs(slot, logits_p, targets, rows, None, kind, dtype)
            place = _place_of(slot, logits_q[rows], dtype, "logits beside")
            lse = slot.upload("lse p", lse_p[rows]), slot.upload("lse q", lse_q[rows])
            beside = Beside(place[0], place[1], lse[0], lse[1])
            launches.divergences(
                slot, kind, given, beside, scaling, slot.reserve("parts", parts[rows].shape, np.float64)
            )
            filled = slot.download("parts", parts[rows].shape, np.float64)

            def take():
                parts[rows] = filled

            slot.then(take)

        self._each_block(logits_p, of_rows, isinstance(logits_q, DeviceRows))

    def binary(self, logits, targets, weight, pos_weight, keep, even, upstream, losses, gradient):
        """Losses of elements, and their gradient where it has a place."""
        kind = self.machine.layout.kind(logits.dtype.name, self.machine.layout.launch, False, "none", False)

        def of_elements(slot, some):
            def put(name, values):
                return slot.upload(name, values if len(values) == 1 else values[some]), 8 if len(values) > 1 else 0

            (weights, step), (positive, positive_step), (above, above_step) = (
                put("weight", weight), put("pos_weight", pos_weight), put("upstream", upstream)
            )  # fmt: skip
            elements = Elements(
                _count(some), slot.upload("logits", logits[some]), slot.upload("targets", targets[some]),
                weights, positive, above, step, positive_step, above_step, keep, even,
            )  # fmt: skip
            places = [slot.reserve("losses", (_count(some),), np.float64), 0]
            if len(gradient):
                places[1] = slot.reserve("gradient", (_count(some),), logits.dtype)
            launches.binary(slot, kind, elements, *places)
            filled = [(losses, slot.download("losses", (_count(some),), np.float64))]
            if len(gradient):
                filled.append((gradient, slot.download("gradient", (_count(some),), logits.dtype)))

            def take():
                for into, found in filled:
                    into[some] = found

            slot.then(take)

        self._in_slices(len(logits), self.machine.layout.launch // 32, of_elements)

    def taken(self, array):
        """`DeviceRows` of an array that is on a device; any other as it is."""
        if isinstance(array, np.ndarray | DeviceRows):
            return array
        if hasattr(array, "__dlpack_device__"):
            on_device = array.__dlpack_device__()[0] == _DLPACK_CUDA
        else:
            on_device = hasattr(array, "__cuda_array_interface__")
        if not on_device:
            return array
        with self._lock, self.machine.current():
            stream = self._slots[0].stream
            rows = rows_of(array, stream)
            self.machine.wait(stream)  # for what is asked of another slot too
        return rows

    def row(self, logits, i):
        """One row as an array."""
        if not isinstance(logits, DeviceRows):
            return logits[i : i + 1][0]
        slot, found = self._slots[0], logits[i : i + 1]
        with self._lock, self.machine.current():
            array, _ = slot.piece("row", (found.classes,), found.dtype)
            self.machine.copy_to_host(slot.stream, array, found.address)
            self.machine.wait(slot.stream)
            return array.copy()

    def _each_block(self, logits, of_rows, stays=True):
        """In blocks that are copied in turn; at once where nothing is copied."""
        size = max(1, logits.shape[1] * logits.dtype.itemsize)
        block = max(1, self.machine.layout.launch // size)
        whole = stays and isinstance(logits, DeviceRows)
        self._in_slices(len(logits), max(1, len(logits)) if whole else block, of_rows)

    def _in_slices(self, count, size, task):
        slices = [slice(start, min(count, start + size)) for start in range(0, count, size)]
        with self._lock, self.machine.current():
            in_turn(self._slots, [lambda slot, some=some: task(slot, some) for some in slices])

    def _inputs(self, slot, logits, targets, rows, spread, kind, dtype=None):
        """``rows, shares`` of a block, on their way to the device; in another ``dtype`` where one is given."""
        classes, dtype = logits.shape[1], dtype or logits.dtype.newbyteorder("=")
        place, stride = _place_of(slot, logits[rows], dtype, "logits")
        flag = slot.zeros("flag", 1)
        goals = slot.upload("targets", targets[rows], np.int64)
        given = Rows(place, stride, goals, _count(rows), classes, -(-classes // kind.strip), flag)
        return given, shares_of(slot, rows, spread, kind, loss_dtype(dtype), classes)


def is_simulated():
    """Whether the environment asks for the simulated GPU."""
    return os.environ.get("FASTXENT_CUDA_SIMULATED") == "1"


def runner():
    """The one of this process."""
    if not _RUNNERS:
        module = importlib.import_module(f"fastxent.backends.cuda.{'simulated' if is_simulated() else 'machine'}")
        _RUNNERS.append(Runner(module.Machine()))
    return _RUNNERS[0]


def wanted_of(result):
    """The fields of `Statistics` that have room."""
    return tuple(field for field in _FIELDS if getattr(result, field).size or field == "nll")


def results_of(slot, count, wanted):
    """Places for the statistics that are wanted, in one piece."""
    place = slot.reserve("results", (len(wanted), count), np.float64)
    places = {field: place + 8 * k * count for k, field in enumerate(wanted)}
    return Results(*(places.get(field, 0) for field in _FIELDS))


def _harvest_results(slot, rows, result):
    wanted = wanted_of(result)
    filled = slot.download("results", (len(wanted), _count(rows)), np.float64)

    def take():
        for field, column in zip(wanted, filled, strict=True):
            getattr(result, field)[rows] = column

    return take


def _harvest_written(slot, rows, out, written, place):
    filled = slot.download("written", (_count(rows), place.stride), written)

    def take():
        with np.errstate(over="ignore"):
            out[rows] = filled[:, : out.shape[1]]

    return take


def _common(logits_p, logits_q):
    """The format that two arrays of logits are read in, which the host may convert to."""
    p, q = (logits.dtype.newbyteorder("=") for logits in (logits_p, logits_q))
    if p != q and (isinstance(logits_p, DeviceRows) or isinstance(logits_q, DeviceRows)):
        raise NotImplementedError(f"logits on a device are compared in one dtype; got {p} and {q}")
    return p if p == q else np.result_type(loss_dtype(p), loss_dtype(q))


def strips_of(logits_p, logits_q):
    """Into how many strips two rows are cut together."""
    name, classes = _common(logits_p, logits_q).name, logits_p.shape[1]
    return -(-classes // runner().machine.layout.kind(name, classes, False, "none", False).strip)


def _count(rows):
    return rows.stop - rows.start


def _place_of(slot, rows, dtype, name):
    """Address and stride of rows: where they are, or of a copy on its way to the device."""
    if isinstance(rows, DeviceRows):
        return rows.address, rows.stride
    return slot.upload_rows(name, rows, dtype)


def _written_as(dtype, out):
    """The format a kernel writes: that of the logits or of what is computed with, which the host may convert."""
    own = loss_dtype(dtype)
    if isinstance(out, DeviceRows) and out.dtype not in (own, dtype):
        raise NotImplementedError(f"{dtype} logits on a device have a gradient in {dtype} or {own}, not {out.dtype}")
    return out.dtype if out.dtype == dtype and dtype.itemsize > 1 else own


def _room_for(slot, rows, out, written):
    """A place for rows that go back to the host."""
    stride = _padded(out.shape[1], written)
    return Written(slot.reserve("written", (_count(rows), stride), written), stride)


def _padded(classes, dtype):
    """A stride with which every row begins at a multiple of 16 bytes."""
    each = 16 // dtype.itemsize
    return -(-classes // each) * each
