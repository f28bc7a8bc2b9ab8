"""Check, then time: every candidate against the reference first, and only a right one against the clock."""

import platform
from dataclasses import dataclass
from functools import partial

import numpy as np

import fastxent
from fastxent.bench import candidates, limits, timing
from fastxent.bench.cases import speed_case

OPERATIONS = {"loss": candidates.LOSS, "loss and gradient": candidates.LOSS_AND_GRADIENT}
_CHECKED = 64  # rows compared with the reference
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@dataclass(frozen=True, slots=True)
class Cell:
    """One candidate on one problem; without a time its note says that it is wrong or absent.

    ``worst_error`` is against float64 on the first rows, in units of the row's largest entry.
    """

    operation: str
    shape: tuple[int, int]
    dtype: str
    candidate: str
    seconds: float | None
    of_limit: float | None
    worst_error: float | None
    note: str


def compare(shapes, dtype="float32", rounds=7):
    """Compare every candidate over ``shapes`` of (rows, classes), yielding a list of `Cell` for each operation.

    The limit is reading the logits once for a loss, copying them for a loss with its gradient, timed in the same
    interleaved rounds; ``of_limit`` is the limit's time over the candidate's.
    """
    for rows, classes in shapes:
        logits, targets, _ = speed_case(rows, classes, dtype).build()
        out = np.empty_like(logits)
        yield _compare("loss", logits, targets, partial(limits.read, logits), rounds)
        yield _compare("loss and gradient", logits, targets, partial(limits.copy, logits, out), rounds)


def machine():
    """What a table of times must say beside them."""
    import numba

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123
            model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "threads": numba.get_num_threads(),
        "fastxent": fastxent.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
    }


def _compare(operation, logits, targets, limit, rounds):
    table = OPERATIONS[operation]
    ready, notes, errors = {"limit": limit}, {}, {}
    want = _reference(operation, logits[:_CHECKED], targets[:_CHECKED], len(logits))
    for name, setup in table.items():
        try:
            run = setup(logits, targets)
            errors[name] = _worst(run()[:_CHECKED], want)
        except ImportError as missing:
            notes[name] = f"absent: needs {missing.name}: pip install fastxent[peers]"
            continue
        if errors[name] <= _TOLERANCE[logits.dtype.name]:
            ready[name] = run
        else:
            notes[name] = "wrong"
    seconds = timing.interleaved(ready, rounds)
    return [
        Cell(
            operation,
            logits.shape,
            logits.dtype.name,
            name,
            seconds.get(name),
            seconds["limit"] / seconds[name] if name in seconds else None,
            errors.get(name),
            notes.get(name, ""),
        )
        for name in table
    ]


def _reference(operation, logits, targets, rows):
    if operation == "loss":
        return fastxent.cross_entropy(logits.astype(np.float64), targets, reduction="none", backend="reference")
    return fastxent.cross_entropy_grad(logits.astype(np.float64), targets, denominator=rows, backend="reference")


def _worst(got, want):
    """The largest error of a row in units of its largest entry."""
    got, want = np.atleast_2d(np.asarray(got, np.float64).T).T, np.atleast_2d(want.T).T
    return float((np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)).max())
