"""LseState: cutting the classes anywhere and merging gives the whole; the laws of a merge."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastxent import LseState, backends
from fastxent.bench.cases import KINDS, Case
from fastxent.state import ABSENT, FIELDS, IGNORED, Spread

BACKENDS = [backends.get(name) for name in backends.available()]


def shards(module, logits, targets, cuts, weight=None):
    edges = [0, *cuts, logits.shape[1]]
    for start, stop in itertools.pairwise(edges):
        spread = None if weight is None else Spread(weight[start:stop], None, 0.0, 1.0)
        yield module.accumulate(np.ascontiguousarray(logits[:, start:stop]), targets, spread=spread, vocab_start=start)


def merged(states):
    total, *rest = states
    for state in rest:
        total = total.merge(state)
    return total


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_merge_to_the_whole(module, kind, dtype):
    logits, targets, _ = Case(20, 1000, kind, dtype).build()
    whole = module.statistics(logits, targets).nll
    got = merged(shards(module, logits, targets, [1, 256, 700, 999])).nll()
    np.testing.assert_allclose(got, whole, rtol=5e-7 if dtype == "float32" else 2e-15)


def test_cuts_at_strips_change_no_bit():
    module = backends.get("cpu")
    logits, targets, _ = Case(10, 40_000).build()
    state = None
    for start in range(0, 40_000, 8192):
        block = np.ascontiguousarray(logits[:, start : start + 8192])
        state = module.accumulate(block, targets, vocab_start=start, state=state)
    np.testing.assert_array_equal(state.nll(), module.statistics(logits, targets).nll)


@pytest.mark.parametrize("module", BACKENDS)
def test_class_gap_merges(module):
    logits, targets, _ = Case(9, 600, "typical", "float64").build()
    weight = np.random.default_rng(1).random(600)
    got = merged(shards(module, logits, targets, [100, 350], weight))
    each = np.arange(9)
    others = np.where(np.arange(600) == targets[:, None], 0.0, weight)
    peak = np.where(others > 0, logits, -np.inf).max(axis=1)
    np.testing.assert_allclose(got["peak"], peak)
    np.testing.assert_allclose(got["mass"], others.sum(axis=1), rtol=1e-14)
    np.testing.assert_allclose(got["gap"], (others * (peak[:, None] - logits)).sum(axis=1), rtol=1e-13)
    np.testing.assert_array_equal(got["target_logit"], logits[each, targets])
    np.testing.assert_array_equal(got["target_mass"], 1)


@pytest.mark.parametrize("module", BACKENDS)
def test_absent_and_ignored(module):
    state = module.accumulate(np.zeros((3, 4)), np.array([ABSENT, IGNORED, 7]))
    np.testing.assert_array_equal(state["target_mass"], 0)
    np.testing.assert_array_equal(state["total"] * 2.0 ** state["exponent"], [4, 0, 4])
    with pytest.raises(ValueError, match="2 of 3 do not, the first in row 0"):
        state.nll()
    assert module.accumulate(np.zeros((1, 4)), np.array([IGNORED])).nll() == 0


@pytest.mark.parametrize("module", BACKENDS)
def test_a_shard_of_minus_infinity_adds_nothing_and_nan_stays_in_its_row(module):
    nothing = module.accumulate(np.full((3, 5), -np.inf), np.full(3, ABSENT))
    bad = np.zeros((3, 5))
    bad[1, 2] = np.nan
    state = module.accumulate(bad, np.zeros(3, int)).merge(nothing)
    np.testing.assert_allclose(state.nll(), [np.log(5), np.nan, np.log(5)])
    np.testing.assert_array_equal(nothing.merge(nothing)["total"], 0)


sums = st.tuples(st.integers(-3000, 3000), st.floats(0.5, 1e6), st.floats(-900, 900))


def state_of(rows):
    columns = LseState.empty(len(rows)).columns
    for row, (exponent, total, peak) in zip(columns, rows, strict=True):
        row[: len(FIELDS) - 2] = 0.0, exponent, total, 0.0, peak, 0.0, 0.0
    return LseState(columns)


def value(state):
    """log2 of the sum."""
    return state["exponent"] + np.log2(state["total"])


@given(rows=st.lists(st.tuples(sums, sums, sums), min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_merging_is_associative_and_commutative_and_has_an_identity(rows):
    a, b, c = (state_of(part) for part in zip(*rows, strict=True))
    np.testing.assert_allclose(value(a.merge(b).merge(c)), value(a.merge(b.merge(c))), rtol=1e-15, atol=1e-12)
    np.testing.assert_array_equal(a.merge(b)["total"], b.merge(a)["total"])
    for same in (a.merge(LseState.empty(len(rows))), LseState.empty(len(rows)).merge(a)):
        np.testing.assert_array_equal(same.columns, a.columns)
