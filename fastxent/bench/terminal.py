"""A comparison in a terminal: a table a problem, with bars, of as many columns as there is room for."""

import io
import math

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fastxent.bench import report

WIDE = 130  # columns: room for all that a terminal is shown
_BAR, _ROOM_FOR_BARS = 10, 60
_HEADINGS = {"of fastest peer": "of peer", "same bits": "bits"}


def problem(limit, cells, console):
    """The table of one problem: those that were timed, the fastest first; then the limit, and what it all says."""
    ranked = sorted((column for column in report.COLUMNS if column.goes < math.inf), key=lambda column: column.goes)
    for count in range(len(ranked), 0, -1):
        columns = [column for column in report.COLUMNS if column in ranked[:count]]
        table = _table(limit, cells, columns, console.width >= _ROOM_FOR_BARS)
        if Measurement.get(console, console.options, table).maximum < console.width:
            break
    return Group(table, *(Text(remark) for remark in report.remarks(limit, cells)), "")


def _table(limit, cells, columns, with_bars):
    table = Table(title=str(limit.problem), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("", no_wrap=True)
    if with_bars:
        table.add_column("", no_wrap=True, min_width=_BAR)
    for column in columns:
        table.add_column(_HEADINGS.get(column.heading, column.heading), justify="right", no_wrap=True)
    by_name = {cell.candidate: cell for cell in cells}
    for name, *texts in report.rows(limit, cells, columns):
        cell = by_name.get(name)
        style = "dim" if cell is None else "cyan" if cell.is_ours else "default"
        bar = "▒" * _BAR if cell is None else _bar(cell.of_limit)
        table.add_row(
            Text(name, style),
            *[Text(bar, style)] * with_bars,
            *map(escape, texts),
            style="dim" if cell is None else None,
        )
    return table


def ending(comparison):
    """What is said once: the noise, what is absent and how to have it, what the columns mean."""
    lines = [report.noise(comparison)]
    lines += [f"{names}: {note}" for names, note in report.absent(comparison.cells)]
    lines += ["", *(f"{name:>15}  {meaning}" for name, meaning in report.LEGEND)]
    return Text("\n".join(lines))


def text(comparison, width=WIDE):
    """All of it as text of so many columns."""
    written = io.StringIO()
    console = Console(file=written, width=width)
    for limit in comparison.limits:
        console.print(problem(limit, comparison.of(limit.problem), console))
    console.print(ending(comparison))
    return written.getvalue()


def _bar(of_limit):
    return ("█" * round(min(of_limit, 1.0) * _BAR)) or "▏"
