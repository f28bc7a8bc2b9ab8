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


def in_block(targets, logits, vocab_start):
    """Targets (N,) that count from class 0 as the kernels take them for classes from ``vocab_start`` on."""
    here = (targets >= vocab_start) & (targets < vocab_start + logits.shape[1])
    return np.where(here, targets - vocab_start, np.where(targets == IGNORED, IGNORED, ABSENT))


@dataclass(frozen=True, slots=True)
class LseState:
    """Mergeable statistics of N rows over the classes seen so far; `fastxent.shards` makes them and uses them.

    Attributes
    ----------
    columns : ndarray of float64, shape (N, 9)
        In the order of `FIELDS`. The classes other than the target sum to exp(base) 2**exponent (total + low);
        peak is the largest of their logits, gap is sum w (peak - z) and mass sum w over them (0 unless asked for);
        target_mass is 1 once the target's own logit, target_logit, has been seen.
    softcap, temperature : float
        What the logits are in nats: softcap tanh(logits / softcap) / temperature. Logits in the columns are
        tanh(logits / softcap) with a softcap, else as they were given.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> one = shards.accumulate(np.float32([[20]]), [0])
    >>> other = shards.accumulate(np.float32([[0]]), [0], vocab_start=1)
    >>> one.merge(other).nll()
    array([2.06115362e-09])
    """

    columns: np.ndarray
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def empty(cls, rows, softcap=None, temperature=1.0):
        """The identity of `merge`: ``rows`` rows of which no class has been seen."""
        columns = np.zeros((rows, len(FIELDS)))
        columns[:, FIELDS.index("peak")] = -np.inf
        columns[:, FIELDS.index("target_logit")] = -np.inf
        return cls(columns, softcap, temperature)

    @classmethod
    def unpack(cls, columns, softcap=None, temperature=1.0):
        """The state that `pack` gave the columns of, float64 (N, 9): from another process, a file, a chunk of a graph.

        Raises
        ------
        ValueError
            If they have another shape.
        """
        columns = np.array(columns, np.float64, ndmin=2)
        if columns.ndim != 2 or columns.shape[1] != len(FIELDS):
            raise ValueError(f"columns must have shape (N, {len(FIELDS)}); got {columns.shape}")
        return cls(columns, softcap, temperature)

    def pack(self):
        """A copy of the columns, float64 (N, 9), and all there is to a state but for softcap and temperature."""
        return self.columns.copy()

    def copy(self):
        """A state of its own."""
        return LseState(self.columns.copy(), self.softcap, self.temperature)

    def __len__(self):
        return len(self.columns)

    def __getitem__(self, field):
        return self.columns[:, FIELDS.index(field)]

    @property
    def _rate(self):
        return rowmath.rate(np.float64, self.softcap, self.temperature)

    @property
    def _sums(self):
        return tuple(self[field] for field in FIELDS[:3])

    def merge(self, other):
        """The state of the classes of both, which must not share a class.

        Associative and commutative within the rounding of a sum; `empty` changes nothing.

        Raises
        ------
        ValueError
            If the states have different numbers of rows, or were made under another softcap or temperature.
        """
        check_alike(self, other)
        merged = np.empty_like(self.columns)
        with np.errstate(all="ignore"):
            merged[:, :4] = np.stack(_ROWS.join(*self.columns[:, :4].T, *other.columns[:, :4].T, self._rate), axis=1)
            merged[:, 4:7] = np.stack(_ROWS.add_gap(*self.columns[:, 4:7].T, *other.columns[:, 4:7].T), axis=1)
        held = other["target_mass"] > 0.0
        merged[:, 7] = np.where(held, other["target_logit"], self["target_logit"])
        merged[:, 8] = self["target_mass"] + other["target_mass"]
        return LseState(merged, self.softcap, self.temperature)

    def nll(self):
        """lse - target logit of each row in nats, float64 (N,), with every digit on confident rows; 0 where ignored.

        Raises
        ------
        ValueError
            If the target of a row lies in none of the classes seen, or in two shards.
        """
        seen = self["target_mass"] > 0.0
        wrong = (self["target_mass"] != 1.0) & (seen | (self["total"] != 0.0))
        if wrong.any():
            raise ValueError(
                f"every target must lie in one shard; {int(wrong.sum())} of {wrong.size} do not, "
                f"the first in row {int(wrong.argmax())}"
            )
        with np.errstate(all="ignore"):
            nll = _ROWS.nll(*self._sums, self["target_logit"], self._rate)
        return np.where(seen, nll, 0.0)

    def lse(self):
        """The logsumexp of each row in nats, float64 (N,); -inf where no class was seen, NaN on a row with NaN or +inf.

        Under a target it is that of the target and the others; without, that of all.
        """
        with np.errstate(all="ignore"):
            over, whole, _, _ = self._with_target()
            nll = _ROWS.nll(*self._sums, self["target_logit"], self._rate)
            base, target = self["base"], self["target_logit"]
            return _ROWS.lse(base, over, whole, target, np.where(target > -np.inf, nll, np.inf), self._rate)

    def gap(self, target_share):
        """sum r (lse - z) in nats over all classes, float64 (N,), of a state made with a `Spread` and the r of each
        row's target; 0 where ignored.
        """
        seen, peak = self["target_mass"] > 0.0, self["peak"]
        with np.errstate(all="ignore"):
            nll = _ROWS.nll(*self._sums, self["target_logit"], self._rate)
            above = _ROWS.excess(*self._sums, peak, self["target_logit"], nll, self._rate)
            above = np.where(peak > -np.inf, above, 0.0)
            return np.where(seen, _ROWS.whole_gap(self["gap"], self["mass"], above, target_share, nll, self._rate), 0.0)

    def of_gradient(self, coefficients, target_share):
        """``exponent, factor, own`` of each row, float64 (N,): an entry but for the shares is exp(z - base)
        2**-exponent factor, the target's is own.
        """
        hit, smooth, extra, square = coefficients
        mass = self["mass"]
        with np.errstate(all="ignore"):
            exponent, whole, miss, own = self._with_target()
            extra = extra + (square * self.lse() if square.any() else 0.0)
            factor = (hit + extra + smooth * (mass + target_share)) / whole
            return exponent, factor, _ROWS.at_target(hit, smooth, extra, mass, target_share, miss, own)

    def _with_target(self):
        return _ROWS.with_target(*self._sums, self["target_logit"], self._rate)


def check_alike(one, other):
    """States of as many rows under the same softcap and temperature, or a ValueError says what differs."""
    for what in ("softcap", "temperature"):
        if getattr(one, what) != getattr(other, what):
            raise ValueError(f"states must have one {what}; got {getattr(one, what)} and {getattr(other, what)}")
    if len(one) != len(other):
        raise ValueError(f"states must have as many rows; got {len(one)} and {len(other)}")


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
