"""The command line: parses and prints, nothing else.

Exit codes: 0 done, 1 the run failed, 2 bad input or usage, 130 interrupted.
"""

import json
import math
import sys
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import fastxent
from fastxent import backends, io, scoring


class Command(click.Group):
    """A group whose commands end with the exit codes above and one line on stderr, never a traceback."""

    def main(self, *args, **kwargs):
        """Run the command line and exit."""
        try:
            super().main(*args, **kwargs | {"standalone_mode": False})
        except click.exceptions.Exit as error:
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            sys.exit(130)
        except (io.SourceError, IndexError, TypeError, ValueError, backends.BackendUnavailableError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except (OSError, MemoryError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)


_backend_option = click.option("--backend", help="One of `fastxent info`; the fastest by default.")


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastxent.__version__)
def main():
    """Cross entropy of huge batches of logits: every digit, at the speed of reading them once."""


@main.command()
@click.argument("logits", type=click.Path(path_type=Path))
@click.argument("targets", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the scores go (.npy).")
@click.option("--ignore-index", type=int, default=-100, show_default=True, help="A target that counts for nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_backend_option
def score(logits, targets, output, ignore_index, force, as_json, backend):
    """Score LOGITS (..., V) against TARGETS (...), .npy files of any size.

    OUTPUT is a .npy of records, one a target in C order: log_prob (natural log, <= 0) and valid.
    """
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; --force replaces it")
    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent} is not a folder")
    logits, targets = io.NpySource.open(logits), io.NpySource.open(targets)
    blocks = scoring.score_blocks(logits, targets, ignore_index, backend)
    summary = scoring.Summary()
    bar, advance = _progress(math.prod(logits.shape) * logits.dtype.itemsize)
    with bar, io.NpySink(output, scoring.record_dtype(logits.dtype), targets.shape) as sink:
        for records, greedy, size in blocks:
            sink.append(records)
            summary.add(records, greedy, size)
            advance(size)
    if as_json:
        click.echo(json.dumps({name: _or_null(value) for name, value in summary.as_dict().items()}))
    else:
        Console().print(_summary_table(summary.as_dict(), output))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("fastxent-demo"), show_default=True)
def demo(folder):
    """Train a classifier of handwritten digits, score it, and measure the speed; under a minute, no network."""
    from fastxent import demo as demonstration

    console = Console()
    console.print("[bold]1. A softmax classifier of handwritten digits[/], trained with cross_entropy_with_grad")
    *steps, (logits, targets) = demonstration.train()
    console.print(_training_table(steps))

    files = demonstration.save(folder, logits, targets)
    summary = demonstration.score(*files)
    console.print(f"[bold]2. The held-out logits[/], saved in {folder}/ and scored; the same again:")
    console.print(f"   fastxent score {' '.join(map(str, files[:2]))} -o {files[2]} --force", highlight=False)
    console.print(_summary_table(summary, files[2]))

    console.print("[bold]3. 256 MB of logits[/], 2,000 rows of 32,000 classes in float32, median of 5 rounds")
    console.print(_speed_table(demonstration.measure_speed()))

    console.print("[bold]4. A confident row[/], logits 20 and 0 in float32: the loss is log(1 + exp(-20))")
    for label, loss in demonstration.confident_row().items():
        console.print(f"   {label:<22} {loss!s}", highlight=False)


@main.command()
def info():
    """Show versions, backends, threads, and where compiled kernels are kept."""
    import llvmlite
    import numba
    import numpy as np

    from fastxent.backends.cpu import cache, twins

    table = Table.grid(padding=(0, 2))
    folder = cache.folder()
    for name in backends.NAMES:
        table.add_row(f"backend {name}", backends.why_unavailable(name) or "available")
    table.add_row("chosen", backends.explain((512, 32_000)).split(":")[0])
    table.add_row("threads", f"{numba.get_num_threads()}, layer {twins.threading_layer()}")
    table.add_row(
        "kernel cache", f"{folder}, writable" if folder else "none: no writable folder; kernels live in memory"
    )
    for name, module in (("Python", sys), ("NumPy", np), ("Numba", numba), ("llvmlite", llvmlite)):
        table.add_row(name, module.version.split()[0] if module is sys else module.__version__)
    console = Console()
    console.print(f"fastxent {fastxent.__version__}", highlight=False)
    console.print(table)


def _or_null(value):
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _progress(size):
    """A bar on stderr where that is a terminal; ``as advance`` takes bytes."""
    console = Console(stderr=True)
    bar = Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    task = bar.add_task("scoring", total=size)
    return bar, lambda done: bar.advance(task, done)


def _summary_table(summary, output):
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", f"{summary['rows']:,} ({summary['valid']:,} valid, {summary['nan']:,} NaN)")
    table.add_row("mean NLL", f"{summary['mean_nll_nats']:.6g} nats, {summary['mean_nll_bits']:.6g} bits")
    table.add_row("perplexity", f"{summary['perplexity']:.6g}")
    table.add_row("accuracy", f"{summary['accuracy']:.2%}")
    table.add_row("speed", f"{summary['rows_per_second']:,.0f} rows/s, {summary['gigabytes_per_second']:.2f} GB/s")
    table.add_row("scores", str(output))
    return table


def _training_table(steps):
    table = Table(box=box.SIMPLE)
    for column in ("step", "loss", "held-out loss", "held-out accuracy"):
        table.add_column(column, justify="right")
    table.add_column("loss (bar) and held-out loss (line)")
    top = max(max(step.train_loss, step.held_out_loss) for step in steps)
    for step in steps:
        cells = f"{step.step}", f"{step.train_loss:.4f}", f"{step.held_out_loss:.4f}", f"{step.held_out_accuracy:.1%}"
        table.add_row(*cells, _bar(step.train_loss / top, step.held_out_loss / top))
    return table


def _bar(share, mark, width=40):
    bar = "█" * round(share * width)
    at = min(width - 1, round(mark * width))
    padded = bar.ljust(width)
    return f"[cyan]{padded[:at]}[/][yellow]│[/][cyan]{padded[at + 1 :]}[/]"


def _speed_table(speed):
    table = Table(box=box.SIMPLE)
    for column in ("", "time", "of the limit", "against NumPy"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in speed:
        table.add_row(row.label, f"{row.seconds * 1e3:.2f} ms", f"{row.of_limit:.0%}", f"{row.against_numpy:.1f} x")
    return table
