"""What a comparison found, in words and cells of text: the same for a terminal, Markdown and a page."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastxent.bench.record import FEW_ROUNDS, NOISY, Cell, Comparison


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, what it says of a `Cell` that was timed or checked, and when it goes where a terminal is too narrow
    for all of them: the lowest last. One without is in no terminal.
    """

    heading: str
    text: Callable[[Cell], str]
    goes: float = math.inf


def _of_seconds(text):
    return lambda cell: "" if cell.seconds is None else text(cell)


COLUMNS = (
    Column("min", _of_seconds(lambda cell: seconds(cell.seconds.least)), 4),
    Column("median", _of_seconds(lambda cell: seconds(cell.seconds.median)), 0),
    Column("IQR", _of_seconds(lambda cell: spread(cell.seconds)), 6),
    Column("rounds", _of_seconds(lambda cell: str(cell.seconds.rounds))),
    Column("ns/element", lambda cell: number(cell.ns_per_element), 8),
    Column("GB/s", lambda cell: number(cell.gigabytes_per_second), 9),
    Column("of limit", lambda cell: share(cell.of_limit), 2),
    Column("of fastest peer", lambda cell: "~ " * cell.level_with_peer + ratio(cell.to_fastest_peer), 1),
    Column("memory", lambda cell: size(cell.extra_bytes), 7),
    Column("error", lambda cell: error(cell.worst_error)),
    Column("row error", lambda cell: error(cell.row_error)),
    Column("ulp", lambda cell: number(cell.worst_ulps), 3),
    Column("confident", lambda cell: error(cell.confident_error), 5),
    Column("same bits", lambda cell: same_bits(cell), 10),
)
LEGEND = (
    ("IQR", "interquartile range over the median of the rounds"),
    ("of limit", "the time of the limit, in the same rounds with the same threads, over the candidate's"),
    (
        "of fastest peer",
        "time over that of the fastest that is not fastxent; ~ where their quartiles overlap",
    ),
    ("new memory", "ours into new pages for each gradient, as other libraries do; the row fastxent has memory for it"),
    ("memory", "what resident memory rises by in one call"),
    ("ulp", "worst error on 64 rows against exact arithmetic, in units of the last place"),
    ("confident", "worst relative error on rows whose target is 0 to 60 above the rest; 100% is no digit right"),
    ("same bits", "twice: on a repeat; yes: with another number of threads too"),
)


def seconds(value):
    """A time with its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 0.9995 or unit == "us":  # what three digits round to 1
            return f"{value * scale:.3g} {unit}" if value * scale < 999.5 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def spread(taken):
    """The interquartile range over the median; nothing of rounds so few that it says nothing."""
    return "" if taken.noise is None else f"{taken.noise:.0%}"


def number(value):
    """A number of three digits or so; nothing for None."""
    if value is None:
        return ""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def share(value):
    """Per cent."""
    return "" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def ratio(value):
    """So many times."""
    if value is None:
        return ""
    return f"{value:.2g} x" if value < 0.1 else f"{value:.2f} x" if value < 9.995 else f"{value:.0f} x"


def error(value):
    """A relative error: per cent from one per cent on."""
    return "" if value is None else f"{value:.1e}" if value < 0.01 else f"{value:.0%}"


def size(value):
    """Bytes in megabytes."""
    return "" if value is None else f"{value / 1e6:.0f} MB" if value >= 1e6 else "< 1 MB"


def same_bits(cell):
    """What is known of whether results are the same."""
    if cell.same_bits_twice is None:
        return ""
    if not cell.same_bits_twice:
        return "no"
    return {True: "yes", None: "twice", False: "twice only"}[cell.same_bits_across_threads]


def verdict(limit, cells):
    """What the table of one problem says, in a sentence."""
    timed = [cell for cell in cells if cell.seconds is not None]
    ours = min((cell for cell in timed if cell.is_ours), key=_median, default=None)
    peer = min((cell for cell in timed if not cell.is_ours), key=_median, default=None)
    if ours is None:
        return "Nothing of ours was timed."
    said = f"{ours.candidate} runs at {share(ours.of_limit)} of the limit, {limit.name}"
    if peer is not None and ours.seconds.overlaps(peer.seconds):
        said = f"Too noisy to tell {ours.candidate} from {peer.candidate}, the fastest peer; {said}"
    elif peer is not None:
        first, second = sorted((ours, peer), key=_median)
        times = ratio(_median(second) / _median(first)).rstrip(" x")
        fastest = ", the fastest peer" * (second is peer)
        said = f"{first.candidate} is {times} times as fast as {second.candidate}{fastest}; {said}"
    rounds = min(taken.rounds for taken in (limit.seconds, ours.seconds, *([peer.seconds] if peer else [])))
    if rounds < FEW_ROUNDS:
        said += f"; in {rounds} round{'s' * (rounds != 1)}, which is too few to tell: give it more seconds"
    return f"{said}."


def noise(comparison: Comparison):
    """How noisy the machine was, and whether too much so."""
    said = "Noise, the worst interquartile range of a limit over its median: "
    if comparison.noise is None:
        return f"{said}not known, of fewer than {FEW_ROUNDS} rounds."
    said += f"{comparison.noise:.0%}."
    if comparison.noise > NOISY:
        said += " This machine is too noisy to tell much: times drift by that, and only large ratios hold."
    return said


def remarks(limit, cells):
    """The verdict, and which candidates have no time and why; those that are absent are told once, for all problems."""
    yield verdict(limit, cells)
    for cell in cells:
        if cell.note == "wrong":
            yield f"{cell.candidate} is wrong, {_how_wrong(cell)}, and was not timed."
    if names := [cell.candidate for cell in cells if cell.note.startswith("left out")]:
        yield f"No time was left for {', '.join(names)}: --seconds gives more."


def is_absent(cell):
    """Whether the candidate is not installed, cannot do this, or failed."""
    return cell.note.startswith(("absent", "failed"))


def absent(cells):
    """``names, note`` of candidates that are absent, those with one note together."""
    names: dict[str, dict] = {}
    for cell in filter(is_absent, cells):
        names.setdefault(cell.note, {})[cell.candidate] = None
    return [(", ".join(each), note) for note, each in names.items()]


def machine(comparison: Comparison):
    """The machine and the versions on it, in a line."""
    return "; ".join(f"{name} {value}" for name, value in comparison.machine.items())


def gpu(record):
    """The device of the record of a GPU's suite, the versions on it, and when, in a line."""
    capability = ".".join(map(str, record["compute_capability"]))
    software = ", ".join(f"{name} {version}" for name, version in record["software"].items())
    versions = f"fastxent {record['fastxent']}{software and f', {software}'}"
    return f"{record['device']}, compute capability {capability}; {versions}; measured {record['date']}"


def rows(limit, cells, columns=COLUMNS):
    """The texts of a table: of each candidate that was timed, the fastest first, and of the limit."""
    for cell in sorted((cell for cell in cells if cell.seconds), key=_median):
        yield [cell.candidate, *(column.text(cell) for column in columns)]
    taken, speed = limit.seconds, limit.gigabytes_per_second
    as_cell = Cell(limit.problem, limit.name, seconds=taken, gigabytes_per_second=speed)
    yield [f"limit: {limit.name}", *(column.text(as_cell) for column in columns)]


def markdown(comparison: Comparison):
    """Every table with all columns, what it says, and what was measured on."""
    lines = [machine(comparison), "", f"{noise(comparison)} Measured {comparison.measured}.", ""]
    for limit in comparison.limits:
        cells = comparison.of(limit.problem)
        lines += [f"**{limit.problem}**", "", *remarks(limit, cells), ""]
        lines += [f"| | {' | '.join(column.heading for column in COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows(limit, cells)]
        lines.append("")
    lines += [f"- {names}: {note}" for names, note in absent(comparison.cells)]
    return "\n".join(lines) + "\n"


def _how_wrong(cell):
    if cell.worst_error is None or cell.row_error is None:
        return "no number"
    return f"by {error(cell.worst_error)} of a row's largest entry, {error(cell.row_error)} of a row's sum"


def _median(cell):
    return cell.seconds.median
