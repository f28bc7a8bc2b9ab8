"""A scoring run over files: blocks of logits in, records out, and a summary.

What a record holds is said by `record_dtype` and `score_rows` alone; everything else carries records of any fields.
A run keeps what it has finished when it is killed, and goes on from there (`fastxent.io.spool`).
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import fastxent
from fastxent import arguments, backends, checks, io
from fastxent.io.ahead import ahead
from fastxent.io.publish import FORMATS
from fastxent.io.source import line
from fastxent.io.spool import Spool
from fastxent.state import IGNORED
from fastxent.summary import Summary

MEMORY = 256 << 20
_ROWS = 1 << 20  # targets checked at a time
_ROW_BYTES = 256  # what is kept of a row of a block beside its record, and some more


class RunError(RuntimeError):
    """A run that began and could not end; what it had finished is kept and can be resumed."""


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What a record depends on beside logits and targets.

    ``ignore_index``, ``temperature`` and ``backend`` are those of `fastxent.cross_entropy`. With ``shift`` s the
    logits at position i of the last axis of targets are scored against the target at i + s; the last s positions have
    no target and are not valid.
    """

    ignore_index: int | None = -100
    temperature: float = 1.0
    shift: int = 0
    backend: str | None = None

    def __post_init__(self):
        checks.read_positive("temperature", self.temperature)
        if self.shift < 0:
            raise ValueError(f"shift must not be negative; got {self.shift}")


def record_dtype(logits_dtype, options):
    """The dtype of a score record: ``log_prob`` in nats, never above 0 and NaN where not ``valid``; ``is_greedy``."""
    return np.dtype([("log_prob", checks.loss_dtype(logits_dtype)), ("valid", np.bool_), ("is_greedy", np.bool_)])


def score_rows(block, targets, options):
    """Records of whole rows of logits (n, V) under marked targets (n,); `fastxent.arguments.mark_ignored` marks them.

    The target is greedy if it is the largest logit, the lowest id among equals.
    """
    verbs = backends.choose(options.backend)
    statistics = verbs.statistics(block, targets, temperature=options.temperature, wanted=("peak",))
    records = np.empty(len(block), record_dtype(block.dtype, options))
    records["valid"] = valid = targets != IGNORED
    records["log_prob"] = np.where(valid, 0.0 - statistics.nll, np.nan)
    target_logit = block[np.arange(len(block)), np.maximum(targets, 0)]
    peak = statistics.peak.astype(records["log_prob"].dtype)
    records["is_greedy"] = valid & (target_logit > peak)
    tied = np.flatnonzero(valid & (target_logit == peak))
    records["is_greedy"][tied] = block[tied].argmax(axis=1) == targets[tied]
    return records


def score_file(
    logits,
    targets,
    output,
    options=RecordOptions(),
    *,
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
    options : RecordOptions
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
            record_dtype(logits.dtype, options),
            targets.shape,
            _identity(logits, targets, options),
            file_format or format_of(output),
            replace=replace,
            resume=resume,
            inputs=[*logits.paths(), *targets.paths()],
        )
        try:
            with spool:
                return _run(logits, targets, options, step, on_nan, spool, advance, started)
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


def _identity(logits, targets, options):
    """What makes a run the same as another, and its records the same bytes."""
    backend = backends.choose(options.backend).__name__.rpartition(".")[2]
    return {
        "version": fastxent.__version__,
        "logits": logits.stamp(),
        "targets": targets.stamp(),
        "logits dtype": str(logits.dtype),
    } | {name.replace("_", " "): value for name, value in (asdict(options) | {"backend": backend}).items()}


def _run(logits, targets, options, step, on_nan, spool, advance, started):
    rows, first, read = math.prod(targets.shape), spool.done, 0
    row_bytes = logits.shape[-1] * logits.dtype.itemsize
    advance(first, rows)
    if spool.published is None:
        for records in score_blocks(logits, targets, options, step, first):
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
    kept = memory // 4 // (_ROW_BYTES + record_dtype(logits.dtype, options).itemsize)
    return max(1, min(share // row_bytes, kept, chunk_rows or kept))


def check_pair(logits, targets, options):
    """Logits and targets fit together, or an IndexError, TypeError or ValueError says why not; reads no logit."""
    if not checks.is_floating(logits.dtype) and logits.dtype.kind in "Vu" and logits.dtype.itemsize <= 2:
        raise io.SourceError(
            f"{logits.name}: holds {logits.dtype}, which may be any of {', '.join(io.NAMELESS)}; "
            "the logits' dtype must be given"
        )
    checks.check_logits(logits.shape, logits.dtype)
    arguments.check_targets(targets.shape, targets.dtype, logits.shape)
    if options.shift and not targets.shape:
        raise ValueError("shift needs a sequence of targets; got a scalar")
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


def score_blocks(logits, targets, options, step, first=0):
    """Records of rows ``first`` and on, ``step`` at a time, while the next block of logits is read."""
    for marked, block in ahead(_read(logits, targets, options, step, first)):
        records = score_rows(block, marked, options)
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
