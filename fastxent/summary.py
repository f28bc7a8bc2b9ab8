"""What a scoring run found, in figures; a function of its records alone, however the run was cut."""

import math
from dataclasses import asdict, dataclass, field

import numpy as np

from fastxent.metrics import Sums
from fastxent.scoring import Scores

_ROWS = 1 << 18  # records looked at a time; sums are over such blocks, whatever blocks the run had


@dataclass(slots=True)
class Summary:
    """Counts and sums over records, as `fastxent.metrics.Sums` has them; means are over valid rows whose
    log-probability is a number.

    ``seconds``, ``rows_now`` and ``bytes_read`` are of this process, which may have gone on from where another was
    killed.
    """

    rows: int = 0
    valid: int = 0
    nan: int = 0
    correct: int = 0
    total_nll: float = 0.0
    squared_deviations: float = 0.0
    total_entropy: float = 0.0
    total_reciprocal_rank: float = 0.0
    in_top: list[int] = field(default_factory=list)
    seconds: float = 0.0
    rows_now: int = 0
    bytes_read: int = 0

    @classmethod
    def of(cls, records):
        """The summary of the records (N,) of `fastxent.Scores`."""
        sums = Sums(1, records.dtype["top_ids"].shape[0] if "top_ids" in records.dtype.names else 0)
        for start in range(0, len(records), _ROWS):
            block = np.asarray(records[start : start + _ROWS])
            sums.add(Scores.from_records(block), np.zeros(len(block), np.int64))
        return cls(
            rows=int(sums.rows[0]),
            valid=int(sums.valid[0]),
            nan=int(sums.nan[0]),
            correct=int(sums.correct[0]),
            total_nll=0.0 - float(sums.log_prob[0]),
            squared_deviations=float(sums.deviation[0]),
            total_entropy=float(sums.entropy[0]),
            total_reciprocal_rank=float(sums.reciprocal_rank[0]),
            in_top=sums.in_top[0].tolist(),
        )

    def timed(self, seconds, rows_now, bytes_read):
        """Add what this process did."""
        self.seconds, self.rows_now, self.bytes_read = seconds, rows_now, bytes_read
        return self

    @property
    def counted(self):
        """Rows that the means are over."""
        return self.valid - self.nan

    def mean(self, total):
        """A sum over the counted rows by their number."""
        return total / self.counted if self.counted else math.nan

    @property
    def mean_nll(self):
        """Mean negative log-likelihood in nats."""
        return self.mean(self.total_nll)

    @property
    def nll_error(self):
        """Its standard error, rows taken as independent."""
        return math.sqrt(self.mean(self.squared_deviations) / (self.counted - 1)) if self.counted > 1 else math.nan

    @property
    def perplexity(self):
        """exp of the mean negative log-likelihood; inf where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 709.0 else self.mean_nll * math.inf

    def as_dict(self):
        """Every figure by name, in plain numbers."""
        return asdict(self) | {
            "mean_nll_nats": self.mean_nll,
            "mean_nll_bits": self.mean_nll / math.log(2),
            "nll_error_nats": self.nll_error,
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity * self.nll_error,
            "accuracy": self.mean(self.correct),
            "top_k_accuracy": [self.mean(count) for count in self.in_top],
            "mean_reciprocal_rank": self.mean(self.total_reciprocal_rank),
            "mean_entropy_nats": self.mean(self.total_entropy),
            "rows_per_second": self.rows_now / self.seconds if self.seconds else math.nan,
            "gigabytes_per_second": self.bytes_read / self.seconds / 1e9 if self.seconds else math.nan,
        }
