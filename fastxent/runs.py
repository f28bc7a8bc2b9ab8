"""A scoring run over files: blocks of logits in, records out, and a summary.

What a record holds is said by `record_dtype` and `score_rows` alone; everything else carries records of any fields.
"""

import math
import time
from dataclasses import asdict, dataclass, field

import numpy as np

from fastxent import arguments, backends, checks, io
from fastxent.state import IGNORED

# logits mapped at a time, in whole rows
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

    def add(self, records, size):
        """Count a block of `score_blocks`."""
        log_prob, valid = records["log_prob"], records["valid"]
        finite = valid & ~np.isnan(log_prob)
        self.rows += len(valid)
        self.valid += int(valid.sum())
        self.nan += int((valid & ~finite).sum())
        self.correct += int((records["is_greedy"] & finite).sum())
        self.total_nll -= float(log_prob[finite].sum(dtype=np.float64))
        self.bytes_read += size
        self.seconds = time.perf_counter() - self._started


def record_dtype(logits_dtype):
    """The dtype of a score record: ``log_prob`` in nats, never above 0 and NaN where not ``valid``; ``is_greedy``."""
    return np.dtype([("log_prob", checks.loss_dtype(logits_dtype)), ("valid", np.bool_), ("is_greedy", np.bool_)])


def score_rows(block, targets, verbs, temperature=1.0):
    """Records of whole rows of logits (n, V) under marked targets (n,); `fastxent.arguments.mark_ignored` marks them.

    The target is greedy if it is the largest logit, the lowest id among equals.
    """
    statistics = verbs.statistics(block, targets, temperature=temperature, wanted=("peak",))
    records = np.empty(len(block), record_dtype(block.dtype))
    records["valid"] = valid = targets != IGNORED
    records["log_prob"] = np.where(valid, 0.0 - statistics.nll, np.nan)
    target_logit = block[np.arange(len(block)), np.maximum(targets, 0)]
    peak = statistics.peak.astype(records["log_prob"].dtype)
    records["is_greedy"] = valid & (target_logit > peak)
    tied = np.flatnonzero(valid & (target_logit == peak))
    records["is_greedy"][tied] = block[tied].argmax(axis=1) == targets[tied]
    return records


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
        blocks = score_blocks(logits, targets, ignore_index, backend=backend)
        dtype, inputs = record_dtype(logits.dtype), (logits.path, targets.path)
        sink = io.NpySink(output, dtype, targets.shape, replace=replace, inputs=inputs)
        try:
            return _write(blocks, sink, math.prod(targets.shape), advance)
        except (OSError, MemoryError, io.SourceError) as error:
            raise RunError(str(error) or type(error).__name__) from error


def _write(blocks, sink, rows, advance):
    summary = Summary()
    with sink:
        for records, size in blocks:
            sink.append(records)
            summary.add(records, size)
            advance(summary.rows, rows)
    return summary


def score_blocks(logits, targets, ignore_index=-100, temperature=1.0, backend=None, block_bytes=BLOCK_BYTES):
    """Score logits (..., V) against targets (...) from sources, an iterator of ``records, bytes``.

    Parameters
    ----------
    logits, targets : fastxent.io.NpySource
        Or another object with ``shape``, ``dtype`` and ``block(start, stop)``.
    ignore_index, temperature, backend
        As for `fastxent.cross_entropy`.
    block_bytes : int
        Logits taken at a time, in whole rows.

    Returns
    -------
    iterator, block by block, of
    records : structured ndarray
        See `record_dtype`.
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
    return _blocks(logits, targets, ignore_index, temperature, backends.choose(backend), block_bytes)


def _blocks(logits, targets, ignore_index, temperature, verbs, block_bytes):
    rows, classes = math.prod(targets.shape), logits.shape[-1]
    row_bytes = classes * logits.dtype.itemsize
    step = min(_ROWS, max(1, block_bytes // row_bytes))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        marked, _ = arguments.mark_ignored(targets.block(start, stop), ignore_index, classes, start)
        block = logits.block(start * classes, stop * classes).reshape(stop - start, classes)
        records = score_rows(block, marked, verbs, temperature)
        yield records, int(records["valid"].sum()) * row_bytes
