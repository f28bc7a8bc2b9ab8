"""What the command line shows: tables, a bar of progress; how they look, not what they say."""

import math

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table


def progress():
    """A bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def of_summary(summary, output):
    """The figures of a scoring run."""
    table = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))
    table.add_row("rows", f"{summary['rows']:,} ({summary['valid']:,} valid, {summary['nan']:,} NaN)")
    if summary["rows_now"] < summary["rows"]:
        table.add_row("resumed", f"{summary['rows'] - summary['rows_now']:,} rows were there")
    table.add_row("mean NLL", f"{summary['mean_nll_nats']:.6g} nats, {summary['mean_nll_bits']:.6g} bits")
    table.add_row("perplexity", f"{summary['perplexity']:.6g}")
    table.add_row("accuracy", f"{summary['accuracy']:.2%}")
    table.add_row("speed", f"{summary['rows_per_second']:,.0f} rows/s, {summary['gigabytes_per_second']:.2f} GB/s")
    table.add_row("scores", escape(str(output)))
    return table


def of_training(steps):
    """The steps of the demonstration's training, with a bar for both losses."""
    table = Table(box=box.SIMPLE)
    for column in ("step", "loss", "held-out", "accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("loss [cyan]█[/], held-out loss [yellow]│[/]", no_wrap=True)
    top = max(max(step.train_loss, step.held_out_loss) for step in steps)
    for step in steps:
        cells = f"{step.step}", f"{step.train_loss:.4f}", f"{step.held_out_loss:.4f}", f"{step.held_out_accuracy:.1%}"
        table.add_row(*cells, _bar(step.train_loss / top, step.held_out_loss / top))
    return table


def _bar(share, mark, width=34):
    bar = "█" * round(share * width)
    at = min(width - 1, round(mark * width))
    padded = bar.ljust(width)
    return f"[cyan]{padded[:at]}[/][yellow]│[/][cyan]{padded[at + 1 :]}[/]"


def of_speed(speed):
    """The demonstration's timings."""
    table = Table(box=box.SIMPLE)
    for column in ("", "time", "of the limit", "against NumPy"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in speed:
        table.add_row(row.label, f"{row.seconds * 1e3:.2f} ms", f"{row.of_limit:.0%}", f"{row.against_numpy:.1f} x")
    return table


def print_digest(digest):
    """What was asked for beside the summary."""
    if digest is None:
        return
    console = Console(highlight=False)
    for name in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        if not math.isnan(value := getattr(digest.metrics, name)[0]):
            console.print(f"{name.replace('_', ' ')}  {value:.6g}")
    if digest.groups is not None:
        console.print(f"\n{escape(str(digest.groups))}")
    if digest.models is not None:
        console.print(f"\n{escape(str(digest.models))}")
