"""Two models on the same targets: how far apart their distributions are, and what it costs in perplexity."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastxent import arguments, backends, checks, scoring

_PIECE = 1 << 20  # elements of each model at a time: what is scored is still in the cache when it is compared
_NORMAL_95 = 1.959963984540054
_PERCENTILES = (50, 90, 95, 99, 99.9, 100)


def compare_models(
    logits_p: ArrayLike | Iterator,
    logits_q: ArrayLike | Iterator,
    targets: ArrayLike,
    *,
    ignore_index: int | None = -100,
    shift: int = 0,
    axis: int = -1,
    progress: Callable[[int, int], Any] | None = None,
    backend: str | None = None,
) -> "ModelComparison":
    r"""Compare a model q, a quantised or distilled one, say, with its original p on the same targets.

    Both are read from memory once, a few megabytes at a time: each row's log-probabilities of the target, its
    :math:`\mathrm{KL}(p \| q) = \sum_k p_k \log(p_k / q_k)` and Jensen-Shannon divergence, summed from terms none of
    which is negative, and whether the largest logits agree.

    Parameters
    ----------
    logits_p, logits_q : array_like of shape (..., V), or two iterators of such blocks
        As for `fastxent.score`; the two may differ in dtype. Iterators must give blocks of the same rows in step.
    targets, ignore_index, shift, axis, progress, backend
        As for `fastxent.score`.

    Returns
    -------
    ModelComparison

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As for `fastxent.score`; ValueError also if the two have different shapes.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> p = np.log([[0.5, 0.5], [0.9, 0.1]])
    >>> found = fastxent.compare_models(p, np.log([[0.25, 0.75], [0.9, 0.1]]), [0, 0])
    >>> found.kl.round(6).tolist()
    [0.143841, 0.0]
    >>> found.same_argmax.tolist()
    [False, True]
    """
    options = arguments.ScoreOptions(ignore_index=ignore_index, shift=shift)
    verbs, targets = backends.choose(backend), np.asarray(targets)
    shape, dtype, blocks = scoring.blocks_of(logits_p, targets.shape, axis, _PIECE)
    other_shape, other_dtype, other_blocks = scoring.blocks_of(logits_q, targets.shape, axis, _PIECE)
    if shape != other_shape:
        raise ValueError(f"logits_p and logits_q must have one shape; got {shape} and {other_shape}")
    marked, _ = arguments.read_score_targets(shape, targets, None, options, axis)
    fields = comparison_fields(dtype, other_dtype)
    records, done = np.empty(marked.size, [("log_prob", fields[0][1]), *fields, ("valid", np.bool_)]), 0
    for block, other in itertools.zip_longest(blocks, other_blocks):
        if block is None or other is None or other.shape != block.shape or other.dtype != other_dtype:
            raise ValueError("logits_p and logits_q must both be arrays, or iterators of blocks of the same rows")
        part = slice(done, done := done + len(block))
        scoring.check_block(block, shape[-1], dtype, part, marked.size)
        found = compare_rows(block, other, marked[part], options, verbs)
        records[part] = found[list(records.dtype.names)]
        if progress is not None:
            progress(done, marked.size)
    scoring.check_all(done, marked.size)
    return ModelComparison.from_records(records.reshape(targets.shape))


def comparison_fields(logits_dtype, other_dtype):
    """What a comparison adds to the record of a score."""
    real = np.result_type(*map(checks.loss_dtype, (logits_dtype, other_dtype)))
    return [("other_log_prob", real), ("kl", real), ("js", real), ("same_argmax", np.dtype(np.bool_))]


def compare_rows(logits, other, targets, options, verbs):
    """Records of rows of two models (N, V) under marked targets (N,): those of `fastxent.scoring.score_rows` for the
    first with `comparison_fields`.
    """
    fields = comparison_fields(logits.dtype, other.dtype)
    records = np.empty(len(targets), [*scoring.record_dtype(logits.dtype, options.top_k).descr, *fields])
    if checks.loss_dtype(logits.dtype) != checks.loss_dtype(other.dtype):
        logits, other = logits[:].astype(np.float64), other[:].astype(np.float64)
    how = {"softcap": options.softcap, "temperature": options.temperature}
    found = verbs.score(logits, targets, top_k=options.top_k, **how)
    theirs = verbs.score(other, targets, **how)
    scoring.fill_records(records, found, targets)
    records["other_log_prob"] = np.where(records["valid"], 0.0 - theirs.nll, np.nan)
    records["same_argmax"] = (found.argmax == theirs.argmax) & (found.argmax >= 0)
    records["kl"], records["js"] = verbs.divergences(logits, other, found.lse, theirs.lse)
    return records


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """What `compare_models` found: an array for each figure, all of the targets' shape, NaN where not ``valid``.

    Attributes
    ----------
    log_prob, other_log_prob : ndarray of floats
        Of the target under p and under q, in nats.
    kl, js : ndarray of floats
        KL(p || q) and the Jensen-Shannon divergence of the row in nats, neither ever negative.
    same_argmax : ndarray of bool
        Whether both have the same largest class.
    valid : ndarray of bool
        Whether the row has a target.
    """

    log_prob: np.ndarray
    other_log_prob: np.ndarray
    kl: np.ndarray
    js: np.ndarray
    same_argmax: np.ndarray
    valid: np.ndarray

    @classmethod
    def from_records(cls, records):
        """The comparison of a structured array with these fields, among others maybe: views, no copy."""
        return cls(*(records[field] for field in cls.__slots__))

    @np.errstate(over="ignore", invalid="ignore")
    def summary(self):
        """`ModelSummary`: the figures over valid rows whose log-probabilities are numbers under both."""
        known = self.valid & np.isfinite(self.log_prob) & np.isfinite(self.other_log_prob)
        kl, js = (values[known].astype(np.float64) for values in (self.kl, self.js))
        nll, other_nll = (0.0 - values[known].astype(np.float64) for values in (self.log_prob, self.other_log_prob))
        change = np.exp(-other_nll) - np.exp(-nll)
        perplexity, other_perplexity = (float(np.exp(_mean(values))) for values in (nll, other_nll))
        return ModelSummary(
            rows=int(known.sum()),
            left_out=int((self.valid & ~known).sum()),
            kl_mean=_mean(kl),
            kl_percentiles={str(q): _percentile(kl, q) for q in _PERCENTILES},
            js_mean=_mean(js),
            same_argmax=_mean(self.same_argmax[known]),
            probability_change_mean=_mean(change),
            probability_change_rms=math.sqrt(_mean(change**2)),
            perplexity=perplexity,
            other_perplexity=other_perplexity,
            perplexity_change=other_perplexity - perplexity,
            perplexity_change_error=_error(other_perplexity * other_nll - perplexity * nll),
            nll_change=_mean(other_nll - nll),
            nll_change_error=_error(other_nll - nll),
        )

    def __str__(self):
        """The summary."""
        return str(self.summary())


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """Figures of a `ModelComparison`; errors are standard errors over paired rows taken as independent.

    Attributes
    ----------
    rows, left_out : int
        Rows the figures are over, and valid rows whose log-probability under either is no finite number.
    kl_mean, js_mean : float
        In nats.
    kl_percentiles : dict of float
        By percentage, one of the rows' values, the lower of two neighbours: 50 the median, 90, 95, 99, 99.9 and 100 the
        largest.
    same_argmax : float
        The share of rows whose largest classes agree.
    probability_change_mean, probability_change_rms : float
        Of q's probability of the target minus p's.
    perplexity, other_perplexity, perplexity_change, perplexity_change_error : float
        Of p, of q, q's minus p's, and that difference's standard error to first order.
    nll_change, nll_change_error : float
        The mean of q's negative log-likelihood minus p's, in nats: the log of the perplexities' ratio.
    """

    rows: int
    left_out: int
    kl_mean: float
    kl_percentiles: dict[str, float]
    js_mean: float
    same_argmax: float
    probability_change_mean: float
    probability_change_rms: float
    perplexity: float
    other_perplexity: float
    perplexity_change: float
    perplexity_change_error: float
    nll_change: float
    nll_change_error: float

    @property
    def perplexity_interval(self):
        """The 95% confidence interval of ``perplexity_change``."""
        reach = _NORMAL_95 * self.perplexity_change_error
        return self.perplexity_change - reach, self.perplexity_change + reach

    def as_dict(self):
        """Every figure by name, in plain numbers."""
        low, high = self.perplexity_interval
        return asdict(self) | {"perplexity_change_low_95": low, "perplexity_change_high_95": high}

    def __str__(self):
        """A paragraph."""
        low, high = self.perplexity_interval
        tails = ", ".join(f"{q}%: {value:.3g}" for q, value in self.kl_percentiles.items())
        return (
            f"{self.rows:,} rows ({self.left_out:,} left out)\n"
            f"KL(p || q)    {self.kl_mean:.6g} nats; {tails}\n"
            f"JS            {self.js_mean:.6g} nats\n"
            f"same argmax   {self.same_argmax:.2%}\n"
            f"target's p    {self.probability_change_mean:+.6f} on average, {self.probability_change_rms:.6f} rms\n"
            f"perplexity    {self.perplexity:.6g} -> {self.other_perplexity:.6g}: {self.perplexity_change:+.4g}, "
            f"95% in [{low:+.4g}, {high:+.4g}]"
        )


def _mean(values):
    """The mean as a plain number; NaN of nothing."""
    return float(values.mean()) if values.size else math.nan


def _percentile(values, q):
    """One of the values, so that an infinite one does not spoil those below."""
    return float(np.percentile(values, q, method="lower")) if values.size else math.nan


def _error(values):
    """The standard error of a mean."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
