"""Scoring logits larger than memory: one record a target, block by block, and a summary."""

import math
import time
from dataclasses import asdict, dataclass, field

import numpy as np

from fastxent import arguments, backends, checks, io
from fastxent.state import IGNORED, STRIP, LseState

# logits mapped at a time; a row longer than this goes in blocks of classes
BLOCK_BYTES = 64 << 20
_ROWS = 1 << 20  # and rows: what is kept of one is some 60 bytes


class RunError(RuntimeError):
    """A run that began and could not end; what it had written is gone."""


@dataclass(slots=True)
class Summary:
    """What a scoring run found; means are over valid rows whose loss is a number."""

    rows: int = 0
    valid: int = 0
    nan: int = 0
    correct: int = 0
    total_nll: float = 0.0
    seconds: float = 0.0
    bytes_read: int = 0
    _started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def mean_nll(self):
        """Mean negative log-likelihood in nats."""
        counted = self.valid - self.nan
        return self.total_nll / counted if counted else math.nan

    @property
    def perplexity(self):
        """exp of the mean negative log-likelihood; inf where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 709.0 else self.mean_nll * math.inf

    def as_dict(self):
        """Every figure by name, in plain numbers."""
        figures = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        counted = self.valid - self.nan
        return figures | {
            "mean_nll_nats": self.mean_nll,
            "mean_nll_bits": self.mean_nll / math.log(2),
            "perplexity": self.perplexity,
            "accuracy": self.correct / counted if counted else math.nan,
            "rows_per_second": self.rows / self.seconds if self.seconds else math.nan,
            "gigabytes_per_second": self.bytes_read / self.seconds / 1e9 if self.seconds else math.nan,
        }

    def add(self, records, greedy, size):
        """Count a block of `score_blocks`."""
        log_prob, valid = records["log_prob"], records["valid"]
        finite = valid & ~np.isnan(log_prob)
        self.rows += len(valid)
        self.valid += int(valid.sum())
        self.nan += int((valid & ~finite).sum())
        self.correct += int((greedy & finite).sum())
        self.total_nll -= float(log_prob[finite].sum(dtype=np.float64))
        self.bytes_read += size
        self.seconds = time.perf_counter() - self._started


def record_dtype(logits_dtype):
    """The dtype of a score record: ``log_prob`` in nats, never above 0 and NaN where not ``valid``, and ``valid``."""
    return np.dtype([("log_prob", np.dtype(logits_dtype).newbyteorder("=")), ("valid", np.bool_)])


def score_file(
    logits, targets, output, ignore_index=-100, backend=None, replace=False, advance=lambda done, rows: None
):
    """Score .npy files: logits (..., V) against targets (...), one record a target to ``output``.

    Parameters
    ----------
    logits, targets, output : path-like
    ignore_index, backend
        As for `fastxent.cross_entropy`.
    replace : bool
        Whether an ``output`` that exists gives way.
    advance : callable
        Told the rows done and their whole number after every block.

    Returns
    -------
    Summary

    Raises
    ------
    fastxent.io.SourceError, FileExistsError, IndexError, TypeError, ValueError
        For bad input, before anything is written.
    RunError
        If the run fails later; the output is not there then.
    """
    with io.NpySource(logits) as logits, io.NpySource(targets) as targets:
        blocks = score_blocks(logits, targets, ignore_index, backend)
        dtype, inputs = record_dtype(logits.dtype), (logits.path, targets.path)
        sink = io.NpySink(output, dtype, targets.shape, replace=replace, inputs=inputs)
        try:
            return _write(blocks, sink, math.prod(targets.shape), advance)
        except (OSError, MemoryError, io.SourceError) as error:
            raise RunError(str(error) or type(error).__name__) from error


def _write(blocks, sink, rows, advance):
    summary = Summary()
    with sink:
        for records, greedy, size in blocks:
            sink.append(records)
            summary.add(records, greedy, size)
            advance(summary.rows, rows)
    return summary


def score_blocks(logits, targets, ignore_index=-100, backend=None, block_bytes=BLOCK_BYTES):
    """Score logits (..., V) against targets (...) from sources, an iterator of ``records, greedy, bytes``.

    Parameters
    ----------
    logits, targets : fastxent.io.NpySource
        Or another object with ``shape``, ``dtype`` and ``block(start, stop)``.
    ignore_index, backend
        As for `fastxent.cross_entropy`.
    block_bytes : int
        Logits taken at a time.

    Returns
    -------
    iterator, block by block, of
    records : structured ndarray
        See `record_dtype`.
    greedy : ndarray of bool
        Whether the target is the largest logit, the lowest id among equals.
    bytes : int
        Of logits that belong to these records.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `fastxent.cross_entropy`, before any logit is read.
    """
    checks.check_logits(logits.shape, logits.dtype)
    arguments.check_targets(targets.shape, targets.dtype, logits.shape)
    rows, classes = math.prod(targets.shape), logits.shape[-1]
    for start in range(0, rows, _ROWS):
        arguments.mark_ignored(targets.block(start, min(rows, start + _ROWS)), ignore_index, classes, start)
    return _blocks(logits, targets, rows, classes, ignore_index, backends.choose(backend), block_bytes)


def _blocks(logits, targets, rows, classes, ignore_index, verbs, block_bytes):
    row_bytes = classes * logits.dtype.itemsize
    step = min(_ROWS, max(1, block_bytes // row_bytes))
    score_rows = _score_whole_rows if row_bytes <= block_bytes else _score_long_row
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        marked, _ = arguments.mark_ignored(targets.block(start, stop), ignore_index, classes, start)
        nll, greedy = score_rows(logits, marked, start, verbs, block_bytes)
        valid = marked != IGNORED
        yield _records(logits.dtype, nll, valid), greedy, int(valid.sum()) * row_bytes


def _score_whole_rows(logits, targets, start, verbs, block_bytes):
    classes = logits.shape[-1]
    block = logits.block(start * classes, (start + len(targets)) * classes).reshape(len(targets), classes)
    statistics = verbs.statistics(block, targets, wanted=("peak",))
    valid = targets != IGNORED
    target_logit = block[np.arange(len(block)), np.maximum(targets, 0)]
    greedy = valid & (target_logit > statistics.peak)
    tied = np.flatnonzero(valid & (target_logit == statistics.peak))
    greedy[tied] = block[tied].argmax(axis=1) == targets[tied]
    return statistics.nll, greedy


def _score_long_row(logits, targets, row, verbs, block_bytes):
    """One row, in blocks of classes; its state goes from block to block."""
    if targets[0] == IGNORED:
        return np.zeros(1), np.zeros(1, bool)
    state, peak, largest, classes = LseState.empty(1), -np.inf, -1, logits.shape[-1]
    step = max(1, block_bytes // (logits.dtype.itemsize * STRIP)) * STRIP
    for start in range(0, classes, step):
        block = logits.block(row * classes + start, row * classes + min(classes, start + step))[None]
        state = verbs.accumulate(block, targets, vocab_start=start, state=state)
        if (block_peak := np.fmax.reduce(block[0])) > peak:
            peak, largest = block_peak, start + int((block[0] == block_peak).argmax())
    return state.nll(), targets == largest


def _records(dtype, nll, valid):
    records = np.empty(len(nll), record_dtype(dtype))
    records["log_prob"] = np.where(valid, 0.0 - nll, np.nan)
    records["valid"] = valid
    return records
