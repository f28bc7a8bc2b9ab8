"""Figures of groups and of calibration by their definitions, over whole scores and block by block."""

import numpy as np
import pytest
import scipy.stats

import fastxent
from fastxent import metrics


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((30, 8, 50))
    targets = rng.integers(0, 50, (30, 8))
    targets[rng.random(targets.shape) < 0.1] = -100
    logits[3, 2, 5], targets[3, 2] = np.nan, 0
    return fastxent.score(logits, targets, top_k=3)


def test_all_rows(scores):
    found, known = scores.metrics(word_counts=100, byte_counts=900), scores.valid & ~np.isnan(scores.log_prob)
    nll = -scores.log_prob[known]
    assert (found.rows[0], found.valid[0], found.nan[0]) == (240, scores.valid.sum(), 1)
    assert found.mean_nll[0] == pytest.approx(nll.mean(), rel=1e-13)
    assert found.nll_error[0] == pytest.approx(scipy.stats.sem(nll), rel=1e-12)
    assert found.perplexity_error[0] == pytest.approx(np.exp(nll.mean()) * scipy.stats.sem(nll), rel=1e-12)
    assert found.bits_per_byte[0] == pytest.approx(nll.sum() / 900 / np.log(2))
    assert found.word_perplexity[0] == pytest.approx(np.exp(nll.sum() / 100))
    assert found.byte_perplexity[0] == pytest.approx(np.exp(nll.sum() / 900))
    assert found.accuracy[0] == scores.is_greedy[known].mean()
    assert found.mean_reciprocal_rank[0] == pytest.approx((1 / scores.rank_hi[known]).mean())
    assert found.entropy[0] == pytest.approx(scores.entropy[known].mean())
    np.testing.assert_allclose(found.top_k_accuracy[0], [(scores.rank[known] <= k).mean() for k in (1, 2, 3)])


@pytest.mark.parametrize("by_sequence", [True, False])
def test_groups_are_what_their_rows_are_alone(scores, by_sequence):
    rng = np.random.default_rng(1)
    by = np.array(["b", "a", "c"])[rng.integers(0, 3, 30 if by_sequence else (30, 8))]
    found = scores.metrics(by=by)
    assert found.group.tolist() == ["a", "b", "c"]
    for i, name in enumerate(found.group):
        alone = scores[by == name].metrics()
        for field in metrics.Metrics.__slots__[1:]:
            np.testing.assert_allclose(getattr(found, field)[i], getattr(alone, field)[0], 1e-12, err_msg=field)
    assert "group" in str(found)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_block_by_block(scores, step):
    flat, index = scores.flat(), np.arange(240) % 5
    sums = metrics.Sums(5, 3)
    for start in range(0, 240, step):
        sums.add(flat[start : start + step], index[start : start + step])
    whole = scores.metrics(by=index.reshape(30, 8))
    for field in metrics.Metrics.__slots__[1:]:
        np.testing.assert_allclose(getattr(sums.metrics(), field), getattr(whole, field), 1e-12, err_msg=field)


def test_calibration(scores):
    found, known = scores.calibration(bins=4), scores.valid & ~np.isnan(scores.log_prob)
    sure, right = np.exp(scores.top_log_probs[known][:, 0]), scores.is_greedy[known]
    error = 0.0
    for i in range(4):
        here = (sure > found.edges[i]) & (sure <= found.edges[i + 1])
        assert found.count[i] == here.sum()
        if here.any():
            assert found.accuracy[i] == right[here].mean()
            assert found.confidence[i] == pytest.approx(sure[here].mean())
            error += here.mean() * abs(right[here].mean() - sure[here].mean())
    assert found.expected_error == pytest.approx(error)


def test_a_sure_row_is_in_the_last_bin():
    scores = fastxent.score(np.float32([[100.0, 0.0]]), [0], top_k=1)
    assert scores.calibration().count.tolist() == [0] * 14 + [1]


def test_errors(scores):
    with pytest.raises(ValueError, match=r"by must have the scores' shape \(30, 8\) or its beginning; got \(8,\)"):
        scores.metrics(by=np.zeros(8))
    with pytest.raises(
        ValueError, match=r"byte_counts must be one number, or one for each of 2 groups; got shape \(3,\)"
    ):
        scores.metrics(by=np.arange(30) % 2, byte_counts=[1, 2, 3])
    with pytest.raises(ValueError, match="calibration needs the largest class"):
        fastxent.score(np.zeros((1, 2)), [0]).calibration()
    with pytest.raises(ValueError, match="bins must be positive; got 0"):
        scores.calibration(0)
