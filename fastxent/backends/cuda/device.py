"""Cross entropy of arrays that are on the device, from the caller's arrays to the caller's arrays.

Nothing waits. What is wrong with a target is known when the device has seen it: the row is NaN, and the next call on
that stream that finds the news raises the IndexError, or with ``check`` the call itself, which then waits.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from fastxent import arguments, checks
from fastxent.backends.cuda import arrangement, calls, launches, resident
from fastxent.backends.cuda.arrays import in_line, library_of_logits
from fastxent.backends.cuda.inputs import bits_of, scaling_of
from fastxent.backends.cuda.lent import answered, borrowed, give_back, is_lent
from fastxent.backends.cuda.losses import GROUP, Loss, Upstream
from fastxent.backends.cuda.places import Rows
from fastxent.backends.cuda.run import runner
from fastxent.backends.cuda.scratch import scratch_of
from fastxent.backends.cuda.words import Shares
from fastxent.backends.cuda.write import Written


def cross_entropy(logits, targets, options, *, check=False):
    """See `fastxent.cross_entropy`; class indices, or probabilities of all classes."""
    options = arguments.as_options(options)
    if is_lent(logits):
        return answered(runner().machine, cross_entropy, logits, targets, options, check=check)
    return _asked(logits, targets, options, None, check)


def cross_entropy_with_grad(logits, targets, options, *, grad_output=1.0, out=None, check=False):
    """See `fastxent.cross_entropy_with_grad`; class indices, or probabilities of all classes."""
    options, gradient = arguments.as_options(options), {"grad_output": grad_output, "out": out}
    if is_lent(logits):
        return answered(runner().machine, cross_entropy_with_grad, logits, targets, options, check=check, **gradient)
    return _asked(logits, targets, options, gradient, check)


def ready(logits, axis=-1):
    """Shape and `DeviceRows` of logits, once what was asked of their stream is done: for verbs, which wait anyway."""
    machine, logits = runner().machine, borrowed(logits)
    library = library_of_logits(logits, machine)
    view = library.view(logits)
    checks.check_logits(view.shape, view.dtype, axis)
    if axis not in (-1, len(view.shape) - 1):
        raise ValueError(f"axis must be the last of logits on a device; got {axis}")
    with machine.current():
        machine.wait(machine.stream_of(library.stream(logits)))
        give_back(machine)
    return view.shape, dataclasses.replace(resident.as_rows(view), owner=logits)


def _asked(logits, targets, options, gradient, check):
    """A call by the plan of one like it, or by one that is made of it."""
    machine = runner().machine
    library = library_of_logits(logits, machine)
    slot = scratch_of(machine, handle := library.stream(logits))
    given = {"logits": logits, "targets": targets}
    if options.weight is not None:
        given["weight"] = options.weight
    if options.sample_weight is not None:
        given["sample_weight"] = options.sample_weight
    if gradient is not None:
        given |= gradient
    about = calls.known(given, (gradient is None, *_scalars(options)), library, slot, handle)
    if about[-1] is None:
        view = library.view(logits)
        checks.check_logits(view.shape, view.dtype, options.axis)
        rows = arrangement.in_rows(logits, options.axis, library)
        goals = arrangement.targets_in_rows(targets, logits, options.axis, library)
        out = gradient and gradient["out"]
        place = arrangement.place_for(out, logits, rows, options.axis, library)
        if rows is not logits or goals is not targets or place is not out:
            return _asked_of_copies(rows, goals, place, options, gradient, check, library)
    with slot.lock, slot.machine.current():
        slot.raise_for_earlier(check)

        def carry_out():
            return _carry_out(given, options, gradient, library, slot, handle)

        made, note = calls.carried_out(about, logits, library, slot, carry_out)
        if check:
            slot.raise_at_once(*note, calls.numbers_of(slot, library.view(targets)))
    answer = (made["loss"], made["lse"]) if options.return_lse else (made["loss"],)
    if gradient:
        answer = (*answer, made["dlogits"] if gradient["out"] is None else gradient["out"])
    return answer if len(answer) > 1 else answer[0]


def _scalars(options):
    return (
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap, options.temperature,
        options.reduction, options.denominator, options.return_lse, options.axis,
    )  # fmt: skip


def _asked_of_copies(rows, goals, place, options, gradient, check, library):
    """The same of arrays that have been arranged, and the gradient where the caller wants it."""
    axis, moved = options.axis, arguments.with_last_axis(options)
    if gradient is None:
        return _asked(rows, goals, moved, None, check)
    *found, dlogits = _asked(rows, goals, moved, gradient | {"out": place}, check)
    return (*found, arrangement.handed_back(dlogits, gradient["out"], place, axis, library))


def _carry_out(given, options, gradient, library, slot, handle):
    """The loss, and its gradient where one is asked for."""
    view = calls.placed(library.view(given["logits"]), "logits")
    about = resident.as_rows(view), view.shape[:-1], checks.loss_dtype(view.dtype), library, slot, handle
    call = LossCall(given["logits"], given["targets"], options, *about)
    if gradient is None:
        call.ask_loss()
    else:
        upstream = call.upstream(given["grad_output"])
        call.ask_loss_and_gradient(upstream, call.written(given["out"], "dlogits"))
    return call


class Goals(NamedTuple):
    """What the news of bad targets is about."""

    rows: int
    classes: int


class LossCall(calls.Call):
    """A loss: the caller's targets and options, checked, as kernels are told of them.

    ``given`` are `Rows`, ``shares`` `Shares` and ``scaling`` `Scaling` of all logits, for kernels of a ``kind``; those
    with a thread for a row are of the kind ``plain``.
    """

    def __init__(self, like, targets, options, *about):
        super().__init__(like, *about)
        arguments.check_scalars(options)
        checks.check_ignore_index(options.ignore_index)
        self.options, (count, classes) = options, self.rows.shape
        self.note = Goals(count, classes), options.ignore_index
        view, dense = self._view_of(targets), None
        if checks.is_floating(view.dtype):
            dense = self._probabilities(view)
        elif view.dtype not in (np.int64, np.int32):
            raise NotImplementedError(f"targets on a device must be int64 or int32 class indices, not {view.dtype}")
        weight = self.numbers(options.weight, "weight", (classes,))
        spread = "even" if weight == 0 else "weights"
        if dense is not None and options.label_smoothing < 1.0:
            spread = "probabilities"
        elif dense is None and not options.label_smoothing:
            spread = "none"
        kinds, largest = self.machine.layout.kind, dense is not None
        self.scaling = scaling_of(self.rows.dtype, options.softcap, options.temperature)
        self.kind = kinds(self.rows.dtype.name, classes, self.scaling.cap != 0, spread, largest)
        self._loss = self._of_options(view, weight, dense is not None)
        self.plain = kinds(self.real.name, self.machine.layout.launch, False, "none", largest)
        address, strips = 0 if largest else view.address, -(-classes // self.kind.strip)
        self.given = Rows(self.rows.address, self.rows.stride, address, count, classes, strips, self.slot.wrong)
        keep, even = 1.0 - options.label_smoothing, options.label_smoothing / classes
        place, stride = (0, 0) if dense is None else (dense.address, dense.stride)
        self.shares = Shares(weight, place, stride, bits_of(keep, self.real), bits_of(even, self.real), 1.0)

    def _view_of(self, targets):
        if isinstance(targets, tuple):
            raise NotImplementedError("targets on a device must be class indices or probabilities of all classes")
        view = self.on_device(targets, "targets")
        logits_shape = *self.shape, self.rows.classes
        if view.shape != logits_shape or not checks.is_floating(view.dtype):
            arguments.check_targets(view.shape, view.dtype, logits_shape)
        return view

    def _probabilities(self, view):
        if view.dtype != self.real:
            raise NotImplementedError(f"probabilities on a device must be {self.real}, not {view.dtype}")
        arguments.check_no_ignored_class(self.options.ignore_index)
        return resident.as_rows(view)

    def _of_options(self, targets, weight, dense):
        """`Loss` without room for anything but sums."""
        options, classes, ignored = self.options, self.rows.classes, self.options.ignore_index
        smoothing, mean = float(options.label_smoothing), options.reduction == "mean"
        own, shared = 1.0 - smoothing, smoothing / classes
        if dense:
            own, shared = 0.0, 1.0 if smoothing < 1.0 else 1.0 / classes
        groups = max(1, -(-self.rows.rows // GROUP))
        return Loss(
            step=0 if dense else in_line(targets, "targets"),
            wide=int(targets.dtype == np.int64),
            ignored=0 if ignored is None else int(ignored),
            has_ignored=int(ignored is not None),
            weight=weight,
            sample_weight=self.numbers(options.sample_weight, "sample_weight", self.shape),
            own=own,
            shared=shared,
            z_loss=float(options.z_loss),
            parts=self.slot.reserve("parts", (groups, 2), np.float64),
            tickets=self.slot.counters("counters", 1 + groups),
            averaged=int(mean and options.denominator is None),
            denominator=float(options.denominator) if mean and options.denominator is not None else 1.0,
            left=self.rows.rows,
        )

    def weigh(self):
        """Ask for what a mean is divided by, before its gradient is."""
        if self._loss.averaged and self.rows.rows:
            place = self.slot.reserve("divisor", (1,), np.float64)
            launches.total_weight(self.slot, self.plain, self.given, self._loss, place)
            self._loss = self._loss._replace(divisor=place)

    def results(self):
        """`Loss`, with room for what the caller gets."""
        lse = self.made("lse", self.shape, self.real).address if self.options.return_lse else 0
        if self.options.reduction == "none":
            return self._loss._replace(losses=self.made("loss", self.shape, self.real).address, lse=lse)
        of_rows = self.slot.reserve("losses", (self.rows.rows,), np.float64)
        return self._loss._replace(of_rows=of_rows, total=self.made("loss", (), self.real).address, lse=lse)

    def upstream(self, grad_output):
        """`Upstream` of the loss."""
        gradient, step, factor = 0, 0, 1.0
        shape = self.shape if self.options.reduction == "none" else ()
        if isinstance(grad_output, int | float):
            checks.check_grad_output(np.asarray(grad_output), self.options.reduction, shape)
            factor = float(grad_output)
        else:
            gradient, step = self.numbers(grad_output, "grad_output", shape), self.real.itemsize if shape else 0
        return Upstream(float(self.options.temperature), gradient, step, 0.0, factor)

    def ask_total(self, results):
        """Ask for the sum of losses that are there."""
        if results.total:
            launches.total_loss(self.slot, self.plain, self.given, results)

    def ask_loss(self):
        """Ask for the loss, whose rows are all there."""
        results = self.results()
        launches.statistics(self.slot, self.kind, self.given, self.shares, self.scaling, results)
        self._end(results)

    def ask_loss_and_gradient(self, upstream, out):
        """Ask for the gradient too, to `DeviceRows`."""
        self.weigh()
        results = self.results()
        launches.entries(
            self.slot, self.kind, self.given, self.shares, upstream, self.scaling, results,
            Written(out.address, out.stride), out.address == self.given.logits, written=out.dtype.name,
            entries="gradient",
        )  # fmt: skip
        self._end(results)

    def _end(self, results):
        if not self.rows.rows:  # then no kernel had a last row
            self.ask_total(results)
