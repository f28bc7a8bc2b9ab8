"""A call whose arrays are on the device: the caller's arrays, checked, room for new ones, and plans of calls.

All work is asked of the caller's stream, in order, and nothing waits for it; once a shape has been seen nothing is
allocated but the results. So it can be captured in a CUDA graph.
"""

from typing import Any

import numpy as np

from fastxent import checks
from fastxent.backends.cuda import resident
from fastxent.backends.cuda.arrays import check_device, in_line, library_of, may_be_on_device
from fastxent.backends.cuda.plans import Place, Plan, Recorder

_PLANS: dict[Any, Plan] = {}
_MOST = 1024  # of them


def placed(view, name):
    """A view whose address knows the name of its array."""
    return view._replace(address=Place(view.address, name))


def numbers_of(slot, view):
    """A function that waits for one number of an array in one line, by its place."""

    def number(place):
        found = np.empty(1, view.dtype)
        slot.machine.copy_to_host(slot.stream, found, view.address + place * in_line(view, "targets"))
        slot.machine.wait(slot.stream)
        return found[0]

    return number


class Call:
    """The stream of a call, what it makes for the caller, and the caller's arrays beside the logits.

    ``like`` is an array of the caller's kind; ``rows`` are the logits' `DeviceRows`, for a batch of ``shape``, and
    ``real`` is what they are computed with. ``arrays`` are the caller's new ones by name; ``new`` are their shapes and
    dtypes; ``note`` says whose news of bad targets there will be.
    """

    note: Any = None

    def __init__(self, like, rows, shape, real, library, slot, handle):
        self.slot, self.machine, self.handle, self.library = slot, slot.machine, handle, library
        self.array, self.rows, self.shape, self.real = like, rows, shape, real
        self.arrays, self.new, self.spans = {}, {}, {"logits": (rows.address, rows.end)}
        self._others = set()

    def made(self, name, shape, dtype):
        """A new array for the caller, and where it is."""
        self.new[name] = shape, dtype
        self.arrays[name] = self.library.empty(self.array, shape, dtype)
        return placed(self.library.view(self.arrays[name]), name)

    def on_device(self, array, name):
        """Where an array of the caller's is, once it is the stream's turn."""
        if not may_be_on_device(array, like=self.array):
            raise TypeError(f"{name} must be on the device too, like logits; got {type(array).__name__}")
        library = library_of(array, self.machine)
        check_device(library, array, name)
        if (handle := library.stream(array)) != self.handle:
            self.machine.follow(self.slot.stream, handle)
            self._others.add(handle)
        view = placed(library.view(array), name)
        self.spans[name] = view.address, view.address + _extent(view)
        return view

    def let_go(self):
        """Let the streams of arrays that are on others wait for this call, all of which has been asked for: one may be
        given back there.
        """
        for handle in self._others:
            self.machine.follow(self.machine.stream_of(handle), self.handle)

    def numbers(self, array, name, shape):
        """The address of an array of what is computed with, 0 for none."""
        if array is None:
            return 0
        view = self.on_device(array, name)
        if view.shape != tuple(shape) or view.dtype != self.real:
            raise ValueError(
                f"{name} on the device must be {self.real} of shape {tuple(shape)}; got {view.dtype} of {view.shape}"
            )
        if view.shape and in_line(view, name) != view.dtype.itemsize:
            raise ValueError(f"{name} on the device must be contiguous")
        return view.address

    def written(self, out, name):
        """The rows of ``out``, the logits themselves or apart from them; of a new array, ``name``, for None."""
        rows = self.rows
        if out is None:
            view = self.made(name, (*self.shape, rows.classes), checks.gradient_dtype(rows.dtype))
        else:
            view = self.on_device(out, "out")
            if library_of(out, self.machine).is_read_only(out):
                raise ValueError("out must not be read-only")
        own = checks.gradient_dtype(rows.dtype)
        if view.shape != (*self.shape, rows.classes) or view.dtype not in (own, self.real):
            raise ValueError(
                f"out on a device must be {own} or {self.real} of shape {(*self.shape, rows.classes)}; got "
                f"{view.dtype} of shape {view.shape}"
            )
        written = resident.as_rows(view)
        same = (written.address, written.stride, written.dtype) == (rows.address, rows.stride, rows.dtype)
        beside = overlapped(self.spans, (written.address, written.end))
        if beside == "logits" and not same:
            raise ValueError("out must be the logits themselves or not overlap them")
        if beside not in (None, "logits"):
            raise ValueError(f"out must not overlap {beside}, which are read while it is written")
        return written


def _extent(view):
    """Bytes from the first to behind the last of an array whose steps are not negative."""
    if 0 in view.shape:
        return 0
    return view.dtype.itemsize + sum((size - 1) * step for size, step in zip(view.shape, view.steps, strict=True))


def overlapped(spans, out):
    """The name of an array, other than ``out``, that has bytes of it: of several not the logits; None if none has."""
    names = [name for name, (start, end) in spans.items() if name != "out" and start < out[1] and out[0] < end]
    return names[-1] if names else None


def known(given, options, library, slot, handle):
    """``key, addresses, plan``: all that the steps of a call depend on but for addresses, these by name, and its `Plan`
    if a call like it has been carried out; of arrays by name, and ``options`` that are hashable. None for a key where a
    plan could not tell enough of an array.
    """
    like, addresses = type(given["logits"]), {}
    seen: list[Any] = []
    for name, array in given.items():
        if array is None:
            seen.append(None)
        elif type(array) is like and (library.one_stream or library.stream(array) == handle):
            addresses[name], about = library.glance(array)
            seen.append((name, about))
        elif isinstance(array, int | float):
            seen.append(array)
        else:
            return None, {}, None
    in_place = addresses.get("out") == addresses["logits"]
    key = like, id(slot), tuple(seen), options, in_place
    try:
        return key, addresses, _PLANS.get(key)
    except TypeError:
        return None, {}, None


def carried_out(about, like, library, slot, carry_out):
    """The caller's new arrays by name, and the `note` of the call that `known` tells ``about``: by its plan, or by
    ``carry_out``, which makes a `Call`, asks all of its stream and returns it.
    """
    key, addresses, plan = about
    if plan is not None and plan.pieces == slot.pieces and plan.may_write(addresses):
        made = {}
        for name, of_new in plan.new.items():
            made[name] = array = library.empty(like, *of_new)
            addresses[name] = library.address(array)
        plan.ask(slot.stream, addresses)
        return made, plan.note
    machine = slot.machine
    slot.machine = recorder = Recorder(machine)
    try:
        call = carry_out()
        call.let_go()
    finally:
        slot.machine = machine
    if key is not None:
        if len(_PLANS) >= _MOST:
            _PLANS.clear()
        lengths = {name: end - start for name, (start, end) in call.spans.items()}
        _PLANS[key] = Plan(recorder.steps, call.new, call.note, slot.pieces, lengths)
    return call.arrays, call.note
