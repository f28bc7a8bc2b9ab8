"""A comparison as one HTML file that needs no network: figures, pictures, then every column of every table."""

import math

from fastxent import page
from fastxent.bench import pictures, report
from fastxent.bench.record import Seconds, lengths


def render(comparison):
    """The page of a `Comparison` as text; MissingPackageError without Matplotlib or Jinja."""
    drawn = [
        *pictures.bar_panels(comparison),
        *pictures.against_classes(comparison),
        *pictures.rooflines(comparison),
        *pictures.confidence(comparison),
    ]
    subtitle = f"{report.machine(comparison)}. Measured {comparison.measured}, in {comparison.seconds:.0f} s."
    return page.lay_out("Which backend, which peer", subtitle, _figures(comparison), drawn, list(_tables(comparison)))


def _figures(comparison):
    """The best that ours does against peers and limits, and what the machine did beside it."""
    ours = [cell for cell in comparison.cells if cell.candidate == "fastxent" and cell.seconds]
    for operation in dict.fromkeys(cell.problem.operation for cell in ours):
        cells = [cell for cell in ours if cell.problem.operation == operation]
        shares = sorted(cell.of_limit for cell in cells)
        yield f"{operation}: of the limit", _between(shares, report.share)
        faster = sorted(1 / cell.to_fastest_peer for cell in cells if cell.to_fastest_peer)
        if faster:
            yield f"{operation}: times as fast as the fastest peer", _between(faster, lambda value: f"{value:.1f}")
    ulps = [cell.worst_ulps for cell in ours if cell.worst_ulps is not None]
    if ulps:
        yield "worst error, units of the last place", report.number(max(ulps))
    confident = [cell.confident_error for cell in ours if cell.confident_error is not None]
    if confident:
        yield "worst error on confident rows", report.error(max(confident))
    yield "noise of the limits", "not known" if comparison.noise is None else f"{comparison.noise:.0%}"


def _between(values, text):
    first, last = text(values[0]), text(values[-1])
    return first if first == last else f"{first} to {last}"


def _tables(comparison):
    headings = ["", *(column.heading for column in report.COLUMNS)]
    for limit in comparison.limits:
        cells = comparison.of(limit.problem)
        yield str(limit.problem), " ".join(report.remarks(limit, cells)), headings, report.rows(limit, cells)
    if missing := report.absent(comparison.cells):
        yield "Absent", "What brings them is said; fastxent compare takes them in by itself.", ("", ""), missing
    yield "What the columns mean", report.noise(comparison), ("", ""), report.LEGEND


def render_gpu(record):
    """The page of the record of ``fastxent compare --suite gpu``."""
    checks, times = record["checks"], record["times"]
    wrong, unknown = (sum(check["right"] is how for check in checks) for how in (False, None))
    best = [one["of_ceiling"] for one in times if one["of_ceiling"] and one["candidate"] == "fastxent"]
    figures = [
        ("checks", f"{len(checks)}"),
        ("wrong", f"{wrong}"),
        ("times", f"{sum(bool(one['seconds']) for one in times)}"),
    ]
    if unknown:
        figures.append(("checks left out", f"{unknown}"))
    judged = [bar for bar in record["bars"] if bar["met"] is not None]
    figures.append(("bars met", f"{sum(bar['met'] for bar in judged)} of {len(judged)}"))
    if best:
        figures.append(("of a copy, best and worst", f"{max(best):.0%}, {min(best):.0%}"))
    rows = [
        [
            lengths(one["shape"]), one["dtype"], one["operation"], one["candidate"], *_clocked(one["seconds"]),
            report.share(one["of_ceiling"]), one["note"],
        ]
        for one in times
    ]  # fmt: skip
    errors = sorted((_worst(check) for check in checks), key=lambda row: -row[0])
    tables = [
        (
            "Bars",
            "What is asked of an H200, missed first, where it was measured.",
            ("",),
            [[bar["said"]] for bar in sorted(judged, key=lambda bar: bar["met"])],
        ),
        (
            "Times",
            "Of kernels on logits that are on the device.",
            ("shape", "dtype", "", "", "min", "median", "IQR", "of a copy", ""),
            rows,
        ),
        (
            "Checks",
            "Errors in units of what is allowed, the largest first.",
            ("problem", "error", "of", ""),
            [[problem, report.number(error), figure, note] for error, problem, figure, note in errors],
        ),
    ]
    return page.lay_out("fastxent on a GPU", report.gpu(record), figures, pictures.of_times(times), tables)


def _clocked(seconds):
    if seconds is None:
        return "", "", ""
    taken = Seconds(**seconds)
    return report.seconds(taken.least), report.seconds(taken.median), report.spread(taken)


def _worst(check):
    """``error, problem, figure, note`` of a check's worst figure; a missing number is worse than any, and a failure."""
    errors = [(math.inf if error is None else error, figure) for figure, error in check["errors"].items()]
    error, figure = max(errors, default=(math.inf, ""))
    return error, check["problem"], figure, check["note"] or "wrong" * (check["right"] is False)
