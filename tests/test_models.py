"""compare_models: every row against float64 NumPy and mpmath's digits, and the figures by their definitions."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

import fastxent

BACKENDS = fastxent.backends.available()


def problem(rows=40, classes=700, noise=0.05, dtypes=("float32", "float32")):
    rng = np.random.default_rng(rows + classes)
    p = 3 * rng.standard_normal((rows, classes))
    q = p + noise * rng.standard_normal(p.shape)
    targets = rng.integers(0, classes, rows)
    targets[3] = -100
    return p.astype(dtypes[0]), q.astype(dtypes[1]), targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", [1e-3, 0.05, 5.0])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float32"), ("float32", "float16")])
def test_every_row(dtypes, noise, backend):
    p, q, targets = problem(noise=noise, dtypes=dtypes)
    found = fastxent.compare_models(p, q, targets, backend=backend)
    log_p, log_q = (scipy.special.log_softmax(logits.astype(np.longdouble), axis=1) for logits in (p, q))
    ratio, m = log_p - log_q, np.logaddexp(log_p, log_q) - np.log(2)
    kl = (np.exp(log_p) * ratio).sum(axis=1)
    js = 0.5 * (np.exp(log_p) * (log_p - m) + np.exp(log_q) * (log_q - m)).sum(axis=1)
    valid = targets != -100
    np.testing.assert_array_equal(found.valid, valid)
    # held to the sum of the absolute values of the terms, as divergences are
    terms = (np.exp(log_p) * np.abs(ratio)).sum(axis=1)
    assert (np.abs(found.kl - kl)[valid] <= 1e-6 * terms[valid]).all()
    assert (np.abs(found.js - js)[valid] <= 1e-6 * terms[valid]).all()
    assert np.isnan(found.kl[~valid]).all()
    each = np.flatnonzero(valid)
    np.testing.assert_allclose(found.log_prob[each], log_p[each, targets[each]].astype(float), 5e-7)
    np.testing.assert_allclose(found.other_log_prob[each], log_q[each, targets[each]].astype(float), 5e-7)
    np.testing.assert_array_equal(found.same_argmax[each], (p.argmax(axis=1) == q.argmax(axis=1))[each])


@pytest.mark.parametrize("backend", BACKENDS)
class TestLaws:
    def test_a_model_and_itself(self, backend):
        p, _, targets = problem()
        found = fastxent.compare_models(p, p, targets, backend=backend)
        assert (found.kl[found.valid] == 0).all()
        assert (found.js[found.valid] == 0).all()
        summary = found.summary()
        assert (summary.perplexity_change, summary.perplexity_change_error, summary.same_argmax) == (0.0, 0.0, 1.0)

    def test_never_negative_however_close(self, backend):
        p, _, targets = problem(rows=20)
        for noise in (1e-7, 1e-6, 1e-5):
            q = p * np.float32(1 + noise) + np.float32(5.0)
            found = fastxent.compare_models(p, q, targets, backend=backend)
            assert (found.kl[found.valid] >= 0).all()
            assert (found.js[found.valid] >= 0).all()

    def test_a_quarter_of_js_is_kl_of_close_models(self, backend):
        p, _, targets = problem()
        rng = np.random.default_rng(1)
        q = p + (1e-3 * rng.standard_normal(p.shape)).astype(np.float32)
        found = fastxent.compare_models(p, q, targets, backend=backend)
        np.testing.assert_allclose(4 * found.js[found.valid], found.kl[found.valid], 1e-3)

    def test_what_q_rules_out(self, backend):
        p = np.zeros((2, 30), np.float32)
        q = p.copy()
        q[0, 4] = -np.inf
        found = fastxent.compare_models(p, q, [0, 0], backend=backend)
        assert found.kl.tolist() == [np.inf, 0.0]
        backwards = fastxent.compare_models(q, p, [0, 0], backend=backend)
        np.testing.assert_allclose(backwards.kl[0], np.log(30 / 29), 1e-6)
        np.testing.assert_allclose(backwards.js, found.js)
        apart = fastxent.compare_models([[0.0, -np.inf]], [[-np.inf, 0.0]], [0], backend=backend)
        np.testing.assert_allclose(apart.js[0], np.log(2), 1e-15)

    def test_rows_without_a_number(self, backend):
        p, q, targets = problem(rows=6)
        p[0], q[1, 2], p[2] = np.nan, np.inf, -np.inf
        found = fastxent.compare_models(p, q, targets, backend=backend)
        assert np.isnan(found.kl).tolist() == [True, True, True, True, False, False]
        assert found.summary().left_out == 3


def test_blocks_give_the_whole():
    p, q, targets = problem()
    whole = fastxent.compare_models(p, q, targets)
    blocks = fastxent.compare_models(iter(np.split(p, 8)), iter(np.split(q, 8)), targets)
    for field in fastxent.ModelComparison.__slots__:
        np.testing.assert_array_equal(getattr(blocks, field), getattr(whole, field))


def test_summary_by_the_definitions():
    p, q, targets = problem(rows=300, noise=0.3)
    found = fastxent.compare_models(p, q, targets)
    figures, known = found.summary().as_dict(), found.valid
    nll, other = -found.log_prob[known].astype(float), -found.other_log_prob[known].astype(float)
    assert figures["rows"] == known.sum() == 299
    assert figures["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-12)
    assert figures["perplexity_change"] == pytest.approx(np.exp(other.mean()) - np.exp(nll.mean()), rel=1e-9)
    assert figures["nll_change_error"] == pytest.approx(scipy.stats.sem(other - nll), rel=1e-12)
    assert figures["kl_percentiles"]["95"] == pytest.approx(np.percentile(found.kl[known], 95, method="lower"))
    assert figures["perplexity_change_low_95"] < figures["perplexity_change"] < figures["perplexity_change_high_95"]
    # the error of a difference of perplexities, seen by drawing the rows again
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(nll), len(nll)) for _ in range(2000)]
    changes = [np.exp(other[rows].mean()) - np.exp(nll[rows].mean()) for rows in drawn]
    assert figures["perplexity_change_error"] == pytest.approx(np.std(changes), rel=0.15)
    assert "same argmax" in str(found)


def test_losses_whose_exponential_overflows():
    summary = fastxent.compare_models([[1000.0, 0.0]] * 2, [[1000.0, 0.0]] * 2, [1, 1]).summary()
    assert summary.perplexity == np.inf
    assert np.isnan(summary.perplexity_change)


def test_percentiles_of_what_q_rules_out():
    q = np.zeros((3, 4))
    q[0, 2] = -np.inf
    summary = fastxent.compare_models(np.zeros((3, 4)), q, [0, 0, 0]).summary()
    assert (summary.kl_percentiles["50"], summary.kl_percentiles["100"]) == (0.0, np.inf)


def test_a_target_that_a_mask_rules_out_leaves_divergences_alone():
    lowest = np.finfo(np.float32).min
    p, q = np.float32([[lowest, 0, 0, 1]]), np.float32([[lowest, 0, 0, 2]])
    wanted = fastxent.compare_models(p, q, [1], backend="reference")
    np.testing.assert_allclose(fastxent.compare_models(p, q, [0]).kl, wanted.kl, 1e-6)


def test_layouts_and_dtypes_together():
    p = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    found = fastxent.compare_models(p, p.astype(np.float64), np.zeros((2, 3), int), axis=1)
    np.testing.assert_allclose(found.kl, 0.0, atol=1e-15)


def test_errors():
    p, q, targets = problem()
    with pytest.raises(ValueError, match="must both be arrays, or iterators of blocks of the same rows"):
        fastxent.compare_models(iter(np.split(p, 8)), iter(np.split(q, 4)), targets)
    with pytest.raises(ValueError, match=r"logits_p and logits_q must have one shape; got \(40, 700\) and \(40, 699\)"):
        fastxent.compare_models(p, q[:, :-1], targets)
    with pytest.raises(IndexError, match="targets must lie in"):
        fastxent.compare_models(p, q, targets + 700)
