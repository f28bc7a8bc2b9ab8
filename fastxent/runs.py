"""A scoring run over files: blocks of logits in, records out, and a summary.

A record holds what `fastxent.scoring` says; everything here carries records of any fields.
A run keeps what it has finished when it is killed, and goes on from there (`fastxent.io.spool`).
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

import fastxent
from fastxent import arguments, backends, checks, io
from fastxent.arguments import ScoreOptions
from fastxent.io.ahead import ahead
from fastxent.io.publish import FORMATS
from fastxent.io.source import line
from fastxent.io.spool import Spool
from fastxent.scoring import record_dtype, score_rows
from fastxent.state import IGNORED
from fastxent.summary import Summary

MEMORY = 256 << 20
_PLAIN = ScoreOptions()
_ROWS = 1 << 20  # targets checked at a time
_ROW_BYTES = 256  # what is kept of a row of a block beside its record, and some more


class RunError(RuntimeError):
    """A run that began and could not end; what it had finished is kept and can be resumed."""


def score_file(
    logits,
    targets,
    output,
    options=_PLAIN,
    *,
    backend=None,
    logits_dtype=None,
    file_format=None,
    memory=MEMORY,
    chunk_rows=None,
    on_nan="count",
    resume=False,
    replace=False,
    advance=lambda done, rows: None,
):
    """Score files: logits (..., V) against targets (...), one record a target to ``output``.

    Parameters
    ----------
    logits, targets : path-like or sequence of path-like
        See `fastxent.io.open_source`.
    output : path-like
    options : fastxent.arguments.ScoreOptions
    backend : str, optional
        As for `fastxent.score`.
    logits_dtype : str, optional
        What the logits are where their file cannot name it: one of `fastxent.io.NAMELESS`.
    file_format : str, optional
        ".npy", ".parquet" or ".zarr"; by default what the name of ``output`` ends with, else ".npy".
    memory : int
        Bytes that blocks and what is decoded may take, beside the process itself.
    chunk_rows : int, optional
        At most so many rows at a time.
    on_nan : {"count", "error"}
        Whether a valid row whose log-probability is NaN ends the run.
    resume : bool
        Go on with what an earlier run has left; the result has the bytes of a run that was never interrupted.
    replace : bool
        Whether an ``output`` that exists gives way, and what an earlier run has left.
    advance : callable
        Told the rows done and their whole number after every block.

    Returns
    -------
    fastxent.summary.Summary

    Raises
    ------
    fastxent.io.SourceError, fastxent.io.spool.ResumeError, FileExistsError, IndexError, TypeError, ValueError
        For bad input, before anything is written.
    RunError
        If the run fails later.
    """
    started = time.perf_counter()
    if on_nan not in ("count", "error"):
        raise ValueError(f"on_nan must be count or error; got {on_nan!r}")
    with io.open_source(logits, logits_dtype) as logits, io.open_source(targets) as targets:
        check_pair(logits, targets, options)
        step = rows_at_a_time(logits, targets, options, memory, chunk_rows)
        spool = Spool(
            output,
            record_dtype(logits.dtype, options.top_k),
            targets.shape,
            _identity(logits, targets, options, backend),
            file_format or format_of(output),
            replace=replace,
            resume=resume,
            inputs=[*logits.paths(), *targets.paths()],
        )
        try:
            with spool:
                return _run(logits, targets, options, backend, step, on_nan, spool, advance, started)
        except FileExistsError:
            raise
        except io.SourceError as error:
            raise RunError(str(error)) from error
        except MemoryError as error:
            raise RunError(f"out of memory: {line(error)}") from error
        except OSError as error:
            raise RunError(f"{output}: {error.strerror or line(error)}") from error


def format_of(output):
    """The format that a file's name asks for."""
    suffix = Path(output).suffix.lower()
    return suffix if suffix in FORMATS else ".npy"


def _identity(logits, targets, options, backend):
    """What makes a run the same as another, and its records the same bytes."""
    backend = backends.choose(backend).__name__.rpartition(".")[2]
    return {
        "version": fastxent.__version__,
        "logits": logits.stamp(),
        "targets": targets.stamp(),
        "logits dtype": str(logits.dtype),
    } | {name.replace("_", " "): value for name, value in (asdict(options) | {"backend": backend}).items()}


def _run(logits, targets, options, backend, step, on_nan, spool, advance, started):
    rows, first, read = math.prod(targets.shape), spool.done, 0
    row_bytes = logits.shape[-1] * logits.dtype.itemsize
    advance(first, rows)
    if spool.published is None:
        for records in score_blocks(logits, targets, options, backends.choose(backend), step, first):
            if on_nan == "error":
                _refuse_nan(records, spool.done)
            spool.append(records)
            read += int(records["valid"].sum()) * row_bytes
            advance(spool.done, rows)
        summary = Summary.of(spool.records())
    else:
        summary = Summary(**spool.published)
    try:
        spool.publish(asdict(summary))
    except FileExistsError as error:
        raise RunError(str(error)) from error
    return summary.timed(time.perf_counter() - started, rows - first, read)


def _refuse_nan(records, first):
    nan = records["valid"] & np.isnan(records["log_prob"])
    if nan.any():
        raise RunError(f"the log-probability of row {first + int(nan.argmax())} is NaN, the first of its kind")


def rows_at_a_time(logits, targets, options, memory=MEMORY, chunk_rows=None):
    """How many rows of logits to take at a time so that ``memory`` bytes are enough.

    Two blocks exist at a time, one being read and one being scored. What is mapped takes no memory of the process, and
    a row of it may be of any length. What is decoded takes `fastxent.io.Source.piece_bytes` beside the blocks.
    """
    row_bytes, pieces = logits.shape[-1] * logits.dtype.itemsize, logits.piece_bytes + targets.piece_bytes
    share = memory // 2 if logits.mapped else (memory - pieces) // 4
    if not logits.mapped and share < row_bytes:
        raise ValueError(
            f"{logits.name}: a row of {row_bytes:,} bytes, decoded by {pieces:,}, needs memory of at least "
            f"{4 * row_bytes + pieces:,} bytes; got {memory:,}"
        )
    kept = memory // 4 // (_ROW_BYTES + record_dtype(logits.dtype, options.top_k).itemsize)
    return max(1, min(share // row_bytes, kept, chunk_rows or kept))


def check_pair(logits, targets, options):
    """Logits and targets fit together, or an IndexError, TypeError or ValueError says why not; reads no logit."""
    if not checks.is_floating(logits.dtype) and logits.dtype.kind in "Vu" and logits.dtype.itemsize <= 2:
        raise io.SourceError(
            f"{logits.name}: holds {logits.dtype}, which may be any of {', '.join(io.NAMELESS)}; "
            "the logits' dtype must be given"
        )
    checks.check_logits(logits.shape, logits.dtype)
    options.check(logits.shape)
    arguments.check_targets(targets.shape, targets.dtype, logits.shape)
    rows = math.prod(targets.shape)
    for start in range(0, rows, _ROWS):
        marked_targets(targets, options, start, min(rows, start + _ROWS), logits.shape[-1])


def marked_targets(targets, options, start, stop, classes):
    """The targets of rows ``start`` to ``stop``, marked as `fastxent.arguments.mark_ignored` does."""
    if not options.shift:
        return arguments.mark_ignored(targets.block(start, stop), options.ignore_index, classes, start)[0]
    length = targets.shape[-1]
    beyond = np.arange(start, stop) % length >= length - options.shift
    shifted = np.zeros(stop - start, targets.dtype)
    present = targets.block(*(min(math.prod(targets.shape), position + options.shift) for position in (start, stop)))
    shifted[: len(present)] = present
    shifted[beyond] = 0
    marked, _ = arguments.mark_ignored(shifted, options.ignore_index, classes, start)
    return np.where(beyond, IGNORED, marked)


def score_blocks(logits, targets, options, verbs, step, first=0):
    """Records of rows ``first`` and on, ``step`` at a time, while the next block of logits is read."""
    for marked, block in ahead(_read(logits, targets, options, step, first)):
        records = score_rows(block, marked, None, options, verbs)
        del block
        logits.check_unchanged()
        targets.check_unchanged()
        yield records


def _read(logits, targets, options, step, first):
    rows, classes = math.prod(targets.shape), logits.shape[-1]
    for start in range(first, rows, step):
        stop = min(rows, start + step)
        marked = marked_targets(targets, options, start, stop, classes)
        yield marked, logits.block(start * classes, stop * classes).reshape(stop - start, classes)
