"""What the suite of a GPU finds, a line each: checks of kernels, and times. Nothing here needs a GPU."""

from dataclasses import dataclass

from fastxent.bench import checking, report
from fastxent.bench.record import Seconds, lengths

LEFT_OUT = "left out: the suite has had its minutes"


@dataclass(frozen=True, slots=True)
class Device:
    """The device, and versions of what uses it; nothing but a note where it is not known."""

    name: str = ""
    architecture: tuple[int, ...] = ()
    software: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def __str__(self):
        return self.name or f"the device: {self.note}"


@dataclass(frozen=True, slots=True)
class Check:
    """Kernels on one problem: the worst error of each figure in units of what is allowed, or why there are none."""

    problem: str
    errors: tuple[tuple[str, float], ...] = ()
    note: str = ""

    @classmethod
    def of(cls, problem, figures):
        """Of figures: a name, what was got, what is wanted, what is promised, and of what."""
        errors: dict[str, float] = {}
        for figure, *found in figures:
            errors[figure] = max(errors.get(figure, 0.0), checking.units(*found))
        return cls(problem, tuple(errors.items()))

    @property
    def worst(self):
        """The largest of the errors and its figure; infinite where the check failed."""
        return max(((error, figure) for figure, error in self.errors), default=(float("inf"), ""))

    @property
    def right(self):
        """Whether all are within the promise; None where there was no time to know."""
        return None if self.note == LEFT_OUT else not self.note and self.worst[0] <= 1.0

    def __str__(self):
        error, figure = self.worst
        return f"{self.problem}: {self.note or f'{figure} off by {error:.2g} of what is allowed'}"


@dataclass(frozen=True, slots=True)
class Time:
    """One candidate on one shape; ``of_ceiling`` is the time of copying as many bytes over its own."""

    operation: str
    shape: tuple[int, int]
    dtype: str
    candidate: str
    seconds: Seconds | None = None
    of_ceiling: float | None = None
    note: str = ""

    @classmethod
    def of(cls, operation, about, seconds, copied):
        """The time ``seconds`` of something that moves what a copy takes ``copied`` seconds for."""
        shape, dtype, candidate = about
        return cls(operation, shape, dtype, candidate, seconds, copied / seconds.median)

    def __str__(self):
        said = f"{lengths(self.shape)} {self.dtype}, {self.candidate or 'everything'}"
        if self.operation:
            said = f"{said}, {self.operation}"
        if self.seconds is None:
            return f"{said}: {self.note}"
        least, noise = report.seconds(self.seconds.least), report.spread(self.seconds)
        said = f"{said}: {report.seconds(self.seconds.median)} (min {least}{f', IQR {noise}' if noise else ''})"
        return said if self.of_ceiling is None else f"{said}, {report.share(self.of_ceiling)} of a copy"


def failed(failure):
    """The note of whatever went wrong."""
    return f"failed: {type(failure).__name__}: {failure}"[:200]
