"""A list of work done in a process of its own, which is begun anew behind whatever ends it or hangs."""

import itertools
import multiprocessing
import time
from dataclasses import replace
from typing import Any

_BEGINNING = 60.0  # seconds more for a process's first piece of work, to import what that needs


def results(listed, is_well, patience):
    """Yield what each piece of work finds, a list for each, in order.

    ``listed()`` gives the pieces: each has a ``line`` with a ``note``, and ``found(before, start)``, see
    `fastxent.bench.gpu.Unit`. Of a piece that takes more than ``patience`` seconds, or that ends its process, the line
    is what is found. ``is_well()`` says whether a process may go on whose work has failed. Both are functions of a
    module, as each process asks for them anew.
    """
    start, done = time.monotonic(), 0
    before: list[Any] = []
    while True:
        count = 0
        for found in _of_one_process(listed, is_well, patience, start, done, before):
            if found is None:
                return
            count += 1
            before += found
            yield found
        if not count:
            raise RuntimeError(f"a process ends before it begins piece {done} of the work")
        done += count


def _of_one_process(listed, is_well, patience, start, done, before):
    """What its pieces find, those behind the first ``done``; at the end of all None."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # a daemon could have no processes of its own, which compilers begin
    process = context.Process(target=_work, args=(theirs, listed, is_well, start, done, before))
    process.start()
    theirs.close()
    line, allowed = None, patience + _BEGINNING
    try:
        while (line := _next(ours, allowed)) is not None:
            found, goes_on = _next(ours, allowed)
            line, allowed = None, patience
            yield found
            if not goes_on:
                return
        yield None
    except EOFError:
        process.join()
        if line is not None:
            yield [replace(line, note=f"failed: it has ended its process, with {process.exitcode}")]
    except TimeoutError:
        if line is not None:
            yield [replace(line, note=f"failed: it has taken more than {patience:.0f} s")]
    finally:
        process.kill()
        process.join()
        ours.close()


def _next(pipe, allowed):
    if not pipe.poll(allowed):
        raise TimeoutError
    return pipe.recv()


def _work(pipe, listed, is_well, start, done, before):
    for piece in itertools.islice(listed(), done, None):
        pipe.send(piece.line)
        found = piece.found(before, start)
        before += found
        goes_on = not any(one.note.startswith("failed") for one in found) or is_well()
        pipe.send((found, goes_on))
        if not goes_on:
            return
    pipe.send(None)
