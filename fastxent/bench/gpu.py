"""The CUDA kernels on the GPU at hand: right first, in every format and with every option, then fast.

Times are those of kernels on logits that are on the device; the ceiling is a copy within its memory in the same run.
"""

import functools
import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import fastxent
from fastxent import backends, checks
from fastxent.backends.cuda.run import runner
from fastxent.bench.cases import Case
from fastxent.state import IGNORED, Coefficients, Spread

_SECONDS = 7.5 * 60  # the whole suite, with half a minute to spare
_ROUNDS, _WARM = 20, 3

# a row of a warp, of a block, of two strips and of many, with ragged ends; and of more than wait for each other
CHECKED_CLASSES, MANY_CLASSES = (40, 2001, 50_257, 300_001), 2_200_001
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weights": True, "label_smoothing": 0.1},
    "ignored": {"ignored": 0.5},
    "z-loss": {"z_loss": 1e-3},
    "softcap": {"softcap": 30.0, "temperature": 0.8},
    "probabilities": {"targets": "dense", "weights": True},
    "sparse": {"targets": "sparse", "label_smoothing": 0.1},
}
# of the loss, and of a gradient entry in units of its row's largest: the reference is float64 itself
_BUDGETS = {"float32": (5e-7, 1e-6), "float64": (1e-12, 1e-12)}

# (rows, classes): a gigabyte of bfloat16 or more, but for the second, which is small, and the last, of few rows
GRID = (
    (65_536, 8192), (4096, 32_000), (32_768, 32_000), (16_384, 50_257), (8192, 128_256), (4096, 262_144),
    (1_048_576, 1000), (4_194_304, 256), (8, 262_144),
)  # fmt: skip
TIMED_DTYPES = ("bfloat16", "float32")
OPTION_SHAPE = (16_384, 32_000)


cuda_with_grad = functools.partial(fastxent.cross_entropy_with_grad, backend="cuda")
_reference_with_grad = functools.partial(fastxent.cross_entropy_with_grad, backend="reference")


@dataclass(frozen=True, slots=True)
class Check:
    """One kernel on one problem; errors in units of what is allowed."""

    problem: str
    loss_error: float
    gradient_error: float

    @property
    def right(self):
        """Whether both are within the promise."""
        return self.loss_error <= 1.0 and self.gradient_error <= 1.0


@dataclass(frozen=True, slots=True)
class Time:
    """One candidate on one shape; ``of_ceiling`` is the time of copying as many bytes over its own."""

    operation: str
    shape: tuple[int, int]
    dtype: str
    candidate: str
    seconds: float | None = None
    of_ceiling: float | None = None
    note: str = ""


def check_all(dtypes=checks.DTYPES, classes=CHECKED_CLASSES, seed=None):
    """A `Check` of every format, option and layout, on inputs nobody has seen before unless ``seed`` says which."""
    fresh = np.random.default_rng(seed)
    for dtype in map(np.dtype, dtypes):
        for width in classes:
            for name, options in OPTIONS.items():
                yield _check(dtype, width, name, dict(options), fresh)


def check_many_strips():
    """Rows that are read again for their gradient."""
    for dtype in TIMED_DTYPES:
        yield _check(np.dtype(dtype), MANY_CLASSES, "plain", {}, np.random.default_rng())


def _check(dtype, classes, name, options, fresh):
    named = {key: options.pop(key) for key in ("weights", "ignored", "targets") if key in options}
    case = Case(5, classes, "wide", dtype.name, options=tuple((options | {"reduction": "none"}).items()), **named)
    logits, targets, options = case.build()
    logits = (logits[:, fresh.permutation(classes)] * fresh.uniform(0.5, 1.5)).astype(dtype)
    outs = [np.full(logits.shape, np.nan, kind) for kind in (checks.loss_dtype(dtype), np.float64)]
    (loss, gradient), (want, exact) = (
        with_grad(logits, targets, out=out, **options)
        for out, with_grad in zip(outs, (cuda_with_grad, _reference_with_grad), strict=True)
    )
    of_loss, of_gradient = _BUDGETS[loss.dtype.name]
    if "softcap" in options:
        of_loss, of_gradient = of_loss + 1e-5, of_gradient + 1e-5
    with np.errstate(invalid="ignore", divide="ignore"):
        losses = np.abs(loss - want) / (of_loss * np.maximum(np.abs(want), np.finfo(loss.dtype).tiny))
        most = np.maximum(np.abs(exact).max(axis=1, keepdims=True), np.finfo(loss.dtype).tiny)
        entries = np.abs(gradient - exact) / (of_gradient * most)
    worst = [float(np.where(np.isnan(error), np.inf, error).max()) for error in (losses, entries)]
    return Check(f"{case.name}-{name}", *worst)


class Problem:
    """Logits, targets and room for results on the device, for kernels that are timed."""

    def __init__(self, machine, rows, classes, dtype, ignored=0.0, options=None):
        from fastxent.backends.cuda.stream import Slot

        self.rows, self.classes, self.dtype = rows, classes, np.dtype(dtype)
        self.options = {"spread": None, "softcap": None} | (options or {})
        self.slot = Slot(machine)
        self.size = rows * classes * self.dtype.itemsize
        rng = np.random.default_rng(0)
        piece = min(self.size, 1 << 26) // self.dtype.itemsize
        part = (4 * rng.standard_normal(piece, np.float32)).astype(self.dtype)
        self.logits, self.out = machine.reserve(self.size), machine.reserve(self.size)
        source = self.slot.upload("part", part)
        for start in range(0, self.size, part.nbytes):
            machine.copy(self.slot.stream, source, self.logits + start, min(part.nbytes, self.size - start))
        self.targets = np.where(rng.random(rows) < ignored, IGNORED, rng.integers(0, classes, rows))

    def release(self):
        """Give the device its memory back."""
        self.slot.machine.wait(self.slot.stream)
        self.slot.machine.unreserve(self.logits)
        self.slot.machine.unreserve(self.out)
        self.slot.release()

    def prepared(self):
        """``copy, loss, gradient``: what each asks of the device."""
        from fastxent.backends.cuda import launches
        from fastxent.backends.cuda.kernels import Rows, Written
        from fastxent.backends.cuda.run import coefficients_of, kind_of, results_of, scaling_of, shares_of

        slot, machine, every = self.slot, self.slot.machine, slice(0, self.rows)
        spread, scaling = self.options["spread"], scaling_of(self.dtype, self.options["softcap"], 1.0)
        kind = kind_of(machine, self.dtype, self.classes, self.targets, scaling, spread)
        places = slot.upload("targets", self.targets, np.int64), slot.zeros("flag", 1)
        strips = -(-self.classes // kind.strip)
        given = Rows(self.logits, self.classes, places[0], self.rows, self.classes, strips, places[1])
        shares = shares_of(slot, every, spread, kind, checks.loss_dtype(self.dtype), self.classes)
        results = results_of(slot, self.rows, ("nll", "gap") if spread else ("nll",))
        one, nothing = np.full(1, 1.0 / self.rows), np.zeros(1)
        of_loss = coefficients_of(slot, Coefficients(one, nothing if spread is None else one, nothing, nothing))
        place, how = Written(self.out, self.classes), {"written": self.dtype.name}
        return (
            lambda: machine.copy(slot.stream, self.logits, self.out, self.size),
            lambda: launches.statistics(slot, kind, given, shares, scaling, results),
            lambda: launches.entries(slot, kind, given, shares, of_loss, scaling, results, place, False, **how),
        )

    def seconds(self, body):
        """The median of some rounds, after some that warm it."""
        machine, stream = self.slot.machine, self.slot.stream
        for _ in range(_WARM):
            body()
        return statistics.median(machine.seconds(stream, body) for _ in range(_ROUNDS))


def time_kernels(machine, rows, classes, dtype, label="fastxent", **named):
    """Two `Time` of one shape: the loss, and the loss with its gradient, beside a copy of the same bytes."""
    problem = Problem(machine, rows, classes, dtype, **named)
    try:
        copy, loss, gradient = map(problem.seconds, problem.prepared())
    finally:
        problem.release()
    about = (rows, classes), np.dtype(dtype).name, label
    return [
        Time("loss", *about, loss, copy / 2 / loss),
        Time("loss and gradient", *about, gradient, copy / gradient),
    ], copy


def time_options(machine, rows: int, classes: int, dtype: str):
    """The same shape with each option."""
    weight = np.linspace(0.5, 1.5, classes)
    each: dict[str, dict[str, Any]] = {
        "plain": {},
        "smoothing": {"options": {"spread": Spread(np.ones(1), None, 0.0, 1.0)}},
        "weights and smoothing": {"options": {"spread": Spread(weight, None, 0.0, 1.0)}},
        "softcap": {"options": {"softcap": 30.0}},
        "90% ignored": {"ignored": 0.9},
    }
    for label, named in each.items():
        yield from time_kernels(machine, rows, classes, dtype, label, **named)[0]


def run(shapes=GRID, option_shape: tuple[int, int] = OPTION_SHAPE, dtypes=TIMED_DTYPES, checked=None):
    """Yield every `Check`, then every `Time`, until the suite's minutes are over.

    Raises
    ------
    fastxent.backends.BackendUnavailableError
        Where there is no GPU.
    """
    from fastxent.bench.gpu_peers import NAMES, time_peer

    backends.get("cuda")
    machine, until = runner().machine, time.monotonic() + _SECONDS
    yield from itertools.chain(check_all(), check_many_strips()) if checked is None else checked
    for dtype in dtypes:
        yield from time_options(machine, *option_shape, dtype)
    for rows, classes in shapes:
        for dtype in dtypes:
            if time.monotonic() > until:
                yield Time("", (rows, classes), dtype, "", note="left out: the suite has had its minutes")
                continue
            times, copy = time_kernels(machine, rows, classes, dtype)
            yield from times
            for peer in NAMES:
                yield from time_peer(peer, rows, classes, dtype, copy)


def record(found):
    """What the JSON file says of checks and times."""
    machine = runner().machine
    return {
        "device": machine.name,
        "compute_capability": list(machine.architecture),
        "fastxent": fastxent.__version__,
        "checks": [asdict(one) | {"right": one.right} for one in found if isinstance(one, Check)],
        "times": [asdict(one) for one in found if isinstance(one, Time)],
    }
