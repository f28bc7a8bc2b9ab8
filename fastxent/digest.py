"""What a file of scores says as a whole: groups, the spread of the losses, calibration, the hardest rows, two models.

Records are looked at block by block, so any number of them takes bounded memory; but for a number a row that names its
group, and for some 60 bytes a row where two models are compared: percentiles want all rows at once.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastxent import io
from fastxent.metrics import Calibration, CalibrationSums, Metrics, Sums
from fastxent.models import ModelComparison, ModelSummary
from fastxent.scoring import Scores

_ROWS = 1 << 18
_HARDEST = 20
_ALL = np.empty(0, np.int64)
# edges of the losses' histogram in nats: eight a decade, what is smaller or larger in the first and last bin
EDGES = np.concatenate([[0.0], 10.0 ** np.linspace(-8, 3, 89), [np.inf]])


@dataclass(frozen=True, slots=True)
class Digest:
    """Figures of all records.

    Attributes
    ----------
    metrics : fastxent.metrics.Metrics
        Of all rows.
    groups : fastxent.metrics.Metrics or None
        Of the groups asked for.
    histogram : ndarray of int64
        How many losses lie between neighbours of `EDGES`.
    calibration : fastxent.metrics.Calibration or None
        Where the records hold the largest class.
    hardest : structured ndarray
        ``row`` and the record's own fields, the largest losses first.
    models : fastxent.models.ModelSummary or None
        Where the records compare two models.
    """

    metrics: Metrics
    groups: Metrics | None
    histogram: np.ndarray
    calibration: Calibration | None
    hardest: np.ndarray
    models: ModelSummary | None

    @classmethod
    def of(cls, records, by=None, word_counts=None, byte_counts=None):
        """The digest of records (N,), an array or memory map with the fields of `fastxent.Scores`.

        ``by`` (N,) names each row's group; the counts are numbers, or one a group, as for `fastxent.metrics.measure`.
        """
        top_k = records.dtype["top_ids"].shape[0] if "top_ids" in records.dtype.names else 0
        names, index = (_ALL, _ALL) if by is None else np.unique(by, return_inverse=True)
        if by is not None and len(index) != len(records):
            raise ValueError(f"groups must be one a row; got {len(index)} for {len(records)} rows")
        sums, groups = Sums(1, top_k), None if by is None else Sums(len(names), top_k)
        calibration, histogram, hardest = CalibrationSums(), np.zeros(len(EDGES) - 1, np.int64), None
        for start in range(0, len(records), _ROWS):
            block = np.asarray(records[start : start + _ROWS])
            scores = Scores.from_records(block)
            sums.add(scores, np.zeros(len(block), np.int64))
            if groups is not None:
                groups.add(scores, index[start : start + _ROWS])
            if top_k:
                calibration.add(scores)
            losses = 0.0 - block["log_prob"][block["valid"] & ~np.isnan(block["log_prob"])].astype(np.float64)
            histogram += np.histogram(np.minimum(losses, np.finfo(np.float64).max), EDGES)[0]
            hardest = _harder(hardest, block, start)
        compared, counts = "kl" in records.dtype.names, {"word_counts": word_counts, "byte_counts": byte_counts}
        whole = {name: number if number is None else float(np.sum(number)) for name, number in counts.items()}
        return cls(
            metrics=sums.metrics(**whole),
            groups=None if groups is None else groups.metrics(names, **counts),
            histogram=histogram,
            calibration=calibration.calibration() if top_k and len(records) else None,
            hardest=_harder(hardest, np.asarray(records[:0]), 0),
            models=ModelComparison.from_records(records).summary() if compared else None,
        )

    def as_dict(self):
        """Every figure by name, in plain numbers and lists."""
        figures = {"metrics": _plain(self.metrics.as_dict())}
        if self.groups is not None:
            figures["groups"] = _plain(self.groups.as_dict())
        if self.calibration is not None:
            fields = self.calibration.__slots__
            figures["calibration"] = _plain({field: getattr(self.calibration, field) for field in fields})
        if self.models is not None:
            figures["models"] = self.models.as_dict()
        return figures


class Questions:
    """What is asked of a run's records beside their summary, from files.

    Parameters
    ----------
    group_by : path-like, optional
        Integers or names of the targets' shape (..., T) or its beginning: what names each row's group.
    word_counts, byte_counts : str or path-like, optional
        A number; or a file of numbers, which are summed: of any shape, or with ``group_by`` of its shape, each counting
        for the group there.

    Attributes
    ----------
    digest : Digest or None
        The answer, once there is one.
    """

    def __init__(self, group_by=None, word_counts=None, byte_counts=None):
        self._group_by, self._counts = group_by, {"word_counts": word_counts, "byte_counts": byte_counts}
        self._by: np.ndarray | None = None
        self._known: dict = {}
        self.digest: Digest | None = None

    def prepare(self, shape):
        """Read the files for targets of ``shape``.

        Raises
        ------
        fastxent.io.SourceError, ValueError
            If one cannot be read or does not fit.
        """
        if self._group_by is not None:
            self._by = _read(self._group_by)
            if self._by.shape != shape[: self._by.ndim]:
                raise ValueError(f"groups must have the targets' shape {shape} or its beginning; got {self._by.shape}")
        for name, given in self._counts.items():
            if given is not None:
                self._known[name] = self._count(name, given)
        if self._by is not None:
            by = self._by.reshape(*self._by.shape, *(1 for _ in shape[self._by.ndim :]))
            self._by = np.broadcast_to(by, shape).reshape(-1)

    def _count(self, name, given):
        if str(given).isdecimal():
            if self._by is not None:
                raise ValueError(f"{name} must be a file with a number for each of the groups' rows; got {given}")
            return float(given)
        counts = _read(given).astype(np.float64)
        if self._by is None:
            return counts.sum()
        if counts.shape != self._by.shape:
            raise ValueError(f"{name} must have the groups' shape {self._by.shape}; got {counts.shape}")
        return np.bincount(np.unique(self._by.reshape(-1), return_inverse=True)[1], counts.reshape(-1))

    def answer(self, records):
        """Leave the `Digest` of records (N,) in ``digest``."""
        self.digest = Digest.of(records, self._by, **self._known)


def _read(path):
    with io.open_source(path) as source:
        return np.array(source.block(0, math.prod(source.shape))).reshape(source.shape)


def _harder(hardest, block, start):
    """The hardest rows of those known and of a block that begins at row ``start``."""
    names = [name for name in block.dtype.names if name not in ("valid", "top_ids", "top_log_probs")]
    dtype = np.dtype([("row", np.int64), *((name, block.dtype[name]) for name in names)])
    counted = np.flatnonzero(block["valid"] & ~np.isnan(block["log_prob"]))
    counted = counted[np.argsort(block["log_prob"][counted], kind="stable")[:_HARDEST]]
    found = np.empty(len(counted), dtype)
    found["row"] = start + counted
    for name in names:
        found[name] = block[name][counted]
    found = found if hardest is None else np.concatenate([hardest, found])
    return found[np.argsort(found["log_prob"], kind="stable")[:_HARDEST]]


def _plain(arrays):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in arrays.items()}
