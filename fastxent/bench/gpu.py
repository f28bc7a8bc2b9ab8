"""The suite of a GPU: its kernels right first, every verb in every format and with every option, then fast.

It is a list of `Unit`s. Whatever fails, a kernel or another library, is a line that says so; the suite goes on.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import fastxent
from fastxent.backends.cuda.run import runner
from fastxent.bench import gpu_bars, gpu_checks, gpu_figures, gpu_peers, gpu_times
from fastxent.bench.cases import GPU_SHAPES
from fastxent.bench.gpu_record import LEFT_OUT, Check, Device, Time, failed

UNTIL, _CHECKING = 7.5 * 60, 4 * 60.0  # seconds of the whole suite, with half a minute to spare, and of its checks
DTYPES = ("bfloat16", "float32")
OPTION_SHAPE = (16_384, 32_000)
_SOFTWARE = (
    "numba", "numba-cuda", "cuda-core", "cuda-bindings", "torch", "triton", "liger-kernel", "quack-kernels",
    "flash-attn", "cupy-cuda13x", "cupy-cuda12x",
)  # fmt: skip


class Unit(NamedTuple):
    """``work``, given all that has been found before, gives what it finds; ``line`` is what there is to say of it where
    it cannot, with a note. It is left out once the suite has run ``until`` so many seconds.
    """

    line: Check | Time | Device
    work: Callable[[list[Any]], list[Any]]
    until: float

    def found(self, before, start):
        """What it finds, or why it finds nothing."""
        if time.monotonic() > start + self.until:
            return [replace(self.line, note=LEFT_OUT)]
        try:
            return self.work(before)
        except Exception as failure:
            return [replace(self.line, note=failed(failure))]


def units(shapes=GPU_SHAPES, option_shape=OPTION_SHAPE, dtypes=DTYPES, checked=None, until=UNTIL):
    """Every `Unit`, in order."""
    yield Unit(Device(), lambda before: [_device()], until)
    for problem, check in gpu_checks.each() if checked is None else checked:
        yield Unit(Check(problem), functools.partial(_checked, check), min(_CHECKING, until))
    about = gpu_times.ASKED_SHAPE, gpu_times.ASKED_DTYPE, gpu_bars.HOST
    yield Unit(Time("", *about), lambda before: gpu_times.time_asking(runner().machine), until)
    for dtype in dtypes:
        for label, named in gpu_times.options_of(option_shape[1]).items():
            yield _timed(option_shape, dtype, label, until, **named)
    for shape in shapes:
        for dtype in dtypes:
            yield _timed(shape, dtype, gpu_bars.OURS, until)
    for shape in shapes:
        for dtype in dtypes:
            for peer in gpu_peers.NAMES:
                work = functools.partial(_peer, peer, shape, dtype)
                yield Unit(Time("", shape, dtype, peer), work, until)


def is_well():
    """Whether the device still does what it is asked: after an access that it refuses it does nothing any more."""
    try:
        machine = runner().machine
        with machine.current():
            machine.wait(machine.stream_of(0))
    except Exception:
        return False
    return True


def _device():
    machine = runner().machine
    return Device(machine.name, machine.architecture, tuple(_versions()))


def _versions():
    for name in _SOFTWARE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _checked(check, before):
    with gpu_figures.checked(runner().machine):
        return [check()]


def _timed(shape, dtype, label, until, **named):
    def work(before):
        return gpu_times.time_calls(runner().machine, shape, dtype, label, **named)

    return Unit(Time("", shape, dtype, label), work, until)


def _peer(peer, shape, dtype, before):
    """Beside a copy that has been timed."""
    copy = gpu_bars.COPY, shape, dtype
    for one in before:
        if isinstance(one, Time) and one.seconds and (one.operation, one.shape, one.dtype) == copy:
            return gpu_peers.time_peer(peer, shape, dtype, one.seconds.median)
    return [Time("", shape, dtype, peer, note="left out: no copy of this shape has been timed")]


def record(found):
    """What the JSON file says of all that was found."""
    times = [one for one in found if isinstance(one, Time)]
    device = next((one for one in found if isinstance(one, Device)), Device(note="not known"))
    bars = list(gpu_bars.of(times))
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.name or device.note,
        "compute_capability": list(device.architecture),
        "software": dict(device.software),
        "fastxent": fastxent.__version__,
        "checks": [_as_dict(one) for one in found if isinstance(one, Check)],
        "times": [asdict(one) for one in times],
        "bars": [asdict(bar) | {"met": bar.met, "said": str(bar)} for bar in bars],
    }


def _as_dict(check):
    """JSON knows no infinity: a figure with a number missing has none."""
    errors = {figure: None if error == float("inf") else error for figure, error in check.errors}
    return {"problem": check.problem, "errors": errors, "right": check.right, "note": check.note}
