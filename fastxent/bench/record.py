"""What a comparison found, as data: it is written to JSON and read back, and every table and picture is drawn from it.

Nothing here measures; times are seconds, sizes bytes, errors shares of the exact value unless they are called ulps.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

NOISY = 0.25  # interquartile range over median, of a limit, beyond which a machine is too noisy to tell much
FEW_ROUNDS = 3  # fewer tell nothing of what the machine did meanwhile


@dataclass(frozen=True, slots=True)
class Seconds:
    """The least, the median and the quartiles of the seconds that so many rounds took; 0 rounds where the median alone
    was kept, and stands for all.
    """

    least: float
    low: float
    median: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples):
        """Of a list of seconds, one a round."""
        low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
        return cls(min(samples), low, median, high, len(samples))

    @property
    def noise(self):
        """The interquartile range over the median; None, not known, of fewer than `FEW_ROUNDS`."""
        return (self.high - self.low) / self.median if self.rounds >= FEW_ROUNDS else None

    def overlaps(self, other):
        """Whether the two interquartile ranges share a point: then nobody can say which is the faster."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class Problem:
    """An operation on logits of ``shape``, (rows, classes) or, of hidden states, (rows, width, classes)."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    threads: int

    def __str__(self):
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.operation}, {lengths(self.shape)} {self.dtype}, {threads}"


@dataclass(frozen=True, slots=True)
class Limit:
    """What no candidate can beat, ``name`` of read, copy, product or products, in the same rounds as the candidates."""

    problem: Problem
    name: str
    seconds: Seconds
    gigabytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One candidate on one problem; without seconds its note says that it is wrong, absent or left out.

    ``of_limit`` is the median of the limit over the candidate's, ``to_fastest_peer`` its median over that of the
    fastest candidate that is not ours, ``level_with_peer`` whether their quartiles overlap. ``worst_error`` is that of
    the rows checked in units of a row's largest entry, or of 1 (nat, probability) where that is less; ``row_error``
    the sum of a row's errors in units of the sum of its entries, or of 1, which sees the small ones; ``worst_ulps``
    that of any of their normal numbers in units of its last place, in the dtype of the result; ``confident_error`` the
    worst relative error on rows whose target is far above the rest. ``extra_bytes`` is what resident memory rises by in
    one call. None is what was not measured, does not apply, or is no number.
    """

    problem: Problem
    candidate: str
    seconds: Seconds | None = None
    ns_per_element: float | None = None
    gigabytes_per_second: float | None = None
    of_limit: float | None = None
    to_fastest_peer: float | None = None
    level_with_peer: bool = False
    extra_bytes: int | None = None
    worst_error: float | None = None
    row_error: float | None = None
    worst_ulps: float | None = None
    confident_error: float | None = None
    same_bits_twice: bool | None = None
    same_bits_across_threads: bool | None = None
    note: str = ""

    @property
    def is_ours(self):
        """Whether it is a backend of this package, or a bridge."""
        return self.candidate.startswith("fastxent")


@dataclass(frozen=True, slots=True)
class Confident:
    """Relative errors of one candidate on rows whose target is ``margins`` above the largest other logit."""

    operation: str
    dtype: str
    candidate: str
    margins: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How fast our own loss goes over logits that lie in the cache: what arithmetic alone allows."""

    dtype: str
    threads: int
    elements_per_second: float


@dataclass(frozen=True)
class Comparison:
    """What `fastxent.bench.compare` found; printing it shows its tables.

    Attributes
    ----------
    machine : dict
        Processor, cores, and the versions of everything that was measured.
    measured : str
        When, in UTC.
    seconds : float
        How long it all took.
    limits : tuple of Limit
        One a problem.
    cells : tuple of Cell
        One a candidate and problem.
    confident : tuple of Confident
        Errors against margin.
    arithmetic : tuple of Arithmetic
        The ceilings of the roofline beside memory.
    """

    machine: dict[str, Any]
    measured: str
    seconds: float
    limits: tuple[Limit, ...]
    cells: tuple[Cell, ...]
    confident: tuple[Confident, ...] = ()
    arithmetic: tuple[Arithmetic, ...] = ()

    def __str__(self):
        from fastxent.bench import terminal

        return terminal.text(self)

    @property
    def noise(self):
        """The worst interquartile range over the median of any limit: what the machine did beside us; None where there
        were too few rounds to know.
        """
        return max((limit.seconds.noise for limit in self.limits if limit.seconds.noise is not None), default=None)

    def of(self, problem):
        """The cells of one problem."""
        return [cell for cell in self.cells if cell.problem == problem]

    def to_json(self, path=None):
        """The record as JSON text; written to the file ``path`` too where one is given.

        Examples
        --------
        >>> from fastxent.bench import Comparison
        >>> nothing = Comparison({}, "2026-01-01 00:00 UTC", 0.0, (), ())
        >>> Comparison.from_json(nothing.to_json()) == nothing
        True
        """
        values = {"noise": self.noise} | vars(self)
        parts = [f" {json.dumps(name)}: {_lines(value)}" for name, value in values.items()]
        text = "{\n" + ",\n".join(parts) + "\n}\n"
        if path is not None:
            Path(path).write_text(text, "utf-8")
        return text

    @classmethod
    def from_json(cls, text):
        """The record of such a text."""
        record = json.loads(text)
        record.pop("noise")
        record["limits"] = tuple(_raised(Limit, one) for one in record["limits"])
        record["cells"] = tuple(_raised(Cell, one) for one in record["cells"])
        record["confident"] = tuple(
            Confident(**one | {name: tuple(one[name]) for name in ("margins", "errors")}) for one in record["confident"]
        )
        record["arithmetic"] = tuple(Arithmetic(**one) for one in record["arithmetic"])
        return cls(**record)

    def markdown(self):
        """The tables as Markdown."""
        from fastxent.bench import report

        return report.markdown(self)

    def html(self):
        """A page with pictures and tables, which needs no network.

        Raises
        ------
        fastxent.page.MissingPackageError
            Without Matplotlib or Jinja.
        """
        from fastxent.bench import page

        return page.render(self)

    def svg(self):
        """The bars of every problem as one picture.

        Raises
        ------
        fastxent.page.MissingPackageError
            Without Matplotlib.
        """
        from fastxent.bench import pictures

        return pictures.bars(self)


def lengths(shape):
    """A shape in words: 512 x 32,000."""
    return " x ".join(f"{length:,}" for length in shape)


def _lines(value):
    """JSON with an element of a list a line, so that two records can be compared line by line."""
    if isinstance(value, tuple) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(_flat(one), allow_nan=False)}" for one in value) + "\n ]"
    return json.dumps(value)


def _flat(one):
    """A part as a dictionary, its problem's fields, if it has one, beside its own."""
    values = asdict(one)
    return values.pop("problem", {}) | values


def _raised(kind, values):
    """The cell or limit of such a dictionary."""
    about = {field.name: values.pop(field.name) for field in fields(Problem)}
    problem = Problem(**about | {"shape": tuple(about["shape"])})
    seconds = values["seconds"] and Seconds(**values["seconds"])
    return kind(problem, **values | {"seconds": seconds})
