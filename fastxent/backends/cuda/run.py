"""Blocks of rows of the host taken through a machine's kernels: which kernels, on what, and where the results go."""

import functools
import importlib
import os

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda import launches
from fastxent.backends.cuda.elements import Elements
from fastxent.backends.cuda.finish import Coefficients as CoefficientAddresses
from fastxent.backends.cuda.finish import Results
from fastxent.backends.cuda.kernels import Rows, Written
from fastxent.backends.cuda.resident import DeviceRows, rows_of
from fastxent.backends.cuda.stream import Slot, in_turn
from fastxent.backends.cuda.words import Scaling, Shares
from fastxent.checks import loss_dtype
from fastxent.state import IGNORED, LARGEST, Statistics

_FIELDS = Statistics.__slots__
_DLPACK_CUDA = 2


class Runner:
    """The kernels of a machine, and two slots that take turns."""

    def __init__(self, machine):
        self.machine = machine
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
            filled = None if stays else slot.download("written", (_count(rows), place.stride), written)

            def take():
                harvest()
                if filled is not None:
                    with np.errstate(over="ignore"):
                        out[rows] = filled[:, : logits.shape[1]]

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
                columns[rows] = filled

            slot.then(take)

        self._each_block(logits, of_rows)

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
        return rows_of(array, self._slots[0].stream) if on_device else array

    def row(self, logits, i):
        """One row as an array."""
        if not isinstance(logits, DeviceRows):
            return logits[i : i + 1][0]
        slot, found = self._slots[0], logits[i : i + 1]
        array, _ = slot.piece("row", (found.classes,), found.dtype)
        self.machine.copy_to_host(slot.stream, array, found.address)
        self.machine.wait(slot.stream)
        return array

    def _each_block(self, logits, of_rows, stays=True):
        """In blocks that are copied in turn; at once where nothing is copied."""
        size = max(1, logits.shape[1] * logits.dtype.itemsize)
        block = max(1, self.machine.layout.launch // size)
        whole = stays and isinstance(logits, DeviceRows)
        self._in_slices(len(logits), max(1, len(logits)) if whole else block, of_rows)

    def _in_slices(self, count, size, task):
        slices = [slice(start, min(count, start + size)) for start in range(0, count, size)]
        in_turn(self._slots, [lambda slot, some=some: task(slot, some) for some in slices])

    def _inputs(self, slot, logits, targets, rows, spread, kind):
        """``rows, shares`` of a block, on their way to the device."""
        classes, dtype = logits.shape[1], logits.dtype.newbyteorder("=")
        place, stride = _place_of(slot, logits[rows], dtype)
        flag = slot.zeros("flag", 1)
        goals = slot.upload("targets", targets[rows], np.int64)
        given = Rows(place, stride, goals, _count(rows), classes, -(-classes // kind.strip), flag)
        return given, shares_of(slot, rows, spread, kind, loss_dtype(dtype), classes)


def is_simulated():
    """Whether the environment asks for the simulated GPU."""
    return os.environ.get("FASTXENT_CUDA_SIMULATED") == "1"


def runner():
    """The one of this process."""
    return _runner_on("simulated" if is_simulated() else "machine")


@functools.cache
def _runner_on(module):
    return Runner(importlib.import_module(f"fastxent.backends.cuda.{module}").Machine())


@functools.lru_cache
def scaling_of(dtype, softcap, temperature):
    """Plain numbers: a launch takes no others."""
    real = loss_dtype(dtype)
    cap = 0.0 if softcap is None else 1.0 / softcap
    of_logits, of_rows = rowmath.rate(real.type, softcap, temperature), rowmath.rate(np.float64, softcap, temperature)
    return Scaling(*(_bits_of(number, real) for number in (*of_logits, cap)), *map(float, of_rows))


def _bits_of(number, real):
    return int(np.array(number, real).view(f"i{real.itemsize}"))


def kind_of(machine, dtype, classes, targets, scaling, spread, mergeable=False):
    """What the kernels for such rows are compiled for."""
    live = targets[targets != IGNORED]
    largest = bool((live == LARGEST).any())
    if largest and not (live == LARGEST).all():
        raise NotImplementedError("the cuda backend takes rows with and without a target in separate calls")
    name = "none"
    if spread is not None:
        name = "probabilities" if spread.keep else "weights" if spread.weight.size > 1 else "even"
    form = dtype.newbyteorder("=").name
    return machine.layout.kind(form, classes, scaling.cap != 0.0, name, largest, mergeable)


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


def _count(rows):
    return rows.stop - rows.start


def _place_of(slot, rows, dtype):
    """Address and stride of rows: where they are, or of a copy on its way to the device."""
    if isinstance(rows, DeviceRows):
        return rows.address, rows.stride
    return slot.upload_rows("logits", rows, dtype)


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


def shares_of(slot, rows, spread, kind, real, classes):
    """Shares of some rows; weights are divided by a power of two: those beyond float32 would not fit."""
    if spread is None:
        return Shares(0, 0, 0, 0, 0, 1.0)
    if kind.spread == "even":
        return Shares(0, 0, 0, 0, 0, float(spread.weight[0]))
    scale = 2.0 ** int(np.frexp(spread.weight.max(initial=0.0))[1])
    weight = slot.upload("weight", np.broadcast_to(spread.weight / scale, classes), real)
    if kind.spread == "weights":
        return Shares(weight, 0, 0, 0, 0, scale)
    place, stride = slot.upload_rows("probabilities", spread.probabilities[rows], real)
    return Shares(weight, place, stride, _bits_of(spread.keep, real), _bits_of(spread.even, real), scale)


def coefficients_of(slot, coefficients):
    """Coefficients of the rows of a slot, on their way to the device."""
    places = [slot.upload(f"coefficient {k}", column, np.float64) for k, column in enumerate(coefficients)]
    return CoefficientAddresses(*places, *(8 if len(column) > 1 else 0 for column in coefficients))
