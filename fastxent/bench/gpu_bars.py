"""What is asked of the kernels on an H200, and whether the times that the suite has found meet it."""

from dataclasses import dataclass

from fastxent.backends.cuda.forms import FORMS
from fastxent.bench import report
from fastxent.bench.gpu_record import Time
from fastxent.bench.record import lengths

OURS, COPY, LOSS, GRADIENT, IN_PLACE = "fastxent", "copy", "loss", "loss and gradient", "loss and gradient in place"
HOST = "fastxent, the host's part"
# shares of a copy's speed: of problems of a gigabyte and more, of short rows of as many bytes, of few rows
_OF_LARGE, _OF_SHORT_ROWS, _OF_FEW_ROWS = {LOSS: 0.92, GRADIENT: 0.90, IN_PLACE: 0.90}, 0.80, 0.50
_LARGE, _FEW, _LONG = 1e9, 64, 8192
_SECONDS = {((4096, 32_000), "bfloat16", LOSS): 72e-6, ((4096, 32_000), "bfloat16", GRADIENT): 140e-6}
_HOST_SECONDS = 15e-6
# times the time without
_WITHOUT = "plain"
_OPTIONS = {
    (option, operation): 1.3 if option == "softcap" else 1.05
    for option in ("smoothing", "weights", "z-loss", "10% ignored", "softcap") for operation in (LOSS, GRADIENT)
} | {("90% ignored", LOSS): 0.2}  # fmt: skip
# times as fast as others, with the gradient
_PEERS = {"quack": 1.0, "quack, one read": 1.0, "Liger": 1.5, "torch.compile": 1.5, "torch": 4.0}


@dataclass(frozen=True, slots=True)
class Bar:
    """What is asked of one figure: at least or at most ``bar``, and what was ``measured``, None where it was not."""

    what: str
    measured: float | None
    bar: float
    at_least: bool

    @property
    def met(self):
        """Whether it is; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar

    def __str__(self):
        asked = f"at {'least' if self.at_least else 'most'} {self._shown(self.bar)}"
        if self.met is None:
            return f"{self.what}: not measured; {asked}"
        return f"{self.what}: {self._shown(self.measured)}, {asked}: {'met' if self.met else 'missed'}"

    def _shown(self, number):
        if "seconds" in self.what:
            return report.seconds(number)
        return f"{number:.1%}" if "of a copy" in self.what else f"{number:.2f}"


def of(times):
    """Every `Bar`, of the suite's `fastxent.bench.gpu_record.Time`s, in the order in which those were found."""
    known = {(one.candidate, one.operation, one.shape, one.dtype): one for one in times if one.seconds}
    for one in times:
        if one.candidate == HOST and one.seconds:
            yield Bar(f"{one.operation}, the host's part, seconds", one.seconds.median, _HOST_SECONDS, False)
    seen = dict.fromkeys((one.shape, one.dtype) for one in times if one.candidate == OURS)
    for shape, dtype in seen:
        yield from _of_shape(known, shape, dtype)
    for shape, dtype in dict.fromkeys((one.shape, one.dtype) for one in times if one.candidate == _WITHOUT):
        yield from _of_options(known, shape, dtype)


def _of_shape(known, shape, dtype):
    (rows, classes), at = shape, f"{lengths(shape)} {dtype}"
    for operation, of_large in _OF_LARGE.items():
        ours = known.get((OURS, operation, shape, dtype))
        if rows <= _FEW:
            asked = _OF_FEW_ROWS
        elif rows * classes * FORMS[dtype].itemsize >= _LARGE:
            asked = of_large if classes >= _LONG else _OF_SHORT_ROWS
        else:
            asked = None
        if asked is not None:
            yield Bar(f"{at}, {operation}, of a copy", ours and ours.of_ceiling, asked, True)
        if most := _SECONDS.get((shape, dtype, operation)):
            yield Bar(f"{at}, {operation}, seconds", ours and ours.seconds.median, most, False)
    for peer, least in _PEERS.items():
        theirs = known.get((peer, GRADIENT, shape, dtype))
        measured = _ratio(theirs, known.get((OURS, GRADIENT, shape, dtype)))
        yield Bar(f"{at}, {GRADIENT}, times as fast as {peer}", measured, least, True)


def _of_options(known, shape, dtype):
    def times_without(option, operation):
        with_it, without = (known.get((name, operation, shape, dtype)) for name in (option, _WITHOUT))
        return f"{lengths(shape)} {dtype}, {operation}, {option}, times without", _ratio(with_it, without)

    for (option, operation), most in _OPTIONS.items():
        what, measured = times_without(option, operation)
        yield Bar(what, measured, most, False)


def _ratio(above: Time | None, below: Time | None):
    """Of two medians, where both were measured."""
    if above is None or below is None or above.seconds is None or below.seconds is None:
        return None
    return above.seconds.median / below.seconds.median
