"""``fastxent compare``: reads options, shows each table as it is done, and writes what was asked for."""

import contextlib
import json
import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from fastxent import backends, page, runs
from fastxent.io import publish

_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)
_PATIENCE, _MORE = 60.0, 15.0  # seconds for a piece of the GPU's suite, and for its last beyond what the suite has
_BETWEEN = 3.0  # seconds from one writing of what it has found to the next


class Shape(click.ParamType):
    """ROWSxCLASSES or ROWSxWIDTHxCLASSES."""

    name = "SHAPE"

    def convert(self, value, param, context):
        """The lengths."""
        try:
            shape = tuple(map(int, value.split("x")))
        except ValueError:
            shape = ()
        if len(shape) not in (2, 3) or min(shape) < 1:
            self.fail("it takes ROWSxCLASSES or ROWSxWIDTHxCLASSES, whole numbers such as 512x32000", param, context)
        return shape


class Names(click.ParamType):
    """Names with commas between them."""

    name = "NAME,..."

    def convert(self, value, param, context):
        """The names."""
        return tuple(filter(None, (name.strip() for name in value.split(","))))


def _joined(context, param, values):
    """The names of every time an option was given; None where it was not."""
    return tuple(name for names in values for name in names) if values else None


@click.command()
@click.option("--op", type=click.Choice(["loss", "gradient"]), help="The loss, or with its gradient; by default both.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    type=Shape(),
    metavar="ROWSx[WIDTHx]CLASSES",
    help="By default three. With a width: hidden states under an output matrix.",
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "float64", "float16", "bfloat16"]))
@click.option("--backends", "chosen", multiple=True, type=Names(), callback=_joined, help="Of `fastxent info`; all.")
@click.option(
    "--peers",
    multiple=True,
    type=Names(),
    callback=_joined,
    help='Rows of the table, such as torch,scipy; all. "" none.',
)
@click.option("--threads", multiple=True, type=click.IntRange(1), help="By default all.")
@click.option(
    "--suite",
    type=click.Choice(["cpu", "gpu", "linear"]),
    help="All shapes, dtypes, one thread and all, in 20 minutes; a GPU in eight; three shapes with a width in 13.",
)
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="How long in all; 30 and 12 a table, with a width 120."
)
@click.option("--json", "json_file", type=_FILE, help="Write the record to this file.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead, every column of it.")
@click.option("--html", "page_file", type=_FILE, help="Write a page with pictures to this file.")
@click.option("--plot", "picture_file", type=_FILE, help="Write the bars to this SVG file.")
def compare(
    op, shapes, dtypes, chosen, peers, threads, suite, seconds, json_file, as_markdown, page_file, picture_file
):
    """Compare fastxent with every other library that is installed: right first, then fast.

    Alone: three shapes in float32, in less than two minutes. pip install fastxent[peers] brings the others.
    """
    for path in filter(None, (json_file, page_file, picture_file)):
        if not path.parent.is_dir():
            raise click.UsageError(f"{path.parent} is not a folder")
        if path.is_symlink() and path.is_relative_to("/dev"):
            raise click.UsageError(f"{path} has the tables already; name a file of its own")
    if page_file or picture_file:
        try:
            page.check()
        except page.MissingPackageError as error:
            raise click.UsageError(str(error)) from error
    if suite == "gpu":
        _refuse_others(click.get_current_context())
        _on_gpu(json_file, page_file)
        return
    from fastxent.bench import comparison, terminal
    from fastxent.bench.plan import Plan

    try:
        asked = Plan.read(shapes, op, dtypes, threads, chosen, peers, suite)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    console = Console(width=None if Console().is_terminal else terminal.WIDE)
    show = None if as_markdown else lambda limit, cells: console.print(terminal.problem(limit, cells, console))
    found = comparison.measure(asked, seconds, show)
    if as_markdown:
        click.echo(found.markdown())
    else:
        console.print(terminal.ending(found))
    for path, text in ((json_file, found.to_json), (page_file, found.html), (picture_file, found.svg)):
        if path is not None:
            path.write_text(text(), "utf-8")


def _refuse_others(context):
    """Every shape, dtype and option is the GPU suite's own."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("suite", "json_file", "page_file")
        and context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"--suite gpu takes --json and --html alone, not {', '.join(given)}")


@contextlib.contextmanager
def _ended_by_signals():
    """What is to be done at the end is done where the process is told to end, too, as a job's time limit does."""

    def end(number, frame):
        signal.signal(number, signal.SIG_IGN)  # it may come twice
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _write(json_file, record):
    publish.write_text(json_file, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _on_gpu(json_file, page_file):
    """Check every verb of the CUDA backend, then time its kernels, a line for what is wrong and for each time.

    What has been found is written every few seconds, and whatever ends it.
    """
    from fastxent.bench import apart, gpu
    from fastxent.bench import page as pages

    if reason := backends.why_unavailable("cuda"):
        raise runs.RunError(f"the suite needs a GPU, and {reason}")
    found: list = []
    written = time.monotonic()
    rewritable = json_file and (json_file.is_file() or not json_file.exists())  # what reads a pipe reads it once
    work = apart.results(gpu.units, gpu.is_well, _PATIENCE, gpu.UNTIL + _MORE)
    with _ended_by_signals(), contextlib.closing(work):
        try:
            for several in work:
                found += several
                for one in several:
                    if not isinstance(one, gpu.Check) or one.right is False:
                        click.echo(str(one))
                if rewritable and time.monotonic() > written + _BETWEEN:
                    _write(json_file, gpu.record(found))
                    written = time.monotonic()
        except apart.NothingBegunError as failure:
            raise runs.RunError(str(failure)) from failure
        finally:
            record = gpu.record(found)
            if json_file:
                _write(json_file, record)
            if page_file:
                page_file.write_text(pages.render_gpu(record), "utf-8")
    wrong, unknown = (sum(check["right"] is how for check in record["checks"]) for how in (False, None))
    left_out = f", {unknown} left out" if unknown else ""
    timed = sum(time["seconds"] is not None for time in record["times"])
    click.echo(f"{record['device']}: {len(record['checks'])} checks, {wrong} wrong{left_out}; {timed} times")
    met, missed, not_measured = ([bar for bar in record["bars"] if bar["met"] is how] for how in (True, False, None))
    for bar in missed:
        click.echo(bar["said"])
    click.echo(f"what is asked of an H200: {len(met)} met, {len(missed)} missed, {len(not_measured)} not measured")
    if wrong:
        raise runs.RunError(f"{wrong} checks are wrong on this GPU")
