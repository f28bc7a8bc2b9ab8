"""A scoring run over files: blocks of logits in, records out, and a summary.

A record holds what `fastxent.scoring` says; everything here carries records of any fields.
A run keeps what it has finished when it is killed, and goes on from there (`fastxent.io.spool`).
"""

import contextlib
import json
import math
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import fastxent
from fastxent import arguments, backends, checks, io, scoring
from fastxent.arguments import ScoreOptions
from fastxent.io.ahead import ahead
from fastxent.io.publish import FORMATS
from fastxent.io.source import line
from fastxent.io.spool import Spool
from fastxent.models import compare_rows, comparison_fields
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
    other=None,
    questions=None,
    logits_dtype=None,
    file_format=None,
    memory=MEMORY,
    chunk_rows=None,
    on_nan="count",
    resume=False,
    replace=False,
    advance=lambda done, rows: None,
    cluster=None,
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
    other : path-like or sequence of path-like, optional
        Another model's logits, of the same shape: records then have the fields of `fastxent.compare_models` too.
    questions : fastxent.digest.Questions, optional
        What is asked of the records beside their summary; it holds the answer afterwards.
    logits_dtype : str, optional
        What the logits are where their file cannot name it: one of `fastxent.io.NAMELESS`.
    file_format : str, optional
        ".npy", ".parquet" or ".zarr"; by default what the name of ``output`` ends with, else ".npy".
    memory : int
        Bytes that blocks and what is decoded may take, beside the process itself.
    chunk_rows : int, optional
        At most so many rows at a time.
    on_nan : {"count", "error"}
        Whether a valid row whose log-probability is NaN ends the run, be it one that an earlier run has left.
    resume : bool
        Go on with what an earlier run has left; the result has the bytes of a run that was never interrupted.
    replace : bool
        Whether an ``output`` that exists gives way, and what an earlier run has left.
    advance : callable
        Told the rows done and their whole number after every block.
    cluster : fastxent.distributed.Cluster, optional
        Whose workers read and score the blocks; the same bytes come out.

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
    with contextlib.ExitStack() as stack:
        names = [logits] if other is None else [logits, other]
        models = [stack.enter_context(io.open_source(name, logits_dtype)) for name in names]
        target_names, targets = targets, stack.enter_context(io.open_source(targets))
        check_sources(models, targets, options)
        if questions is not None:
            questions.prepare(targets.shape)
        step = rows_at_a_time(models, targets, options, memory, chunk_rows)
        spool = Spool(
            output,
            record_dtype(models, options),
            targets.shape,
            _identity(models, targets, options, backend),
            file_format or format_of(output),
            replace=replace,
            resume=resume,
            inputs=[path for source in (*models, targets) for path in source.paths()],
        )
        try:
            with spool:
                blocks = _blocks_on(cluster, names, target_names, logits_dtype, models, targets, options, backend, step)
                return _run(models, targets, blocks, on_nan, spool, questions, advance, started)
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


def record_dtype(models, options):
    """Of one target's record: what `fastxent.Scores` has, and `fastxent.compare_models` of a second model."""
    fields = scoring.record_dtype(models[0].dtype, options.top_k).descr
    return np.dtype(fields + (comparison_fields(*(model.dtype for model in models)) if len(models) > 1 else []))


def _identity(models, targets, options, backend):
    """What makes a run the same as another, and its records the same bytes."""
    backend = backends.choose(backend).__name__.rpartition(".")[2]
    return {
        "version": fastxent.__version__,
        **{name: model.stamp() for name, model in zip(("logits", "other"), models, strict=False)},
        "targets": targets.stamp(),
        "logits dtype": str(models[0].dtype),
    } | {name.replace("_", " "): value for name, value in (asdict(options) | {"backend": backend}).items()}


def _blocks_on(cluster, names, target_names, logits_dtype, models, targets, options, backend, step):
    """A function of the first row that gives the records from there on, block by block, made here or on a cluster."""
    if cluster is None:
        return lambda first: score_blocks(models, targets, options, backends.choose(backend), step, first)
    job = Job(
        version=fastxent.__version__,
        models=tuple(map(io.absolute, names)),
        targets=io.absolute(target_names),
        logits_dtype=logits_dtype,
        options=options,
        backend=backends.choose(backend).__name__.rpartition(".")[2],
        stamps=_stamps(models, targets),
    )
    return lambda first: cluster.score_blocks(job, math.prod(targets.shape), step, first)


def _run(models, targets, blocks, on_nan, spool, questions, advance, started):
    rows, first, read = math.prod(targets.shape), spool.done, 0
    row_bytes = sum(_row_bytes(model) for model in models)
    advance(first, rows)
    if spool.published is None:
        if on_nan == "error":
            _refuse_nan(spool.written(), 0)
        for records in blocks(first):
            if on_nan == "error":
                _refuse_nan(records, spool.done)
            spool.append(records)
            read += int(records["valid"].sum()) * row_bytes
            advance(spool.done, rows)
        summary = Summary.of(spool.records())
        if questions is not None:
            questions.answer(spool.records())
    elif questions is not None:
        raise RunError("the records are on their way to the output already; finish without questions, or begin again")
    else:
        summary = Summary(**spool.published)
    if on_nan == "error" and summary.nan:
        raise RunError(f"{summary.nan} of the records are NaN, and on their way to the output already; begin again")
    try:
        spool.publish(asdict(summary))
    except FileExistsError as error:
        raise RunError(str(error)) from error
    return summary.timed(time.perf_counter() - started, rows - first, read)


def _refuse_nan(records, first):
    nan = records["valid"] & np.isnan(records["log_prob"])
    if nan.any():
        raise RunError(f"the log-probability of row {first + int(nan.argmax())} is NaN, the first of its kind")


def _row_bytes(source):
    return source.shape[-1] * source.dtype.itemsize


def rows_at_a_time(models, targets, options, memory=MEMORY, chunk_rows=None):
    """How many rows of logits to take at a time so that ``memory`` bytes are enough.

    Two blocks exist at a time, one being read and one being scored. What is mapped takes no memory of the process, and
    a row of it may be of any length. What is decoded takes `fastxent.io.Source.piece_bytes` beside the blocks.
    """
    row_bytes, mapped = sum(map(_row_bytes, models)), all(model.mapped for model in models)
    pieces = sum(source.piece_bytes for source in (*models, targets))
    share = memory // 2 if mapped else (memory - pieces) // 4
    if not mapped and share < row_bytes:
        raise ValueError(
            f"{models[0].name}: a row of {row_bytes:,} bytes, decoded by {pieces:,}, needs memory of at least "
            f"{4 * row_bytes + pieces:,} bytes; got {memory:,}"
        )
    kept = memory // 4 // (_ROW_BYTES + record_dtype(models, options).itemsize)
    return max(1, min(share // row_bytes, kept, chunk_rows or kept))


def check_sources(models, targets, options):
    """Logits and targets fit together, or an IndexError, TypeError or ValueError says why not; reads no logit."""
    for model in models:
        _check_model(model, targets, options)
    if len({model.shape for model in models}) > 1:
        raise ValueError(f"logits of two models must have one shape; got {models[0].shape} and {models[1].shape}")
    rows = math.prod(targets.shape)
    for start in range(0, rows, _ROWS):
        marked_targets(targets, options, start, min(rows, start + _ROWS), models[0].shape[-1])


def _check_model(logits, targets, options):
    if not checks.is_floating(logits.dtype) and logits.dtype.kind in "Vu" and logits.dtype.itemsize <= 2:
        raise io.SourceError(
            f"{logits.name}: holds {logits.dtype}, which may be any of {', '.join(io.NAMELESS)}; "
            "the logits' dtype must be given"
        )
    checks.check_logits(logits.shape, logits.dtype)
    options.check(logits.shape)
    arguments.check_targets(targets.shape, targets.dtype, logits.shape)


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


def score_blocks(models, targets, options, verbs, step, first=0):
    """Records of rows ``first`` and on, ``step`` at a time, while the next blocks of logits are read."""
    rows = math.prod(targets.shape)
    slices = ((start, min(rows, start + step)) for start in range(first, rows, step))
    for read in ahead(_read(models, targets, options, *part) for part in slices):
        yield _score_read(read, models, targets, options, verbs)


def _score_read(read, models, targets, options, verbs):
    """Records of what `_read` gives."""
    marked, *blocks = read
    if len(models) > 1:
        records = compare_rows(blocks[0], blocks[1], marked, options, verbs)
    else:
        records = scoring.score_rows(blocks[0], marked, None, options, verbs)
    read.clear()
    for source in (*models, targets):
        source.check_unchanged()
    return records


def _read(models, targets, options, start, stop):
    classes = models[0].shape[-1]
    marked = marked_targets(targets, options, start, stop, classes)
    blocks = (model.block(start * classes, stop * classes) for model in models)
    return [marked, *(block.reshape(stop - start, classes) for block in blocks)]


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to score rows of a run: paths and options, no data.

    ``stamps`` tells whether it sees the files of the run.
    """

    version: str
    models: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    logits_dtype: str | None
    options: ScoreOptions
    backend: str
    stamps: str

    def score(self, start, stop):
        """Records of rows ``start`` to ``stop``; the files stay open in this thread for the next ones."""
        try:
            *models, targets = _opened.of(self)
            read = _read(models, targets, self.options, start, stop)
            return _score_read(read, models, targets, self.options, backends.choose(self.backend))
        except BaseException:
            _opened.close()
            raise


class _Opened(threading.local):
    """The files that a thread has open, those of one job."""

    def __init__(self):
        self._job, self._sources, self._files = None, [], contextlib.ExitStack()

    def of(self, job):
        """The sources of a job's models and targets; those of another are closed."""
        if self._job != job:
            self.close()
            opened = [(names, job.logits_dtype) for names in job.models] + [(job.targets, None)]
            self._sources = [self._files.enter_context(io.open_source(*how)) for how in opened]
            *models, targets = self._sources
            if _stamps(models, targets) != job.stamps:
                raise io.SourceError(f"{models[0].name}: is another file here than where the run was started")
            self._job = job
        return self._sources

    def close(self):
        """Close what is open."""
        self._job, self._sources = None, []
        self._files.close()


_opened = _Opened()


def _stamps(models, targets):
    return json.dumps([source.stamp() for source in (*models, targets)])
