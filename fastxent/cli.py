"""The command line: parses and prints, nothing else.

Exit codes: 0 done, 1 the run failed, 2 bad input or usage, 130 interrupted.
"""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastxent
from fastxent import backends, io, page, runs, tables
from fastxent.arguments import ScoreOptions
from fastxent.checks import DTYPES
from fastxent.cli_compare import compare
from fastxent.digest import Questions
from fastxent.io import publish

# what a bad argument or a bad file raises before anything is written; a SourceError is a ValueError
BAD_INPUT = (
    FileExistsError,
    IndexError,
    TypeError,
    ValueError,
    NotImplementedError,
    backends.BackendUnavailableError,
    page.MissingPackageError,
)


class BadInput(click.ClickException):
    """What the user can mend: one line on stderr and exit code 2."""

    exit_code = 2

    def show(self, file=None):
        """Print the line."""
        click.echo(f"error: {self.message}", err=True)


class Interrupted(click.ClickException):
    """Ctrl-C, and what can be done about it."""

    exit_code = 130

    def show(self, file=None):
        """Print the line."""
        click.echo(self.message, err=True)


class Command(click.Group):
    """A group whose commands end with the exit codes above."""

    def main(self, *args, **kwargs):
        """Run the command line and exit."""
        try:
            sys.exit(super().main(*args, **kwargs | {"standalone_mode": False}))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            sys.exit(130)
        except runs.RunError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)


_backend_option = click.option("--backend", help="One of `fastxent info`; by default FASTXENT_BACKEND, else cpu.")


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastxent.__version__)
def main():
    """Cross entropy of huge batches of logits: every digit, the logits read once."""


main.add_command(compare)


class Size(click.ParamType):
    """A number of bytes such as 256MB or 1GiB."""

    name = "SIZE"

    def convert(self, value, param, context):
        """The number."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", value)
        if not match:
            self.fail(f"{value!r} is not a number of bytes such as 256MB or 1GiB", param, context)
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


class Capability(click.ParamType):
    """A compute capability such as 9.0, 90 or sm_90."""

    name = "CAPABILITY"

    def convert(self, value, param, context):
        """Both numbers."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", value)
        if not match:
            self.fail(f"{value!r} is not a compute capability such as 9.0", param, context)
        return int(match[1]), int(match[2])


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="LOGITS... TARGETS")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the scores go.")
@click.option(
    "--format", "file_format", type=click.Choice(["npy", "parquet", "zarr"]), help="By OUTPUT's suffix, else npy."
)
@click.option("--summary", "summary_file", type=click.Path(path_type=Path), help="Write the summary to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run has left, if there is any.")
@click.option("--force", is_flag=True, help="Replace an existing output, and begin again where a run was interrupted.")
@click.option("--ignore-index", type=int, default=-100, show_default=True, help="A target that counts for nothing.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Keep so many largest classes.")
@click.option("--softcap", type=float, help="Logits become softcap tanh(logits / softcap).")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Logits are divided by it.")
@click.option(
    "--shift",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="1 scores next tokens: logits (B, T, V) at a position against targets (B, T) at the next one; "
    "the last position of a sequence has no target and is not valid.",
)
@click.option("--logits-dtype", type=click.Choice(list(io.NAMELESS)), help="What logits are that a file cannot name.")
@click.option("--memory", type=Size(), default="256MB", show_default=True, help="What blocks of logits may take.")
@click.option("--chunk-rows", type=click.IntRange(1), help="At most so many rows at a time.")
@click.option(
    "--on-nan",
    type=click.Choice(["count", "error"]),
    default="count",
    show_default=True,
    help="Whether a row whose score is NaN is counted or ends the run.",
)
@click.option("--compare", "other", multiple=True, help="Another model's logits: compare it with the first.")
@click.option("--group-by", metavar="FILE", help="What names each row's group: of TARGETS' shape or its beginning.")
@click.option("--words", metavar="N|FILE", help="How many words the targets are, for word perplexity.")
@click.option("--bytes", "byte_counts", metavar="N|FILE", help="Its bytes, for bits per byte; a file is summed.")
@click.option("--html", "page_file", type=click.Path(path_type=Path), help="Write a report to this HTML file.")
@click.option("--scheduler", metavar="ADDRESS", help="Score on the workers of this Dask scheduler.")
@click.option("--workers", type=click.IntRange(1), help="Score in so many worker processes on this machine.")
@_backend_option
def score(
    files,
    output,
    file_format,
    summary_file,
    as_json,
    resume,
    force,
    top_k,
    ignore_index,
    temperature,
    softcap,
    shift,
    other,
    group_by,
    words,
    byte_counts,
    page_file,
    scheduler,
    workers,
    **how,
):
    """Score LOGITS (..., V) against TARGETS (...), files of any size.

    Several LOGITS are one array, their first axes one after the other in the order given; a quoted glob means its
    files in the order of their names, and so may TARGETS. Read are .npy, .safetensors, .zarr (or a URL), .parquet,
    .arrow and .feather; FILE::NAME picks a tensor, array or column.

    OUTPUT holds records, one a target in C order: log_prob (natural log, <= 0), lse, entropy, sum_p2, rank, rank_hi,
    argmax, is_greedy, valid, with --top-k top_ids and top_log_probs, with --compare other_log_prob, kl, js and
    same_argmax. It appears when it is whole; until then
    OUTPUT.part and OUTPUT.journal hold what is finished, and --resume goes on with them.
    """
    *logits, targets = files
    if not logits:
        raise click.UsageError("LOGITS and TARGETS are two files at least")
    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent} is not a folder")
    _end_on_bus_error()
    bar = tables.progress()
    task = bar.add_task("scoring", total=None)
    try:
        inputs = [*files, *other, *filter(os.path.exists, filter(None, (group_by, words, byte_counts)))]
        for beside in (summary_file, page_file):
            _check_beside(beside, inputs, output, force)
        if summary_file and page_file and summary_file.absolute() == page_file.absolute():
            raise FileExistsError(f"{page_file} is another file of this run")
        if page_file:
            page.check()
        asked = any((group_by, words, byte_counts, page_file, other))
        questions = Questions(group_by, words, byte_counts) if asked else None
        with _cluster(scheduler, workers) as cluster, bar:
            summary = runs.score_file(
                logits,
                targets,
                output,
                ScoreOptions(top_k, ignore_index, temperature, softcap, shift),
                other=list(other) or None,
                questions=questions,
                file_format=file_format and f".{file_format}",
                resume=resume,
                replace=force,
                cluster=cluster,
                advance=lambda done, rows: bar.update(task, completed=done, total=rows),
                **how,
            )
    except runs.RunError as error:
        raise runs.RunError(f"{error}{_resumable(output)}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted{_resumable(output)}") from None
    except BAD_INPUT as error:
        raise BadInput(f"{error}{_hint(str(error))}") from error
    found = questions.digest if questions else None
    figures = _or_null(summary.as_dict() | (found.as_dict() if found else {}))
    if summary_file:
        _write_beside(summary_file, json.dumps(figures, indent=1) + "\n")
    if page_file:
        title, subtitle = f"Scores of {Path(files[0]).name}", f"{' '.join(files)} -> {output}"
        _write_beside(page_file, page.render(found, title, subtitle))
    if as_json:
        click.echo(json.dumps(figures))
    else:
        Console().print(tables.of_summary(summary.as_dict(), output))
        tables.print_digest(found)


def _cluster(scheduler, workers):
    """A context manager that gives the cluster asked for, or None."""
    if scheduler is None and workers is None:
        return contextlib.nullcontext()
    if scheduler is not None and workers is not None:
        raise click.UsageError("--scheduler and --workers are two ways to say where; take one")
    try:
        from fastxent import distributed
    except ImportError as error:
        raise BadInput(f"workers need the package dask, which pip install fastxent[dask] brings ({error})") from error
    return distributed.local(workers) if scheduler is None else distributed.connect(scheduler)


def _resumable(output):
    """The option that goes on with what a run has left, if it has left anything."""
    return "; --resume goes on with what is done" if output.with_name(f"{output.name}.part").exists() else ""


def _hint(message):
    """The option that helps where a message ends so."""
    hints = {
        "exists": "; --force replaces it",
        "is unfinished": "; --resume goes on with it, --force begins again",
        "the logits' dtype must be given": " with --logits-dtype",
    }
    return next((hint for end, hint in hints.items() if message.endswith(end)), "")


def _check_beside(summary_file, files, output, force):
    """A FileExistsError if what is written beside the output would be written over something else."""
    if summary_file is None:
        return
    if not summary_file.parent.is_dir():
        raise click.UsageError(f"{summary_file.parent} is not a folder")
    inputs = [path for name in files for path, _ in io.expand(name)]
    for path in filter(os.path.exists, [*inputs, output]):
        if summary_file.exists() and summary_file.samefile(path):
            raise FileExistsError(f"{summary_file} is another file of this run")
    if summary_file.absolute() == output.absolute():
        raise FileExistsError(f"{summary_file} is another file of this run")
    if summary_file.exists() and not force:
        raise FileExistsError(f"{summary_file} exists")


def _write_beside(path, text):
    try:
        publish.write_text(path, text)
    except OSError as error:
        raise runs.RunError(f"{path}: {error.strerror}") from error


def _end_on_bus_error():
    """One line and exit code 1 where an input shrinks while a memory map of it is read.

    The kernel says so by a signal to the instruction that reads, so only machine code can answer; what is finished is
    in the part and its journal, as if the process had been killed.
    """
    if not hasattr(signal, "SIGBUS"):
        return
    from fastxent.io.bus import end_with

    end_with(b"error: an input was truncated, or could not be read, while it was mapped\n", 1)


@main.command()
def demo():
    """Train a classifier of handwritten digits, score it, and measure the speed; about a minute, no network.

    Writes the folder fastxent-demo here.
    """
    from fastxent import demo as demonstration

    console = Console()
    console.print("[bold]1. A softmax classifier of handwritten digits[/], trained with cross_entropy_with_grad")
    *steps, (logits, targets) = demonstration.train()
    console.print(tables.of_training(steps))

    logits_file, targets_file, output = demonstration.save(Path("fastxent-demo"), logits, targets)
    summary = runs.score_file(logits_file, targets_file, output, replace=True)
    console.print(f"[bold]2. The held-out logits[/], saved in {output.parent}/ and scored; the same again:")
    command = ["fastxent", "score", str(logits_file), str(targets_file), "-o", str(output), "--force"]
    console.print(f"   {shlex.join(command)}", highlight=False, soft_wrap=True)
    console.print(tables.of_summary(summary.as_dict(), output))

    console.print("[bold]3. 256 MB of logits[/], 2,000 rows of 32,000 classes in float32, median of 5 rounds")
    console.print(tables.of_speed(demonstration.measure_speed()))

    console.print("[bold]4. A confident row[/], logits 20 and 0 in float32: the loss is log(1 + exp(-20))")
    for label, loss in demonstration.confident_row().items():
        console.print(f"   {label:<22} {loss!s}", highlight=False)


@main.command()
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice([str(dtype) for dtype in DTYPES]), help="By default all."
)
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--every-option", is_flag=True, help="cuda: for every option too, kind of target and dtype of gradients.")
@click.option("--suite", is_flag=True, help="cuda: those that fastxent compare --suite gpu asks for.")
@click.option("--architecture", type=Capability(), help="cuda: for this compute capability; no GPU has to be there.")
def warmup(dtypes, backend, every_option, suite, architecture):
    """Compile kernels now, so that no later call waits; kept where `fastxent info` says.

    For the backend cpu these are all there are. Those of cuda are for the GPU at hand, and by default for calls without
    options. --suite first finds out which they are, in about a minute.
    """
    from importlib import import_module

    if backend != "cuda" and (every_option or suite or architecture):
        raise click.UsageError("--every-option, --suite and --architecture are for --backend cuda")
    if every_option and suite:
        raise click.UsageError("--every-option and --suite exclude each other")
    if architecture is None and (reason := backends.why_unavailable(backend)) is not None:
        raise runs.RunError(reason)
    of_cuda: dict[str, Any] = {}
    if backend == "cuda":
        of_cuda = {"every_option": every_option, "architecture": architecture}
    if suite:
        of_cuda["chosen"] = import_module("fastxent.bench.gpu_kernels").asked
    compile_all = import_module(f"fastxent.backends.{backend}.warmup").compile_all

    total = compiled = 0
    try:
        for dtype, number, anew in compile_all(dtypes or [str(dtype) for dtype in DTYPES], **of_cuda):
            total, compiled = total + number, compiled + anew
            click.echo(f"{dtype}: {number} kernels, {anew} compiled now")
    except (OSError, RuntimeError) as error:  # no folder, no compilers, or what these say
        raise runs.RunError(str(error)) from error
    except ValueError as error:
        raise BadInput(str(error)) from error
    click.echo(f"{total} kernels, {compiled} compiled now")


@main.command()
def info():
    """Show versions, backends, threads, and where compiled kernels are kept."""
    import llvmlite
    import numba
    import numpy as np

    from fastxent.backends import cpu, cuda

    table = Table.grid(padding=(0, 2))
    for name in backends.NAMES:
        table.add_row(f"backend {name}", escape(backends.why_unavailable(name) or "available"))
    try:
        table.add_row("chosen", " ".join(backends.chosen()))
    except backends.BackendUnavailableError as error:
        table.add_row("chosen", f"none: FASTXENT_BACKEND: {escape(str(error))}")
    for module in (cpu, cuda):
        for name, value in module.describe().items():
            table.add_row(name, escape(value))
    for name, module in (("NumPy", np), ("Numba", numba), ("llvmlite", llvmlite)):
        table.add_row(name, module.__version__)
    table.add_row("Python", sys.version.split()[0])
    console = Console(soft_wrap=True)
    console.print(f"fastxent {fastxent.__version__}", highlight=False)
    console.print(table)


def _or_null(value):
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _or_null(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_or_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
