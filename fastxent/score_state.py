"""ScoreState: what a scorer knows of each row after some of its classes, and how two such states become one.

Figures of a block are those of its own softmax. Merged, each weighs w = exp(lse of the block - lse of both): the
entropy is sum w (entropy + (lse - lse of the block)), sum p^2 is sum w^2 times the block's. All terms are positive, so
nothing cancels; counts and classes are whole numbers and exact.
"""

from dataclasses import dataclass

import numpy as np

from fastxent.state import FIELDS, LseState, RowScores, check_alike

# beside those of the LseState, before the list of the largest
SCORE_FIELDS = ("excess", "entropy", "sum_p2", "above", "level")

_LSE = len(FIELDS)
_LIST = _LSE + len(SCORE_FIELDS)


@dataclass(frozen=True, slots=True)
class ScoreState:
    """Mergeable scores of N rows over the classes seen so far; `fastxent.shards` makes them and uses them.

    Attributes
    ----------
    columns : ndarray of float64, shape (N, 14 + 2 k)
        The 9 columns of a `LseState`, then those of `SCORE_FIELDS`: lse minus the largest logit, entropy and sum p^2 of
        the classes seen, in nats, and how many of their logits are above and level with the target's, which does not
        count. Then the k largest classes, inf where there are fewer, and their logits as they are stored; k is 1 at
        least.
    softcap, temperature : float
        As for a `LseState`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> logits, targets = np.log([[0.5, 0.125, 0.25, 0.125]]), [1]
    >>> own = shards.target_logits(logits, targets)
    >>> one, other = (
    ...     shards.accumulate_scores(logits[:, v : v + 2], targets, own, vocab_start=v, top_k=2) for v in (0, 2)
    ... )
    >>> scores = shards.finalize_scores(one.merge(other), targets, top_k=2)
    >>> scores.top_ids, scores.rank, scores.rank_hi
    (array([[0, 2]]), array([3]), array([4]))
    """

    columns: np.ndarray
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def empty(cls, rows, top_k=0, softcap=None, temperature=1.0):
        """The identity of `merge`."""
        kept = max(1, top_k)
        figures, ids = np.zeros((rows, len(SCORE_FIELDS))), np.full((rows, kept), np.inf)
        return cls(np.hstack([LseState.empty(rows).columns, figures, ids, -ids]), softcap, temperature)

    @classmethod
    def unpack(cls, columns, softcap=None, temperature=1.0):
        """The state that `pack` gave the columns of.

        Raises
        ------
        ValueError
            If they have another shape.
        """
        columns = np.array(columns, np.float64, ndmin=2)
        if columns.ndim != 2 or columns.shape[1] < _LIST + 2 or (columns.shape[1] - _LIST) % 2:
            raise ValueError(f"columns must have shape (N, {_LIST} + 2 k), k at least 1; got {columns.shape}")
        return cls(columns, softcap, temperature)

    def pack(self):
        """A copy of the columns, all there is to a state but for softcap and temperature."""
        return self.columns.copy()

    def __len__(self):
        return len(self.columns)

    def __getitem__(self, field):
        return self.columns[:, _LSE + SCORE_FIELDS.index(field)]

    @property
    def lse_state(self):
        """The `LseState` of the same classes, a view."""
        return LseState(self.columns[:, :_LSE], self.softcap, self.temperature)

    @property
    def ids(self):
        """The largest classes, float64 (N, k)."""
        return self.columns[:, _LIST : _LIST + self._kept]

    @property
    def logits(self):
        """Their logits as they are stored, float64 (N, k)."""
        return self.columns[:, _LIST + self._kept :]

    @property
    def _kept(self):
        return (self.columns.shape[1] - _LIST) // 2

    def merge(self, other):
        """The state of the classes of both, which must not share a class.

        Associative and commutative, for floats within the rounding of a sum; `empty` changes nothing.

        Raises
        ------
        ValueError
            If the states have different numbers of rows or of classes kept, or another softcap or temperature.
        """
        check_alike(self, other)
        if self._kept != other._kept:
            raise ValueError(f"states must keep as many classes; got {self._kept} and {other._kept}")
        peaks = [(state.in_nats(state.logits[:, 0]), state["excess"]) for state in (self, other)]
        _, excess = join_peaks(*peaks[0], *peaks[1])
        ahead = _ahead(*peaks[0], *peaks[1])
        entropy, sum_p2 = map(np.add, _weighed(self, ahead), _weighed(other, -ahead))
        above, level = (self[field] + other[field] for field in ("above", "level"))
        return ScoreState(
            np.hstack(
                [
                    self.lse_state.merge(other.lse_state).columns,
                    np.stack([excess, entropy, sum_p2, above, level], axis=1),
                    *largest(np.hstack([self.ids, other.ids]), np.hstack([self.logits, other.logits]), self._kept),
                ]
            ),
            self.softcap,
            self.temperature,
        )

    def in_nats(self, logits):
        """Logits as they are stored, float64, in nats."""
        capped = logits if self.softcap is None else self.softcap * np.tanh(logits / self.softcap)
        return capped / self.temperature

    def scores(self, top_k):
        """`fastxent.state.RowScores` of rows all of whose classes have been seen, with the ``top_k`` largest."""
        nll, top, ids = self.lse_state.nll(), self.logits[:, :top_k], self.ids
        unknown = np.isnan(nll) | (self.lse_state["target_mass"] == 0.0)
        found = RowScores.allocate(len(self), top_k, 0)
        with np.errstate(all="ignore"):
            below = self.in_nats(self.logits[:, :1]) - self.in_nats(top)
            figures = {
                "lse": self.lse_state.lse(),
                "entropy": self["entropy"],
                "sum_p2": self["sum_p2"],
                "rank": 1.0 + self["above"],
                "rank_hi": 1.0 + self["above"] + self["level"],
                "argmax": ids[:, 0],
                "top_ids": ids[:, :top_k],
                "top_log_probs": 0.0 - (self["excess"][:, None] + below),
            }
        found.nll[:] = nll
        for name, values in figures.items():
            column = getattr(found, name)
            nothing = np.nan if column.dtype.kind == "f" else 0 if name.startswith("rank") else -1
            column[...] = np.where(unknown.reshape(-1, *[1] * (values.ndim - 1)), nothing, values)
        return found


def _weighed(state, ahead):
    """``entropy, sum_p2`` that a state adds when another's lse is ``ahead`` of its own."""
    with np.errstate(all="ignore"):
        gain = np.logaddexp(0.0, ahead)
        weight = np.exp(-gain)
        entropy = np.where(weight == 0.0, 0.0, weight * (state["entropy"] + gain))
        return entropy, weight * (weight * state["sum_p2"])


def join_peaks(peak, excess, peak_b, excess_b):
    """``peak, excess`` of two sets of classes: the largest logit in nats and how far the lse is above it, (N,) each."""
    top, ahead = np.maximum(peak, peak_b), _ahead(peak, excess, peak_b, excess_b)
    with np.errstate(all="ignore"):
        first, second = excess + np.logaddexp(0.0, ahead), excess_b + np.logaddexp(0.0, -ahead)
    return top, np.where(np.isinf(top), 0.0, np.where(peak >= peak_b, first, second))


@np.errstate(all="ignore")
def _ahead(peak, excess, peak_b, excess_b):
    """How far the lse of the second of two sets of classes is above the first's, in nats."""
    ahead = (peak_b - peak) + (excess_b - excess)
    return np.where(np.isneginf(peak_b), -np.inf, np.where(np.isneginf(peak), np.inf, ahead))


def largest(ids, logits, kept):
    """``ids, logits`` (N, kept) of the largest of each row, the lower class first among equals."""
    order = np.lexsort((ids, -logits), axis=-1)[:, :kept]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logits, order, axis=1)
