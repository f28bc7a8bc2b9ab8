"""Blocks of rows of the host taken through a machine's kernels: which kernels, on what, and where the results go."""

import numpy as np

from fastxent.backends.cuda.elements import Elements
from fastxent.backends.cuda.finish import RECORD, Results
from fastxent.backends.cuda.finish import Coefficients as CoefficientAddresses
from fastxent.backends.cuda.kernels import Rows, Written, shared_bytes
from fastxent.backends.cuda.stream import Slot, in_turn
from fastxent.backends.cuda.sums import Shares
from fastxent.checks import loss_dtype
from fastxent.state import IGNORED, LARGEST, Statistics

_FIELDS = Statistics.__slots__


class Runner:
    """The kernels of a machine, and two slots that take turns."""

    def __init__(self, machine):
        self.machine = machine
        self._slots = [Slot(machine), Slot(machine)]

    def statistics(self, logits, targets, spread, scaling, result):
        """Fill `fastxent.state.Statistics`."""
        kind = self._kind(logits, targets, scaling, spread)

        def of_rows(slot, rows):
            arguments = *self._inputs(slot, logits, targets, rows, spread, kind), scaling
            results = self._results(slot, rows, result)
            if arguments[0].strips == 1:
                self._launch(slot, "statistics", kind, (*arguments, results), -(-_count(rows) // kind.rows))
            else:
                records = self._sum_strips(slot, kind, arguments)
                self._launch_rows(slot, "finish_statistics", kind, (*arguments, results, records))
            slot.then(self._harvest_results(slot, rows, result))

        self._each_block(logits, of_rows)

    def entries(self, logits, targets, coefficients, spread, scaling, result, out, entries):
        """Fill `Statistics`, and ``out`` with the gradient or the log-softmax."""
        kind = self._kind(logits, targets, scaling, spread)
        written = logits.dtype if out.dtype == logits.dtype and out.dtype.itemsize > 1 else loss_dtype(logits.dtype)
        how = {"written": written.name, "entries": entries}

        def of_rows(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, spread, kind)
            results, of_loss = self._results(slot, rows, result), _coefficients(slot, coefficients.of(rows))
            stride = _padded(logits.shape[1], written)
            place = Written(slot.reserve("written", (_count(rows), stride), written), stride)
            if given.strips == 1:
                blocks, whole = -(-_count(rows) // kind.rows), (given, shares, of_loss, scaling, results, place)
                self._launch(slot, "gradient", kind, whole, blocks, shared=shared_bytes(kind, True), **how)
            elif given.strips <= self.machine.together:
                blocks = _count(rows) * given.strips
                records = slot.reserve("records", (blocks, RECORD), np.uint8)
                tickets = slot.upload("tickets", np.zeros(1 + blocks, np.int64))
                arguments = given, shares, of_loss, scaling, results, records, tickets, place
                self._launch(slot, "shared_gradient", kind, arguments, blocks, shared=shared_bytes(kind, True), **how)
            else:
                records = self._sum_strips(slot, kind, (given, shares, scaling))
                plans = slot.reserve("plans", (_count(rows), RECORD), np.uint8)
                finish = given, shares, of_loss, scaling, results, records, plans
                self._launch_rows(slot, "finish_gradient", kind, finish, **how)
                blocks = _count(rows) * given.strips
                self._launch(slot, "strip_entries", kind, (given, shares, scaling, plans, place), blocks, **how)
            filled = slot.download("written", (_count(rows), stride), written)
            harvest = self._harvest_results(slot, rows, result)

            def take():
                harvest()
                with np.errstate(over="ignore"):
                    out[rows] = filled[:, : logits.shape[1]]

            slot.then(take)

        self._each_block(logits, of_rows)

    def accumulate(self, logits, targets, spread, scaling, columns):
        """Add the sums of all rows to ``columns`` (N, 9)."""
        kind = self._kind(logits, targets, scaling, spread, mergeable=True)

        def of_rows(slot, rows):
            given, shares = self._inputs(slot, logits, targets, rows, spread, kind)
            records = self._sum_strips(slot, kind, (given, shares, scaling))
            place = slot.upload("columns", columns[rows])
            self._launch_rows(slot, "finish_state", kind, (given, shares, scaling, records, place))
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
            self._launch(slot, "binary", kind, (elements, *places), -(-_count(some) // (kind.threads * kind.rows)))
            filled = [(losses, slot.download("losses", (_count(some),), np.float64))]
            if len(gradient):
                filled.append((gradient, slot.download("gradient", (_count(some),), logits.dtype)))

            def take():
                for into, found in filled:
                    into[some] = found

            slot.then(take)

        self._in_slices(len(logits), self.machine.layout.launch // 32, of_elements)

    def _kind(self, logits, targets, scaling, spread, mergeable=False):
        """What the kernels for these rows are compiled for."""
        live = targets[targets != IGNORED]
        largest = bool((live == LARGEST).any())
        if largest and not (live == LARGEST).all():
            raise NotImplementedError(
                "the cuda backend takes rows with a target and rows without one in separate calls"
            )
        name = "none"
        if spread is not None:
            name = "probabilities" if spread.keep else "weights" if spread.weight.size > 1 else "even"
        form = logits.dtype.newbyteorder("=").name
        return self.machine.layout.kind(form, logits.shape[1], scaling.cap != 0.0, name, largest, mergeable)

    def _each_block(self, logits, of_rows):
        size = max(1, logits.shape[1] * logits.dtype.itemsize)
        self._in_slices(len(logits), max(1, self.machine.layout.launch // size), of_rows)

    def _in_slices(self, count, size, task):
        slices = [slice(start, min(count, start + size)) for start in range(0, count, size)]
        in_turn(self._slots, [lambda slot, some=some: task(slot, some) for some in slices])

    def _inputs(self, slot, logits, targets, rows, spread, kind):
        """``rows, shares`` of a block, on their way to the device."""
        classes, dtype = logits.shape[1], logits.dtype.newbyteorder("=")
        place, stride = slot.upload_rows("logits", logits[rows], dtype)
        flag = slot.upload("flag", np.zeros(1, np.int64))
        goals = slot.upload("targets", targets[rows], np.int64)
        given = Rows(place, stride, goals, _count(rows), classes, -(-classes // kind.strip), flag)
        return given, _shares(slot, rows, spread, kind, loss_dtype(dtype), classes)

    def _results(self, slot, rows, result):
        """Places for the statistics that are wanted, in one piece."""
        wanted = [field for field in _FIELDS if getattr(result, field).size or field == "nll"]
        place = slot.reserve("results", (len(wanted), _count(rows)), np.float64)
        places = {field: place + 8 * k * _count(rows) for k, field in enumerate(wanted)}
        return Results(*(places.get(field, 0) for field in _FIELDS))

    def _harvest_results(self, slot, rows, result):
        wanted = [field for field in _FIELDS if getattr(result, field).size or field == "nll"]
        filled = slot.download("results", (len(wanted), _count(rows)), np.float64)

        def take():
            for field, column in zip(wanted, filled, strict=True):
                getattr(result, field)[rows] = column

        return take

    def _sum_strips(self, slot, kind, arguments):
        given = arguments[0]
        records = slot.reserve("records", (given.rows * given.strips, RECORD), np.uint8)
        self._launch(slot, "strip_sums", kind, (*arguments, records), given.rows * given.strips)
        return records

    def _launch_rows(self, slot, name, kind, arguments, **how):
        """A kernel with a thread for a row."""
        self._launch(slot, name, kind, arguments, -(-arguments[0].rows // (kind.threads * kind.rows)), **how)

    def _launch(self, slot, name, kind, arguments, blocks, shared=None, **how):
        shared = shared_bytes(kind, False) if shared is None else shared
        self.machine.launch(slot.stream, name, kind, arguments, blocks, shared=shared, **how)


def _count(rows):
    return rows.stop - rows.start


def _padded(classes, dtype):
    """A stride with which every row begins at a multiple of 16 bytes."""
    each = 16 // dtype.itemsize
    return -(-classes // each) * each


def _shares(slot, rows, spread, kind, real, classes):
    """Weights are divided by a power of two: those beyond float32 would not fit."""
    if spread is None:
        return Shares(0, 0, 0, 0.0, 1.0, 1.0)
    if kind.spread == "even":
        return Shares(0, 0, 0, 0.0, 1.0, float(spread.weight[0]))
    scale = 2.0 ** int(np.frexp(spread.weight.max(initial=0.0))[1])
    weight = slot.upload("weight", np.broadcast_to(spread.weight / scale, classes), real)
    if kind.spread == "weights":
        return Shares(weight, 0, 0, 0.0, 1.0, scale)
    place, stride = slot.upload_rows("probabilities", spread.probabilities[rows], real)
    return Shares(weight, place, stride, float(spread.keep), float(spread.even), scale)


def _coefficients(slot, coefficients):
    places = [slot.upload(f"coefficient {k}", column, np.float64) for k, column in enumerate(coefficients)]
    return CoefficientAddresses(*places, *(8 if len(column) > 1 else 0 for column in coefficients))
