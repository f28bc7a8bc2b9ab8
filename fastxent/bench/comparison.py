"""Check, then time: every candidate against exact arithmetic first, and only a right one against the clock."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from fastxent.bench import checking, limits, machine, margins, plan, tasks, timing
from fastxent.bench.record import Arithmetic, Cell, Comparison, Confident, Limit, Problem

_TO_TIME = 0.4  # of a problem's seconds, what is left for rounds when candidates are set up and checked
_AT_ONCE = 0.25  # seconds: a setup that takes no longer is never left out


def compare(
    shapes=None, *, op=None, dtypes=None, threads=None, backends=None, peers=None, suite=None, seconds=None, each=None
):
    """Compare the backends and bridges of this package with every other library that is installed.

    Every candidate is run once and checked against exact arithmetic; only a right one is timed, in rounds interleaved
    with the others and with the limit: reading the logits once for a loss, copying them for a loss with its gradient,
    the products of the matrices for hidden states.

    Parameters
    ----------
    shapes : iterable of tuple of int, optional
        (rows, classes), or (rows, width, classes) for the loss of hidden states under an output matrix. By default
        three of 2^24 logits: (16384, 1000), (512, 32000) and (128, 128256).
    op : {"loss", "gradient"}, optional
        The loss, or the loss with its gradient. By default both.
    dtypes : iterable of str, optional
        Of "float32", "float64", "bfloat16" and "float16". By default float32.
    threads : iterable of int or None, optional
        Numbers of threads; None stands for all, and is the default.
    backends : iterable of {"cpu", "cuda", "reference"}, optional
        Which of ours. By default all.
    peers : iterable of str, optional
        Which other candidates, bridges among them: names of a table's rows. By default all.
    suite : {"cpu", "linear"}, optional
        All shapes, dtypes, and one thread and all; or three shapes with a width.
    seconds : float, optional
        About how long to take in all, by default 30 and 12, of hidden states 120, for each operation, shape, dtype and
        number of threads. Candidates share the time equally; one whose checks would not end in it is left out, and
        says so.
    each : callable, optional
        Called with the `Limit` and the list of `Cell` of each problem as soon as it is done.

    Returns
    -------
    Comparison
        Prints as tables; ``to_json``, ``markdown``, ``html`` and ``svg`` give the rest.

    Raises
    ------
    ValueError
        If a shape, dtype, operation, backend, peer or number of threads is not one of these.

    Examples
    --------
    >>> from fastxent import bench
    >>> found = bench.compare([(300, 40)], op="loss", backends=["cpu"], peers=["numpy"], seconds=1)
    >>> [cell.candidate for cell in found.cells]
    ['fastxent', 'numpy']
    >>> found.cells[0].worst_ulps < 4
    True
    """
    return measure(plan.Plan.read(shapes, op, dtypes, threads, backends, peers, suite), seconds, each)


def measure(asked, seconds=None, each=None):
    """The `Comparison` of a `plan.Plan`, as `compare` gives it."""
    clock = plan.Clock(asked.usual_seconds() if seconds is None else seconds, len(asked))
    confident = _sweep(asked, clock)
    found_limits, cells = [], []
    for limit, part in _measure(asked, clock, confident):
        found_limits.append(limit)
        cells += part
        if each is not None:
            each(limit, part)
    return Comparison(
        machine=machine.describe(),
        measured=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=round(clock.taken, 1),
        limits=tuple(found_limits),
        cells=tuple(cells),
        confident=tuple(confident.values()),
        arithmetic=tuple(_arithmetic(asked)),
    )


def _measure(asked, clock, confident):
    """Yield a `Limit` and the cells of each problem."""
    for shape, dtype in itertools.product(asked.shapes, asked.dtypes):
        each = tasks.build(shape, dtype)
        for number, with_gradient in itertools.product(asked.threads, asked.gradients):
            task = each[with_gradient]
            with machine.threads(number):
                problem = Problem(task.operation, shape, dtype, number)
                yield _problem(task, problem, asked, clock, confident)


def _problem(task, problem, asked, clock, confident):
    """The `Limit` and the cells of one problem: checks in most of its share of the time, rounds in what is left."""
    share = clock.share()
    until = clock.taken + share
    task.limit()
    cells = {name: Cell(problem, name) for name in task.setups if name in asked.candidates}
    ready = _checked(cells, task, clock, clock.taken + (1 - _TO_TIME) * share)
    for name in ready:
        if name and (curve := confident.get((problem.operation, problem.dtype, name))):
            cells[name] = replace(cells[name], confident_error=max(curve.errors))
    found = timing.within(ready, max(until - clock.taken, 0.0))
    if isinstance(limit := found.pop(""), Exception):
        raise limit
    for name, taken in found.items():
        if isinstance(taken, Exception):
            cells[name] = checking.failed(cells[name], taken)
    _fill(cells, {name: taken for name, taken in found.items() if not isinstance(taken, Exception)}, limit, task)
    moved = task.moved and task.moved / limit.median / 1e9
    return Limit(problem, task.limit_name, limit, moved), list(cells.values())


def _checked(cells, task, clock, until):
    """What is to be timed, by name, the limit under "": the right ones of ``cells``, which all learn their errors."""
    ready: dict[str, Callable] = {"": task.limit}
    started = clock.taken
    of_kind = {name: ((cell.problem.operation, cell.problem.dtype), task.elements) for name, cell in cells.items()}

    def expected(name):
        return clock.expected(name, *of_kind[name])

    for number, name in enumerate(sorted(cells, key=expected), 1):  # the slow ones last: they keep nobody waiting
        if name != "fastxent" and expected(name) > max(_AT_ONCE, until - clock.taken):
            cells[name] = replace(cells[name], note="left out: its checks would not end in the time given")
            continue
        with clock.setup(name, *of_kind[name]):
            cells[name], run, bits = checking.check_right(cells[name], task)
        if run is None:
            continue
        until_here = started + (until - started) * number / len(cells)
        if clock.taken + expected(name) <= max(until_here, started + _AT_ONCE):
            cells[name] = checking.check_again(cells[name], task, run, bits)
        if not cells[name].note:
            ready[name] = run
    return ready


def _fill(cells, found, limit, task):
    """Give the cells their times, and what follows from those."""
    peers = [taken for name, taken in found.items() if not cells[name].is_ours]
    peer = min(peers, key=lambda taken: taken.median, default=None)
    for name, taken in found.items():
        cells[name] = replace(
            cells[name],
            seconds=taken,
            ns_per_element=taken.median / task.elements * 1e9,
            gigabytes_per_second=task.moved and task.moved / taken.median / 1e9,
            of_limit=limit.median / taken.median,
            to_fastest_peer=peer and taken.median / peer.median,
            level_with_peer=peer is not None and peer is not taken and taken.overlaps(peer),
        )


def _sweep(asked, clock):
    """`Confident` of every candidate of an operation and dtype; what is imported and compiled once, is so here."""
    found: dict[tuple[str, str, str], Confident] = {}
    shapes = [shape for shape in asked.shapes if len(shape) == 2]
    for (operation, setups), dtype in itertools.product(plan.OPERATIONS.items() if shapes else (), asked.dtypes):
        with_gradient = operation != "loss"
        for name in setups if with_gradient in asked.gradients else ():
            if name in asked.candidates and clock.taken <= clock.seconds / 2:
                with machine.threads(max(asked.threads)), contextlib.suppress(Exception):  # the checks say why
                    key = operation, dtype, name
                    found[key] = margins.measure(*key, setups[name], with_gradient)
    return found


def _arithmetic(asked):
    for dtype, number in itertools.product(asked.dtypes, asked.threads):
        if any(len(shape) == 2 for shape in asked.shapes):
            with machine.threads(number):
                yield Arithmetic(dtype, number, limits.elements(dtype))
