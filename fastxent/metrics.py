"""Figures over many scores: perplexity and its kin, accuracy, calibration; of all rows or of groups of them.

Everything is summed in float64 over valid rows whose log-probability is a number, and logarithms are natural.
"""

import math
from dataclasses import dataclass

import numpy as np

_LN2 = math.log(2.0)
_ALL = np.empty(0)  # the name of the one group of all rows


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of groups of rows, one entry each, or of all rows, then a single entry.

    Attributes
    ----------
    group : ndarray
        What names each group, in order; empty for all rows.
    rows, valid, nan : ndarray of int64
        Rows, those with a target, and of these those whose loss is no number; the figures are over the others.
    total_log_prob, mean_nll : ndarray of float64
        In nats.
    nll_error : ndarray of float64
        The standard error of mean_nll, rows taken as independent: their standard deviation over sqrt(n).
    perplexity, perplexity_error : ndarray of float64
        exp(mean_nll), and its standard error to first order, perplexity * nll_error.
    accuracy : ndarray of float64
        The share of rows whose target is the argmax.
    mean_reciprocal_rank : ndarray of float64
        The mean of 1 / rank_hi: ties count against the target.
    entropy : ndarray of float64
        The mean entropy of the softmax, in nats.
    word_perplexity, byte_perplexity, bits_per_byte : ndarray of float64
        exp(-total_log_prob / words), exp(-total_log_prob / bytes), -total_log_prob / (bytes ln 2); NaN where the number
        of words or bytes was not given.
    top_k_accuracy : ndarray of float64, shape (groups, top_k)
        The share of rows whose rank_hi is at most 1, 2, ..., as many as the scores have top classes.
    """

    group: np.ndarray
    rows: np.ndarray
    valid: np.ndarray
    nan: np.ndarray
    total_log_prob: np.ndarray
    mean_nll: np.ndarray
    nll_error: np.ndarray
    perplexity: np.ndarray
    perplexity_error: np.ndarray
    accuracy: np.ndarray
    mean_reciprocal_rank: np.ndarray
    entropy: np.ndarray
    word_perplexity: np.ndarray
    byte_perplexity: np.ndarray
    bits_per_byte: np.ndarray
    top_k_accuracy: np.ndarray

    def __len__(self):
        return len(self.rows)

    def as_dict(self):
        """Every array by name."""
        return {field: getattr(self, field) for field in self.__slots__}

    def __str__(self):
        """All rows as a paragraph, groups as a table."""
        if len(self.group):
            return self._table()
        lines = [f"{self.rows[0]:,} rows, {self.valid[0]:,} valid, {self.nan[0]:,} NaN"]
        lines.append(f"mean NLL      {self.mean_nll[0]:.6f} nats, {self.mean_nll[0] / _LN2:.6f} bits")
        lines.append(f"perplexity    {self.perplexity[0]:.6f} +- {self.perplexity_error[0]:.6f}")
        lines.append(f"accuracy      {self.accuracy[0]:.2%}")
        if self.top_k_accuracy.shape[1] > 1:
            lines.append(f"in top {self.top_k_accuracy.shape[1]:<7}{self.top_k_accuracy[0, -1]:.2%}")
        lines.append(f"entropy       {self.entropy[0]:.6f} nats")
        for name, value in (("bits per byte", self.bits_per_byte), ("per word", self.word_perplexity)):
            if not np.isnan(value[0]):
                lines.append(f"{name:<14}{value[0]:.6f}")
        return "\n".join(lines)

    def _table(self, most=20):
        lines = [f"{'group':>12} {'rows':>9} {'mean NLL':>10} {'perplexity':>12} {'accuracy':>9}"]
        for i in range(min(most, len(self))):
            lines.append(
                f"{self.group[i]!s:>12.12} {self.valid[i]:>9,} {self.mean_nll[i]:>10.4f} {self.perplexity[i]:>12.4f} "
                f"{self.accuracy[i]:>9.2%}"
            )
        if len(self) > most:
            lines.append(f"... and {len(self) - most:,} more groups")
        return "\n".join(lines)


def measure(scores, by=None, *, word_counts=None, byte_counts=None):
    """`Metrics` of scores.

    Parameters
    ----------
    scores : fastxent.Scores
    by : array_like, broadcastable to the scores' shape from the left, optional
        What names the group of each row: a document's or sequence's number, the target's own class, a language. Shape
        (B,) names the groups of scores (B, T) by sequence.
    word_counts, byte_counts : float, or array_like with one number a group in the order of `Metrics.group`
        How many words and bytes the rows of a group stand for.

    Returns
    -------
    Metrics
        An entry for each group, in the order of their names; without ``by`` one for all rows.

    Raises
    ------
    ValueError
        If a shape does not fit.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> scores = fastxent.score(np.log([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]), [0, 0, 1])
    >>> scores.metrics(by=["a", "a", "b"], byte_counts=[2, 1]).bits_per_byte.tolist()
    [1.5, 1.0]
    """
    group, index = _groups(by, scores.shape)
    sums = Sums(max(1, len(group)), scores.top_ids.shape[-1])
    sums.add(scores.flat(), index)
    return sums.metrics(group, word_counts, byte_counts)


class Sums:
    """Counts and float64 sums over rows, a group each, that grow block by block; `metrics` makes figures of them.

    Attributes
    ----------
    rows, valid, nan, correct : ndarray of int64, shape (groups,)
    n : ndarray of int64, shape (groups,)
        Rows whose log-probability is a number; all sums are over these.
    log_prob, deviation, reciprocal_rank, entropy : ndarray of float64, shape (groups,)
        deviation is the sum of squared differences from the mean log-probability.
    in_top : ndarray of int64, shape (groups, top_k)
        Rows whose rank_hi is at most 1, 2, ...
    """

    def __init__(self, groups, top_k):
        self.rows, self.valid, self.nan, self.correct, self.n = np.zeros((5, groups), np.int64)
        self.log_prob, self.deviation, self.reciprocal_rank, self.entropy = np.zeros((4, groups))
        self.in_top = np.zeros((groups, top_k), np.int64)

    def add(self, scores, index):
        """Add flat scores (N,); ``index`` (N,) says each row's group."""
        groups, counted = len(self.rows), scores.valid & ~np.isnan(scores.log_prob)
        of_counted = index[counted]

        def sum_of(values):
            return np.bincount(of_counted, values[counted], groups)

        def count(which):
            return np.bincount(index[which], minlength=groups)

        self.rows += np.bincount(index, minlength=groups)
        self.valid += count(scores.valid)
        self.nan += count(scores.valid & ~counted)
        self.correct += count(counted & scores.is_greedy)
        self._add_log_prob(scores.log_prob.astype(np.float64), count(counted), sum_of, index)
        self.reciprocal_rank += sum_of(1.0 / np.maximum(scores.rank_hi, 1))
        self.entropy += sum_of(scores.entropy.astype(np.float64))
        for k in range(self.in_top.shape[1]):
            self.in_top[:, k] += count(counted & (scores.rank_hi <= k + 1))

    def _add_log_prob(self, log_prob, n, sum_of, index):
        """Sums of deviations are joined by their means' distance: Chan, Golub and LeVeque, 1983."""
        total = sum_of(log_prob)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / n
            deviation = sum_of((log_prob - mean[index]) ** 2)
            apart = (mean - self.log_prob / self.n) ** 2 * (n * (self.n / (n + self.n)))
        self.deviation += deviation + np.where((n > 0) & (self.n > 0), apart, 0.0)
        self.log_prob += total
        self.n += n

    def metrics(self, group=_ALL, word_counts=None, byte_counts=None):
        """`Metrics` of these sums."""
        n, count = self.n, len(self.n)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            mean = 0.0 - self.log_prob / n
            error, perplexity = np.sqrt(self.deviation / (n - 1) / n), np.exp(mean)
            of_words = 0.0 - self.log_prob / _per_group("word_counts", word_counts, count)
            of_bytes = 0.0 - self.log_prob / _per_group("byte_counts", byte_counts, count)
            return Metrics(
                group=group,
                rows=self.rows,
                valid=self.valid,
                nan=self.nan,
                total_log_prob=self.log_prob,
                mean_nll=mean,
                nll_error=error,
                perplexity=perplexity,
                perplexity_error=perplexity * error,
                accuracy=self.correct / n,
                mean_reciprocal_rank=self.reciprocal_rank / n,
                entropy=self.entropy / n,
                word_perplexity=np.exp(of_words),
                byte_perplexity=np.exp(of_bytes),
                bits_per_byte=of_bytes / _LN2,
                top_k_accuracy=self.in_top / n[:, None],
            )


def _groups(by, shape):
    """The names of groups in order, and for each row the index of its own."""
    if by is None:
        return _ALL, np.zeros(math.prod(shape), np.int64)
    by = np.asarray(by)
    if by.shape != shape[: by.ndim]:
        raise ValueError(f"by must have the scores' shape {shape} or its beginning; got {by.shape}")
    group, index = np.unique(by, return_inverse=True)
    index = index.reshape(*by.shape, *(1 for _ in shape[by.ndim :]))
    return group, np.broadcast_to(index, shape).reshape(-1)


def _per_group(name, number, count):
    if number is None:
        return np.full(count, np.nan)
    number = np.asarray(number, np.float64)
    if number.shape not in ((), (count,)):
        raise ValueError(f"{name} must be one number, or one for each of {count} groups; got shape {number.shape}")
    return np.broadcast_to(number, count)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often the largest class is the target, against its probability, in bins of that probability.

    Attributes
    ----------
    edges : ndarray of float64, shape (bins + 1,)
        From 0 to 1, evenly; a bin holds its upper edge.
    count : ndarray of int64, shape (bins,)
    confidence, accuracy : ndarray of float64, shape (bins,)
        Means over the bin; NaN in an empty one.
    expected_error : float
        The expected calibration error: the mean over rows of how far accuracy and confidence of their bin differ.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    expected_error: float


def calibrate(scores, bins=15):
    """`Calibration` of scores with at least their largest class (``top_k`` 1 or more).

    Source: Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, 2017, equation 5.

    Parameters
    ----------
    scores : fastxent.Scores
        The rows that are valid and whose log-probability is a number count.
    bins : int
        How many, of equal width in [0, 1].

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        Without top classes, or if ``bins`` is not positive.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> scores = fastxent.score(np.log([[0.9, 0.1], [0.9, 0.1]]), [0, 1], top_k=1)
    >>> round(scores.calibration().expected_error, 4)  # sure at 0.9, right half the time
    0.4
    """
    sums = CalibrationSums(bins)
    sums.add(scores.flat())
    return sums.calibration()


class CalibrationSums:
    """What `Calibration` is made of, growing block by block."""

    def __init__(self, bins=15):
        if bins < 1:
            raise ValueError(f"bins must be positive; got {bins}")
        self.count, self.confidence, self.right = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)

    def add(self, scores):
        """Add flat scores with at least their largest class."""
        if scores.top_ids.shape[-1] < 1:
            raise ValueError("calibration needs the largest class; score with top_k=1 or more")
        bins, counted = len(self.count), scores.valid & ~np.isnan(scores.log_prob)
        confidence = np.exp(scores.top_log_probs[counted, 0].astype(np.float64))
        place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        self.count += np.bincount(place, minlength=bins)
        self.confidence += np.bincount(place, confidence, bins)
        self.right += np.bincount(place, scores.is_greedy[counted].astype(float), bins)

    def calibration(self):
        """`Calibration` of what was added."""
        with np.errstate(invalid="ignore"):
            confidence, accuracy = self.confidence / self.count, self.right / self.count
            error = float(np.abs(self.right - self.confidence).sum() / self.count.sum())
        return Calibration(np.linspace(0.0, 1.0, len(self.count) + 1), self.count, confidence, accuracy, error)
