"""Check, then time: every candidate against exact arithmetic first, and only a right one against the clock."""

import contextlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import threadpoolctl

import fastxent
from fastxent.bench import candidates, exact, limits, linear, timing
from fastxent.bench.cases import speed_case

OPERATIONS = {"loss": candidates.LOSS, "loss and gradient": candidates.LOSS_AND_GRADIENT}
LINEAR = {"linear loss": linear.LOSS, "linear loss and gradients": linear.LOSS_AND_GRADIENTS}
_CHECKED = 64  # rows compared with exact arithmetic
# in units of a row's largest entry: what a peer may lose that computes, or rounds, in the dtype of the logits
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "float16": 1e-2, "bfloat16": 4e-2}

# the classes of digits, ImageNet, a small vocabulary, GPT-2's, Llama 3's, Gemma's; 2**24 logits each
SUITE_SHAPES = tuple((max(1, 2**24 // classes), classes) for classes in (10, 1000, 32_000, 50_257, 128_256, 262_144))
SUITE_DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Cell:
    """One candidate on one problem; without a time its note says that it is wrong or absent.

    ``of_limit`` is the time of the limit over the candidate's; ``worst_error`` is that of the first rows in units of a
    row's largest entry, ``worst_ulps`` that of any number in units of its last place, in the dtype of the result. A
    linear loss has three lengths, rows, width and classes, and no gigabytes: its products are arithmetic.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    threads: int
    candidate: str
    seconds: float | None = None
    gigabytes_per_second: float | None = None
    of_limit: float | None = None
    worst_error: float | None = None
    worst_ulps: float | None = None
    note: str = ""


def compare(shapes, dtypes=("float32",), threads=(None,), rounds=7):
    """Compare every candidate over ``shapes`` of (rows, classes), yielding a list of `Cell` for each operation.

    The limit is reading the logits once for a loss, copying them for a loss with its gradient, timed in the same
    interleaved rounds with the same threads; None stands for all.
    """
    for rows, classes in shapes:
        for dtype in dtypes:
            logits, targets, _ = speed_case(rows, classes, dtype).build()
            checked = min(rows, _CHECKED)
            losses, gradient = exact.losses_and_gradient(logits[:checked], targets[:checked])
            out = np.empty_like(logits)
            for number in threads:
                with _threads(number):
                    read, copy = partial(limits.read, logits), partial(limits.copy, logits, out)
                    problem = logits.shape, dtype, (logits, targets)
                    yield _compare("loss", OPERATIONS, *problem, losses, read, rounds, logits.nbytes)
                    yield _compare("loss and gradient", OPERATIONS, *problem, gradient, copy, rounds, 2 * logits.nbytes)


def compare_linear(shapes, dtypes=("float32",), threads=(None,), rounds=5):
    """The same over ``shapes`` of (rows, width, classes): losses of hidden states under an output matrix.

    The limit is the product of the same matrices, and with gradients its three, by NumPy into arrays that are there.
    """
    for shape in shapes:
        for dtype in dtypes:
            problem = linear.build(shape, dtype)
            wanted = linear.expected(*problem)
            for number in threads:
                with _threads(number):
                    each = zip(LINEAR, wanted, linear.limits(*problem[:2]), strict=True)
                    for operation, want, limit in each:
                        yield _compare(operation, LINEAR, shape, dtype, problem, want, limit, rounds)


def machine():
    """What a table of times must say beside them."""
    import numba

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123
            lines = dict(line.split(":", 1) for line in info if ":" in line)
        names = {name.strip(): value.strip() for name, value in lines.items()}
        model = f"{names['model name']} (family {names['cpu family']}, model {names['model']})"
    except (OSError, KeyError):
        pass
    return {
        "processor": model,
        "cores": numba.config.NUMBA_NUM_THREADS,
        "fastxent": fastxent.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
    }


@contextlib.contextmanager
def _threads(number):
    """``number`` threads for Numba, BLAS and, where it is loaded, torch; other candidates ask `get_num_threads`."""
    before = fastxent.get_num_threads()
    torch = sys.modules.get("torch")
    fastxent.set_num_threads(number or before)
    if torch:
        torch.set_num_threads(number or before)
    try:
        with threadpoolctl.threadpool_limits(number, user_api="blas"):
            yield
    finally:
        fastxent.set_num_threads(before)
        if torch:
            torch.set_num_threads(before)


def _compare(operation, operations, shape, dtype, problem, want, limit, rounds, moved=None):
    ready: dict[str, Callable] = {"limit": limit}
    cells: dict[str, dict[str, Any]] = {}
    for name, setup in operations[operation].items():
        try:
            run = setup(*problem)
            got = run()[: len(want)]
        except ImportError as missing:
            cells[name] = {"note": f"absent: needs {missing.name}: pip install fastxent[peers]"}
        except candidates.UnsupportedError as reason:
            cells[name] = {"note": f"absent: {reason}"}
        else:
            error = _worst(got, want)
            cells[name] = {"worst_error": error, "worst_ulps": exact.worst_ulps(got, want)}
            if error <= _TOLERANCE[dtype]:
                ready[name] = run
            else:
                cells[name]["note"] = "wrong"
    seconds = timing.interleaved(ready, rounds)
    for name in ready.keys() - {"limit"}:
        cells[name] |= {
            "seconds": seconds[name],
            "gigabytes_per_second": moved and moved / seconds[name] / 1e9,
            "of_limit": seconds["limit"] / seconds[name],
        }
    about = operation, shape, dtype, fastxent.get_num_threads()
    return [Cell(*about, name, **cell) for name, cell in cells.items()]


def _worst(got, want):
    """The largest error of a row in units of its largest entry."""
    got, want = np.asarray(got, np.longdouble), np.atleast_2d(want.T).T
    return float((np.abs(got.reshape(want.shape) - want).max(axis=1) / np.abs(want).max(axis=1)).max())
