"""LseState: what is known of each row after some of its classes, and how two such states become one.

The kernels fill it, block by block; merging and finishing are here. It keeps the digits that a plain logsumexp loses,
because the target is never added to the sum of the others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastxent import rowmath

# what a target may be instead of a class index, once `arguments` has read it
IGNORED = -1  # the row counts for nothing and is not read
ABSENT = -2  # the target lies in no class of this block
LARGEST = -3  # the first of the row's largest logits

# Classes cut anywhere give the whole row's sums within their rounding; cut at multiples of this, their very bits
STRIP = 4096

FIELDS = ("base", "exponent", "total", "low", "peak", "gap", "mass", "target_logit", "target_mass")

_ROWS = rowmath.NUMPY_ROWS
_NOTHING = np.empty(0)
_RATE = rowmath.rate(np.float64)


def _add_sums(a, b):
    """base, exponent, total, low of both; a huge logit's base gives way to a larger one."""
    fields = FIELDS[:4]
    return _ROWS.join(*(a[field] for field in fields), *(b[field] for field in fields), _RATE)


@dataclass(frozen=True, slots=True)
class LseState:
    """Mergeable statistics of N rows over the classes seen so far.

    Attributes
    ----------
    columns : ndarray of float64, shape (N, 9)
        In the order of `FIELDS`. The classes other than the target sum to exp(base) 2**exponent (total + low);
        peak is the largest of their logits, gap is sum w (peak - z) and mass sum w over them (0 unless asked for);
        target_mass is 1 once the target's own logit, target_logit, has been seen.
    """

    columns: np.ndarray

    @classmethod
    def empty(cls, rows):
        """The identity of `merge`: ``rows`` rows of which no class has been seen."""
        columns = np.zeros((rows, len(FIELDS)))
        columns[:, FIELDS.index("peak")] = -np.inf
        columns[:, FIELDS.index("target_logit")] = -np.inf
        return cls(columns)

    def __getitem__(self, field):
        return self.columns[:, FIELDS.index(field)]

    def merge(self, other):
        """The state of the classes of both, which must not share a class."""
        merged = np.empty_like(self.columns)
        with np.errstate(all="ignore"):
            merged[:, :4] = np.stack(_add_sums(self, other), axis=1)
            merged[:, 4:7] = np.stack(_ROWS.add_gap(*self.columns[:, 4:7].T, *other.columns[:, 4:7].T), axis=1)
        held = other["target_mass"] > 0.0
        merged[:, 7] = np.where(held, other["target_logit"], self["target_logit"])
        merged[:, 8] = self["target_mass"] + other["target_mass"]
        return LseState(merged)

    def nll(self):
        """lse - target logit of each row in nats, float64 (N,), with every digit on confident rows; 0 where ignored.

        Raises
        ------
        ValueError
            If the target of a row lies in none of the classes seen.
        """
        seen = self["target_mass"] > 0.0
        lost = ~seen & (self["total"] != 0.0)
        if lost.any():
            raise ValueError(
                f"every target must lie in a shard; {int(lost.sum())} of {lost.size} do not, "
                f"the first in row {int(lost.argmax())}"
            )
        with np.errstate(all="ignore"):
            nll = _ROWS.nll(self["base"], self["exponent"], self["total"], self["target_logit"], _RATE)
        return np.where(seen, nll, 0.0)


class Spread(NamedTuple):
    """What class k of row i weighs in the part of a loss spread over classes: r_k = weight_k (keep q_ik + even).

    weight (V,) float64, or (1,) where all classes weigh the same; probabilities q (N, V), None where keep is 0 and
    even 1.
    """

    weight: np.ndarray
    probabilities: np.ndarray | None
    keep: float
    even: float


class Coefficients(NamedTuple):
    """Of a row's gradient with respect to its logits in nats, z, each float64 (N,), or (1,) where all rows share it:

    dz_k = p_k (hit + extra + smooth R + square lse) - smooth r_k - [k = t] hit, with the r of a `Spread`
    and R their sum.
    """

    hit: np.ndarray
    smooth: np.ndarray
    extra: np.ndarray
    square: np.ndarray

    def of(self, rows):
        """The coefficients of a slice of rows."""
        return Coefficients(*(column if len(column) == 1 else column[rows] for column in self))


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of N whole rows, float64 (N,) each: nll = lse - z_t in nats, and what else was wanted, else of length 0.

    target_logit in its own units; peak, the largest logit of the other classes; lse in nats; gap = sum r (lse - z) over
    all classes with the r of a `Spread`, there whenever one is given. An ignored row: nll and gap 0, the others NaN.
    """

    nll: np.ndarray
    target_logit: np.ndarray
    peak: np.ndarray
    lse: np.ndarray
    gap: np.ndarray

    @classmethod
    def allocate(cls, rows, wanted):
        """Arrays for ``rows`` rows, not filled; ``wanted`` names those beside nll."""
        others = [np.empty(rows) if field in wanted else _NOTHING for field in cls.__slots__[1:]]
        return cls(np.empty(rows), *others)

    def of(self, rows):
        """The statistics of a slice of rows, as views."""
        if rows.stop - rows.start == len(self.nll):
            return self
        return Statistics(*(getattr(self, field)[rows] for field in self.__slots__))


class RowScores(NamedTuple):
    """What a scorer wants of N whole rows; k of the largest classes, K classes asked for.

    float64 (N,), in nats: nll = lse - z_t, lse, entropy, and sum_p2 = sum p^2. int64 (N,): rank, one more than there
    are logits above the target's, rank_hi, which counts those level with it too, and argmax, the lowest of equals.
    top_ids int64 and top_log_probs (N, k), the largest first; id_log_probs (N, K). An ignored row: nll 0; one whose
    loss is no number: nll NaN; both: the other floats NaN, ranks 0, classes -1.
    """

    nll: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    sum_p2: np.ndarray
    rank: np.ndarray
    rank_hi: np.ndarray
    argmax: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray
    id_log_probs: np.ndarray

    @classmethod
    def allocate(cls, rows, top_k, ids):
        """Arrays for ``rows`` rows, not filled."""
        nll, lse, entropy, sum_p2 = (np.empty(rows) for _ in range(4))
        rank, rank_hi, argmax = (np.empty(rows, np.int64) for _ in range(3))
        top = np.empty((rows, top_k), np.int64), np.empty((rows, top_k))
        return cls(nll, lse, entropy, sum_p2, rank, rank_hi, argmax, *top, np.empty((rows, ids)))

    def of(self, rows):
        """The scores of a slice of rows, as views."""
        return RowScores(*(column[rows] for column in self))
