"""Scores: what a scorer wants of each target under its logits, in one read of them."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastxent import arguments, backends, checks, metrics
from fastxent.rows import as_rows
from fastxent.state import IGNORED

_PIECE = 1 << 25  # elements between two calls of ``progress``


def score(
    logits: ArrayLike | Iterator,
    targets: ArrayLike,
    *,
    top_k: int = 0,
    ids: ArrayLike | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    axis: int = -1,
    progress: Callable[[int, int], Any] | None = None,
    backend: str | None = None,
) -> "Scores":
    r"""What a scorer wants of each target: log-probability, rank, entropy, the largest classes, in one read.

    With p = softmax of a row's logits z = softcap tanh(logits / softcap) / temperature and target t:
    ``log_prob`` :math:`= \log p_t`, ``lse`` :math:`= \log \sum_k e^{z_k}`, ``entropy``
    :math:`= -\sum_k p_k \log p_k`, ``sum_p2`` :math:`= \sum_k p_k^2`, all in nats and with every digit on confident
    rows; ``rank``, one more than there are logits above the target's, and ``rank_hi``, which counts those level with it
    too; ``argmax``, the largest logit's class, the lowest of equals, and whether that is the target, ``is_greedy``.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float8, float32 or float64, shape (..., V); or an iterator
        Memory maps too. An iterator gives such arrays one after another, whose rows together are those of the targets.
        Logits on a CUDA device stay there, and the call waits for them; targets and scores are the host's.
    targets : array_like of integers, shape (...)
        Class indices in [0, V), or ``ignore_index``.
    top_k : int
        How many of the largest classes to keep, with their log-probabilities.
    ids : array_like of integers, shape (..., K) or (K,), optional
        Classes whose log-probability is wanted too, for each row or for all.
    ignore_index : int or None
        A target with this value counts for nothing and its row is not read; None switches it off.
    temperature, softcap : float
        As for `fastxent.cross_entropy`.
    shift : int
        1 scores next tokens: the logits at a position of the last axis of targets against the target one position on;
        the last position has none and is not valid, the first target belongs to none and is not looked at. No logits
        are copied.
    axis : int
        Where the classes are.
    progress : callable, optional
        Told after every block how many rows are done, and of how many.
    backend : str, optional
        A name from `fastxent.backends`.

    Returns
    -------
    Scores
        Of the targets' shape; its floats are float64 for float64 logits, else float32.

    Raises
    ------
    IndexError
        If a target or one of ``ids`` is out of range; the message counts them and shows the first.
    TypeError, ValueError
        If an argument has the wrong dtype, shape or value.
    BackendUnavailableError
        If the backend cannot run here.
    NotImplementedError
        If the logits are on another GPU than the first.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> scores = fastxent.score(np.float32([[20, 0, 0], [0, 1, 2]]), [0, 1], top_k=2)
    >>> scores.log_prob
    array([-4.1223074e-09, -1.4076060e+00], dtype=float32)
    >>> scores.rank.tolist(), scores.is_greedy.tolist(), scores.top_ids.tolist()
    ([1, 2], [True, False], [[0, 1], [2, 1]])
    """
    options = arguments.ScoreOptions(top_k, ignore_index, temperature, softcap, shift)
    if checks.is_on_device(targets) and not hasattr(targets, "__array__"):
        raise TypeError("targets must be in memory of the host, as scores are, not on a GPU")
    targets = np.asarray(targets)
    if checks.is_on_device(logits):
        shape, rows = backends.for_device(backend).ready(logits, axis)
        verbs, dtype, blocks = backends.get("cuda"), rows.dtype, iter([rows])
    else:
        verbs = backends.choose(backend)
        shape, dtype, blocks = blocks_of(logits, targets.shape, axis, None if progress is None else _PIECE)
    marked, wanted = arguments.read_score_targets(shape, targets, ids, options, axis)
    records, done = np.empty(marked.size, record_dtype(dtype, top_k, 0 if wanted is None else wanted.shape[1])), 0
    for block in blocks:
        part = slice(done, done := done + len(block))
        check_block(block, shape[-1], dtype, part, len(records))
        records[part] = score_rows(block, marked[part], None if wanted is None else wanted[part], options, verbs)
        if progress is not None:
            progress(done, len(records))
    check_all(done, len(records))
    return Scores.from_records(records.reshape(targets.shape))


def blocks_of(logits, shape, axis, piece):
    """Shape (..., V) and dtype of logits for targets of ``shape``, and their rows block by block: those of an iterator
    as they come, of an array ``piece`` elements at a time, or None for all at once.
    """
    if isinstance(logits, Iterator):
        blocks = (as_rows(checks.read_logits(block, axis)) for block in logits)
        first = next(blocks, None)
        if first is None:
            raise ValueError("logits must give at least one block; the iterator was empty")
        return (*shape, first.shape[1]), first.dtype, itertools.chain([first], blocks)
    array = checks.read_logits(logits, axis)
    rows = as_rows(array)
    step = max(1, len(rows)) if piece is None else max(1, piece // rows.shape[1])
    starts = range(0, max(1, len(rows)), step)
    return array.shape, array.dtype, (rows if step >= len(rows) else rows[i : i + step] for i in starts)


def check_block(block, classes, dtype, part, rows):
    """A block is the next ``part`` of ``rows`` rows, or a ValueError says why not."""
    if block.shape[1] != classes or block.dtype != dtype or part.stop > rows:
        raise ValueError(
            f"blocks of logits must be {dtype} rows of {classes} classes, {rows} in all; "
            f"got {block.dtype} of shape {block.shape} after {part.start} rows"
        )


def check_all(done, rows):
    """Blocks have given every row, or a ValueError says how many they gave."""
    if done < rows:
        raise ValueError(f"blocks of logits must have a row for each of {rows} targets; they ended after {done}")


def record_dtype(logits_dtype, top_k, ids=0):
    """The dtype of the record of one score: the fields of `Scores`, and of ``top_k`` and ``ids`` where asked for."""
    real, index = checks.loss_dtype(logits_dtype), np.dtype(np.int64)
    fields: list[Any] = [("log_prob", real), ("lse", real), ("entropy", real), ("sum_p2", real)]
    fields += [("rank", index), ("rank_hi", index), ("argmax", index), ("is_greedy", np.bool_), ("valid", np.bool_)]
    fields += [("top_ids", index, (top_k,)), ("top_log_probs", real, (top_k,)), ("id_log_probs", real, (ids,))]
    return np.dtype([field for field in fields if len(field) == 2 or field[2] != (0,)])


def score_rows(logits, targets, ids, options, verbs):
    """Records of rows of logits (N, V) under marked targets (N,), with `fastxent.arguments.ScoreOptions`."""
    softcap, temperature = options.softcap, options.temperature
    found = verbs.score(logits, targets, ids=ids, top_k=options.top_k, softcap=softcap, temperature=temperature)
    records = np.empty(len(logits), record_dtype(logits.dtype, options.top_k, found.id_log_probs.shape[1]))
    fill_records(records, found, targets)
    return records


def fill_records(records, found, targets):
    """Write `fastxent.state.RowScores` under marked targets into records that have at least the fields of `Scores`."""
    records["valid"] = targets != IGNORED
    records["log_prob"] = np.where(records["valid"], 0.0 - found.nll, np.nan)
    records["is_greedy"] = (found.argmax == targets) & records["valid"]
    for name, column in found._asdict().items():
        if name in records.dtype.names:
            records[name] = column


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What `score` found: an array for each figure, all of the targets' shape.

    Floats are in nats, and NaN where a row is not ``valid`` or its loss is no number; there classes are -1 and ranks 0.

    Attributes
    ----------
    log_prob : ndarray of float32 or float64
        Minus the loss, never above 0.
    lse : ndarray of floats
        The logsumexp of the logits.
    entropy, sum_p2 : ndarray of floats
        Of the softmax: -sum p log p, and sum p^2, the chance that two draws agree.
    rank, rank_hi : ndarray of int64
        The target's, from 1; ties count for it in rank and against it in rank_hi.
    argmax : ndarray of int64
        The class of the largest logit, the lowest of equals.
    is_greedy : ndarray of bool
        Whether that is the target.
    valid : ndarray of bool
        Whether the row has a target.
    top_ids, top_log_probs : ndarray of int64, and of floats, shape (..., top_k)
        The largest classes, the lower first among equals.
    id_log_probs : ndarray of floats, shape (..., K)
        Of the classes asked for by ``ids``.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> scores = fastxent.score(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), [0, 2])
    >>> print(scores)
    2 rows, 2 valid, 0 NaN
    mean NLL      1.497866 nats, 2.160964 bits
    perplexity    4.472136 +- 3.598813
    accuracy      50.00%
    entropy       0.839376 nats
    """

    log_prob: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    sum_p2: np.ndarray
    rank: np.ndarray
    rank_hi: np.ndarray
    argmax: np.ndarray
    is_greedy: np.ndarray
    valid: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray
    id_log_probs: np.ndarray

    @classmethod
    def from_records(cls, records):
        """Scores of a structured array, as `load` reads it and ``fastxent score`` writes it: views, no copy."""
        nothing = {
            "top_ids": np.empty((*records.shape, 0), np.int64),
            "top_log_probs": np.empty((*records.shape, 0), records.dtype["log_prob"]),
        }
        nothing["id_log_probs"] = nothing["top_log_probs"]
        return cls(**nothing | {name: records[name] for name in records.dtype.names if name in cls.__slots__})

    def to_records(self):
        """One structured array: a record a target."""
        dtype = record_dtype(self.log_prob.dtype, self.top_ids.shape[-1], self.id_log_probs.shape[-1])
        records = np.empty(self.shape, dtype)
        for name in dtype.names:
            records[name] = getattr(self, name)
        return records

    @property
    def shape(self):
        """That of the targets."""
        return self.log_prob.shape

    def __len__(self):
        return len(self.log_prob)

    def __getitem__(self, index):
        """The scores at an index of the targets' axes: slices, a mask, an array of rows."""
        return Scores(*(getattr(self, field)[index] for field in self.__slots__))

    def __eq__(self, other):
        """Whether all figures are the same, NaN like NaN."""
        if not isinstance(other, Scores):
            return NotImplemented
        mine, theirs = self.to_records(), other.to_records()
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes()

    @classmethod
    def concatenate(cls, parts: Iterable["Scores"]) -> "Scores":
        """The scores of several parts, one after another along the first axis."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, field) for part in parts]) for field in cls.__slots__))

    def flat(self):
        """The same scores, row after row: every array with one axis of rows."""
        rows, axes = self.log_prob.size, len(self.shape)
        arrays = (getattr(self, field) for field in self.__slots__)
        return Scores(*(array.reshape(rows, *array.shape[axes:]) for array in arrays))

    def as_dict(self):
        """Every array by name."""
        return {field: getattr(self, field) for field in self.__slots__}

    def save(self, path):
        """Write the records to a .npy file."""
        with Path(path).open("wb") as file:
            np.save(file, self.to_records(), allow_pickle=False)

    @classmethod
    def load(cls, path):
        """The scores in a .npy file of `save` or ``fastxent score``."""
        return cls.from_records(np.load(path, allow_pickle=False))

    def metrics(self, by=None, *, word_counts=None, byte_counts=None):
        """`fastxent.metrics.Metrics` of all rows, or of each group ``by`` names; see `fastxent.metrics.measure`."""
        return metrics.measure(self, by, word_counts=word_counts, byte_counts=byte_counts)

    def calibration(self, bins=15):
        """`fastxent.metrics.Calibration` of the largest class: how often it is right against how sure it is."""
        return metrics.calibrate(self, bins)

    def __str__(self):
        """The figures of all rows."""
        return str(self.metrics())
