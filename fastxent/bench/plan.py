"""What a comparison was asked for, checked, and how it shares its seconds out. Nothing here measures but the clock."""

import contextlib
import itertools
import time
from dataclasses import dataclass, field

import fastxent
from fastxent.bench import candidates, linear
from fastxent.bench.cases import HIDDEN_SHAPES, SHAPES, SUITE_SHAPES

OPERATIONS = {"loss": candidates.LOSS, "loss and gradient": candidates.LOSS_AND_GRADIENT}
LINEAR = {"linear loss": linear.LOSS, "linear loss and gradients": linear.LOSS_AND_GRADIENTS}
DTYPES = ("float32", "float64", "bfloat16", "float16")
_HIDDEN_DTYPES = ("float32", "float64")
# seconds: libraries are imported and compiled once, then so many for each problem; six take less than two minutes
_TO_BEGIN, _A_PROBLEM, _A_PRODUCT = 30.0, 12.0, 120.0  # the last where hidden states are multiplied


@dataclass(frozen=True)
class Plan:
    """Problems are these shapes, dtypes and numbers of threads times the operations."""

    shapes: tuple[tuple[int, ...], ...]
    gradients: tuple[bool, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    candidates: frozenset[str]

    def __len__(self):
        return len(self.shapes) * len(self.gradients) * len(self.dtypes) * len(self.threads)

    def usual_seconds(self):
        """What it takes where nobody says."""
        a_shape = sum(_A_PRODUCT if len(shape) == 3 else _A_PROBLEM for shape in self.shapes)
        return _TO_BEGIN + a_shape * len(self) / len(self.shapes)

    @classmethod
    def read(cls, shapes=None, op=None, dtypes=None, threads=None, backends=None, peers=None, suite=None):
        """The plan of the arguments of `fastxent.bench.compare`; a ValueError says what cannot be asked."""
        if suite is not None:
            _check("suite", [suite], ("cpu", "linear"))
            shapes = shapes or (SUITE_SHAPES if suite == "cpu" else HIDDEN_SHAPES)
        if suite == "cpu":
            dtypes, threads = dtypes or DTYPES, threads or (1, None)
        if op is not None:
            _check("op", [op], ("loss", "gradient"))
        shapes, dtypes = _read_shapes(shapes or SHAPES), tuple(dict.fromkeys(dtypes or ("float32",)))
        _check("dtype", dtypes, DTYPES)
        halves = [dtype for dtype in dtypes if dtype not in _HIDDEN_DTYPES]
        if halves and any(len(shape) == 3 for shape in shapes):
            raise ValueError(f"hidden states are compared in float32 or float64, as BLAS has no {' or '.join(halves)}")
        gradients = {None: (False, True), "loss": (False,), "gradient": (True,)}[op]
        return cls(shapes, gradients, dtypes, _read_threads(threads), _read_candidates(backends, peers))


def _read_shapes(shapes):
    shapes = tuple(dict.fromkeys(tuple(int(length) for length in shape) for shape in shapes))
    for shape in shapes:
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"a shape must be (rows, classes) or (rows, width, classes), all positive; got {shape}")
    return shapes


def _read_threads(threads):
    most = fastxent.get_num_threads()
    threads = tuple(dict.fromkeys(most if number is None else number for number in threads or (None,)))
    if not all(1 <= number <= most for number in threads):
        raise ValueError(f"threads must lie in [1, {most}]; got {', '.join(map(str, threads))}")
    return threads


def _read_candidates(backends, peers):
    """The names of rows; the backend cpu brings that of new memory."""
    ours = candidates.BACKENDS
    own = {*ours.values(), candidates.NEW_MEMORY}
    every = dict.fromkeys(itertools.chain(*OPERATIONS.values(), *LINEAR.values()))
    others = [name for name in every if name not in own]
    backends, peers = (ours if backends is None else tuple(backends)), (others if peers is None else tuple(peers))
    _check("backend", backends, ours)
    _check("peer", peers, others)
    with_new_memory = [candidates.NEW_MEMORY] if "cpu" in backends else []
    return frozenset([*(ours[name] for name in backends), *with_new_memory, *peers])


def _check(name, values, allowed):
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass
class Clock:
    """The seconds a comparison may take, shared out over the problems that are left."""

    seconds: float
    problems: int
    started: float = field(default_factory=time.monotonic)
    # what each candidate took to be set up and checked, and on how many elements: the last time of each kind of problem
    _setups: dict[str, dict[tuple, tuple[float, int]]] = field(default_factory=dict)

    @property
    def taken(self):
        """Seconds since it all began."""
        return time.monotonic() - self.started

    def share(self):
        """Seconds for the next problem."""
        self.problems -= 1
        return max(0.0, self.seconds - self.taken) / (self.problems + 1)

    def expected(self, candidate, kind, elements):
        """Seconds that setup and checks of ``candidate`` may take on so many elements of a ``kind`` of problem.

        By those on the last problem of the kind, else the last of any: less where there were more elements, but no
        more where there were fewer, as most of a small problem's time may have been an import.
        """
        setups = self._setups.get(candidate)
        if not setups:
            return 0.0
        seconds, on = setups.get(kind) or next(reversed(setups.values()))
        return seconds * min(1.0, elements / on)

    @contextlib.contextmanager
    def setup(self, candidate, kind, elements):
        """Note how long setup and checks of ``candidate`` take."""
        start = time.monotonic()
        yield
        setups = self._setups.setdefault(candidate, {})
        setups.pop(kind, None)
        setups[kind] = time.monotonic() - start, elements
