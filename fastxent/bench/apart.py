"""A list of work done in a process of its own, which is begun anew behind whatever ends it or hangs."""

import contextlib
import itertools
import multiprocessing
import time
from dataclasses import replace
from typing import Any

_LOOKING = 1.0  # seconds from one look at whether a process is there to the next
# seconds more for a process's first piece of work, to import what that needs; and what it has at least
_BEGINNING, _LEAST = 60.0, 30.0


class NothingBegunError(RuntimeError):
    """A process ends, or hangs, before it has begun any work; its message says which."""


def results(listed, is_well, patience, until):
    """Yield what each piece of work finds, a list for each, in order.

    ``listed()`` gives the pieces: each has a ``line`` with a ``note``, and ``found(before, start)``, see
    `fastxent.bench.gpu.Unit`. Of a piece that takes more than ``patience`` seconds, or is not done when it has been
    ``until`` so many since the beginning, or that ends its process, the line is what is found. ``is_well()`` says
    whether a process may go on whose work has failed. Both are functions of a module, as each process asks for them
    anew.

    Raises
    ------
    NothingBegunError
        If a process ends, or hangs, before it has begun a piece of work.
    """
    start, done = time.monotonic(), 0
    before: list[Any] = []
    while True:
        count = 0
        for found in _of_one_process(listed, is_well, patience, start, until, done, before):
            if found is None:
                return
            count += 1
            before += found
            yield found
        if not count:
            raise NothingBegunError(f"a process ends, or hangs, before it begins piece {done} of the work")
        done += count


def _of_one_process(listed, is_well, patience, start, until, done, before):
    """What its pieces find, those behind the first ``done``; at the end of all None."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # a daemon could have no processes of its own, which compilers begin
    process = context.Process(target=_work, args=(theirs, listed, is_well, start, done, before))
    process.start()
    theirs.close()
    line, allowed = None, patience + _BEGINNING

    def left(least):
        """Of what is allowed; something to begin, and to say what is left out."""
        return max(least, min(allowed, start + until - time.monotonic()))

    try:
        while (line := _next(ours, process, left(_LEAST))) is not None:
            began = time.monotonic()
            found, goes_on = _next(ours, process, left(1.0))
            line, allowed = None, patience
            yield found
            if not goes_on:
                return
        yield None
    except (EOFError, BrokenPipeError):  # the second on Windows
        process.join()
        if line is not None:
            yield [replace(line, note=f"failed: it has ended its process, with {process.exitcode}")]
    except TimeoutError:
        if line is not None:
            yield [replace(line, note=f"failed: it has taken more than {time.monotonic() - began:.0f} s")]
    finally:
        process.kill()
        process.join()
        ours.close()


def _next(pipe, process, allowed):
    """What the process sends next; an EOFError where it has ended, though processes of its own may hold the pipe."""
    until = time.monotonic() + allowed
    while not pipe.poll(max(0.0, min(_LOOKING, until - time.monotonic()))):
        if process.exitcode is not None and not pipe.poll():
            raise EOFError
        if time.monotonic() > until:
            raise TimeoutError
    return pipe.recv()


def _work(pipe, listed, is_well, start, done, before):
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        for piece in itertools.islice(listed(), done, None):
            pipe.send(piece.line)
            found = piece.found(before, start)
            before += found
            goes_on = not any(one.note.startswith("failed") for one in found) or is_well()
            pipe.send((found, goes_on))
            if not goes_on:
                return
        pipe.send(None)
