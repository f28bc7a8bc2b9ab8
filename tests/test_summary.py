"""The figures of a run, by the definitions."""

import numpy as np
import pytest

from fastxent import summary
from fastxent.scoring import record_dtype
from fastxent.summary import Summary

RECORD = record_dtype(np.dtype(np.float32), 2)


def records(log_prob, valid, greedy):
    found = np.zeros(len(log_prob), RECORD)
    found["log_prob"], found["valid"], found["is_greedy"] = log_prob, valid, greedy
    found["entropy"], found["rank_hi"] = np.arange(len(found)), 1 + np.arange(len(found))
    return found


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_by_hand(block, monkeypatch):
    monkeypatch.setattr(summary, "_ROWS", block)
    found = records([-1, -2, np.nan, -9, -3], [1, 1, 1, 0, 1], [1, 0, 1, 0, 1])
    figures = Summary.of(found).timed(2.0, 5, 4_000_000_000).as_dict()
    assert [figures[name] for name in ("rows", "valid", "nan", "correct", "total_nll")] == [5, 4, 1, 2, 6.0]
    assert figures["mean_nll_nats"] == 2.0
    assert figures["mean_nll_bits"] == pytest.approx(2 / np.log(2), rel=1e-15)
    assert figures["perplexity"] == pytest.approx(np.exp(2), rel=1e-15)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["nll_error_nats"] == pytest.approx(np.std([1, 2, 3], ddof=1) / np.sqrt(3), rel=1e-15)
    assert figures["perplexity_error"] == pytest.approx(np.exp(2) * figures["nll_error_nats"], rel=1e-15)
    assert figures["mean_entropy_nats"] == pytest.approx((0 + 1 + 4) / 3)
    assert figures["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 2 + 1 / 5) / 3)
    assert figures["top_k_accuracy"] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert (figures["rows_per_second"], figures["gigabytes_per_second"]) == (2.5, 2.0)


def test_of_nothing():
    figures = Summary.of(np.empty(0, RECORD)).as_dict()
    assert figures["rows"] == 0
    assert np.isnan(figures["mean_nll_nats"])


def test_of_what_overflows():
    assert Summary.of(records([-800.0], [1], [0])).perplexity == np.inf
    assert Summary.of(records([-np.inf], [1], [0])).perplexity == np.inf
