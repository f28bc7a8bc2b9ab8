"""What a scoring run found, in figures; a function of its records alone, however the run was cut."""

import math
from dataclasses import asdict, dataclass

import numpy as np

_ROWS = 1 << 18  # records looked at a time; sums are over such blocks, whatever blocks the run had


@dataclass(slots=True)
class Summary:
    """Counts and sums over records; means are over valid rows whose log-probability is a number.

    ``seconds``, ``rows_now`` and ``bytes_read`` are of this process, which may have gone on from where another was
    killed.
    """

    rows: int = 0
    valid: int = 0
    nan: int = 0
    correct: int = 0
    total_nll: float = 0.0
    seconds: float = 0.0
    rows_now: int = 0
    bytes_read: int = 0

    @classmethod
    def of(cls, records):
        """The summary of records (N,) with ``log_prob``, ``valid`` and ``is_greedy``."""
        summary = cls()
        for start in range(0, len(records), _ROWS):
            block = records[start : start + _ROWS]
            log_prob, valid = np.asarray(block["log_prob"]), np.asarray(block["valid"])
            finite = valid & ~np.isnan(log_prob)
            summary.rows += len(block)
            summary.valid += int(valid.sum())
            summary.nan += int((valid & ~finite).sum())
            summary.correct += int((block["is_greedy"] & finite).sum())
            summary.total_nll -= float(log_prob[finite].sum(dtype=np.float64))
        return summary

    def timed(self, seconds, rows_now, bytes_read):
        """Add what this process did."""
        self.seconds, self.rows_now, self.bytes_read = seconds, rows_now, bytes_read
        return self

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
        counted = self.valid - self.nan
        return asdict(self) | {
            "mean_nll_nats": self.mean_nll,
            "mean_nll_bits": self.mean_nll / math.log(2),
            "perplexity": self.perplexity,
            "accuracy": self.correct / counted if counted else math.nan,
            "rows_per_second": self.rows_now / self.seconds if self.seconds else math.nan,
            "gigabytes_per_second": self.bytes_read / self.seconds / 1e9 if self.seconds else math.nan,
        }
