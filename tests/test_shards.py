"""Losses, gradients and scores of classes that are never together, against exact arithmetic and the whole rows."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastxent
from fastxent import LseState, ScoreState, shards
from fastxent.bench.cases import AGREEMENT, KINDS, Case
from fastxent.state import STRIP
from tests import exact

CASES = [case for case in AGREEMENT if case.targets == "index"]
BACKENDS = [name for name in fastxent.backends.available() if name != "cuda"]


@functools.cache
def exact_of(case):
    return exact.Exact(case)


def cut(logits, pieces):
    """``vocab_start, block`` of ragged pieces, one of them a single class."""
    classes = logits.shape[-1]
    edges = sorted({0, min(1, classes), classes, *(classes * k // pieces for k in range(1, pieces))})
    return [(start, logits[..., start:stop]) for start, stop in itertools.pairwise(edges)]


def merged(states):
    return functools.reduce(LseState.merge, states)


def state_of(logits, targets, pieces=3, backend=None, **options):
    options = {"classes": logits.shape[-1]} | options
    parts = cut(logits, pieces)
    states = [shards.accumulate(block, targets, vocab_start=v, backend=backend, **options) for v, block in parts]
    return merged(reversed(states))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_keep_the_promise(backend, case):
    want = exact_of(case)
    logits, targets, classes = want.logits, want.targets, want.logits.shape[1]
    state = state_of(logits, targets, backend=backend, **want.options)
    loss, lse = shards.finalize(state, targets, classes=classes, return_lse=True, **want.options)
    tiny, slack = np.finfo(exact.computed(case.dtype)).tiny, 0.0
    if case.dtype == "float64":  # float64 differences of logits, before the exponential
        finite = np.where(np.isfinite(logits), logits, np.nan)
        slack = np.finfo(np.float64).eps * (np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1)).max()
    allowed = want.loss_budget + slack
    exact.assert_close(loss, want.loss, np.abs(want.loss) + want.loss_slack / allowed, allowed, tiny)
    np.testing.assert_array_equal(np.isnan(lse), ~want.counted)
    gradient = np.concatenate(
        [
            shards.gradient(block, targets, state, vocab_start=v, classes=classes, backend=backend, **want.options)
            for v, block in cut(logits, 2)
        ],
        axis=1,
    )
    exact.assert_close(gradient, want.gradient, want.terms, want.gradient_budget + 2 * slack, tiny)
    assert not gradient[~want.counted].any()


def test_strips_in_order_give_the_bits_of_the_whole():
    logits, targets, _ = Case(5, 3 * STRIP + 77).build()
    state = None
    for v in range(0, logits.shape[1], STRIP):
        state = shards.accumulate(logits[:, v : v + STRIP], targets, vocab_start=v, state=state)
    whole = fastxent.cross_entropy(logits, targets, reduction="none")
    np.testing.assert_array_equal(shards.finalize(state, targets, reduction="none").astype(np.float32), whole)


@pytest.mark.parametrize("margin", [20, 60, 87])
def test_a_confident_target_alone_in_its_shard_keeps_its_digits(margin):
    logits = np.float32([[0, 0, margin]])
    state = state_of(logits, [2])
    want = fastxent.cross_entropy(logits, [2])
    assert shards.finalize(state, [2]).astype(np.float32) == want > 0
    own = shards.gradient(logits[:, 2:], [2], state, vocab_start=2)
    assert own == -want


def test_gradient_in_place_and_upstream():
    logits, targets, _ = Case(6, 500).build()
    state, block = state_of(logits, targets), logits[:, 100:300].copy()
    arguments = {"vocab_start": 100, "grad_output": 0.3, "reduction": "sum"}
    want = shards.gradient(block, targets, state, **arguments)
    np.testing.assert_array_equal(shards.gradient(block, targets, state, out=block, **arguments), want)
    whole = fastxent.cross_entropy_grad(logits, targets, grad_output=0.3, reduction="sum")
    np.testing.assert_allclose(block, whole[:, 100:300], rtol=2e-6, atol=1e-9)


def test_any_axes_and_packing():
    logits, targets = np.random.default_rng(0).standard_normal((3, 2, 90)), np.full((3, 2), 4)
    state = state_of(logits, targets)
    again = LseState.unpack(state.pack())
    assert again.columns is not state.columns
    loss = shards.finalize(again, targets, reduction="none")
    np.testing.assert_allclose(loss, fastxent.cross_entropy(logits, targets, reduction="none"), rtol=2e-15)
    with pytest.raises(ValueError, match=r"columns must have shape \(N, 9\); got \(6, 8\)"):
        LseState.unpack(state.pack()[:, :8])


class TestRefusals:
    logits, targets = np.zeros((2, 6)), np.array([1, 5])

    def test_a_target_in_no_shard_or_in_two(self):
        half = shards.accumulate(self.logits[:, :3], self.targets, classes=6)
        with pytest.raises(ValueError, match="every target must lie in one shard; 1 of 2 do not, the first in row 1"):
            shards.finalize(half, self.targets)
        with pytest.raises(ValueError, match="the first in row 0"):
            shards.finalize(half.merge(half), [1, -100])
        nothing = shards.accumulate(np.full((2, 3), -np.inf), self.targets + 3, classes=9)
        with pytest.raises(ValueError, match="2 of 2 do not"):
            shards.finalize(nothing, self.targets)

    def test_options_that_differ(self):
        state = state_of(self.logits, self.targets, temperature=2.0)
        with pytest.raises(ValueError, match=r"states must have one temperature; got 2\.0 and 1\.0"):
            shards.finalize(state, self.targets)
        with pytest.raises(ValueError, match="one softcap"):
            shards.accumulate(self.logits, self.targets, state=state, temperature=2.0, softcap=3.0)
        plain = state_of(self.logits, self.targets)
        with pytest.raises(ValueError, match=r"must weigh 6\.0 together, as all do; got 1\.0"):
            shards.finalize(plain, self.targets, classes=6, label_smoothing=0.1)
        with pytest.raises(ValueError, match="as many rows; got 2 and 1"):
            plain.merge(LseState.empty(1))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"label_smoothing": 0.1}, ValueError, "classes must be given with label_smoothing"),
            ({"classes": 5}, ValueError, "a block must end within the 5 classes; it ends at 6"),
            ({"classes": 7, "vocab_start": -1}, ValueError, "vocab_start must be a whole number"),
            ({"axis": 0}, ValueError, "axis must be -1"),
            ({"weight": np.ones(7), "classes": 6}, ValueError, r"weight must have shape \(6,\)"),
            ({"targets": np.zeros((2, 6))}, TypeError, "targets of shards must be class indices"),
            ({"targets": np.array([1, 6]), "classes": 6}, IndexError, r"targets must lie in \[0, 5\].* in row 1"),
            ({"smoothing": 1}, TypeError, "unknown option 'smoothing'"),
        ],
    )
    def test_arguments(self, change, error, message):
        arguments = {"block": self.logits, "targets": self.targets} | change
        with pytest.raises(error, match=message):
            shards.accumulate(**arguments)

    def test_of_target_logits(self):
        with pytest.raises(TypeError, match="targets must be integer class indices"):
            shards.target_logits(np.eye(2), [1.0, 0.0])
        with pytest.raises(ValueError, match=r"targets must have the shape of logits .*; got \(1,\)"):
            shards.target_logits(np.eye(2), [1])
        with pytest.raises(ValueError, match="vocab_start must be a whole number from 0 on; got -1"):
            shards.target_logits(np.eye(2), [1, 0], vocab_start=-1)

    def test_nothing_is_written_before_an_error(self):
        out = np.full((2, 6), 7.0)
        with pytest.raises(ValueError, match="every target must lie in one shard"):
            shards.gradient(self.logits, self.targets, LseState.empty(2), out=out)
        assert (out == 7.0).all()


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
def test_a_row_of_no_weight_may_hold_anything(hole, options):
    """Whether its state was made with the sample weights or without."""
    logits, targets, _ = Case(4, 30).build()
    logits[1] = hole
    weights = options | {"sample_weight": np.float64([1, 0, 1, 1])}
    want, dwant = fastxent.cross_entropy_with_grad(logits, targets, **weights)
    for made_with in (options, weights):
        state = state_of(logits, targets, **made_with)
        np.testing.assert_allclose(shards.finalize(state, targets, classes=30, **weights), want, rtol=1e-6)
        dlogits = shards.gradient(logits, targets, state, classes=30, **weights)
        np.testing.assert_allclose(dlogits, dwant, rtol=1e-5, atol=1e-9)


values = st.one_of(st.floats(-900, 900, width=32), st.sampled_from([-np.inf, -3e7, 3e7]))


@given(data=st.data(), rows=st.integers(1, 4), classes=st.integers(3, 40))
@settings(deadline=None, max_examples=150)
def test_laws_of_the_state(data, rows, classes):
    """Any cut, order and tree of merges gives the whole; an empty state changes nothing."""
    draw = st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=rows, max_size=rows)
    logits = np.array(data.draw(draw))
    targets = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    logits[np.arange(rows), targets] = np.maximum(logits[np.arange(rows), targets], -1e9)
    first, second = sorted(data.draw(st.tuples(st.integers(0, classes), st.integers(0, classes))))
    edges = [0, first, second, classes]
    a, b, c = (
        shards.accumulate(logits[:, i:j], targets, vocab_start=i, classes=classes) if i < j else LseState.empty(rows)
        for i, j in itertools.pairwise(edges)
    )
    want = np.array([exact.nll(row, t) for row, t in zip(logits, targets, strict=True)], np.float64)
    slack = np.finfo(np.float64).eps * 4 * (np.abs(logits[np.isfinite(logits)]).max(initial=1.0))
    for state in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b), c.merge(b.merge(a))):
        np.testing.assert_allclose(state.nll(), want, rtol=4e-15 + slack, atol=1e-300)
    np.testing.assert_array_equal(a.merge(LseState.empty(rows)).columns, a.columns)
    np.testing.assert_array_equal(LseState.empty(rows).merge(a).columns, a.columns)


def scores_of(logits, targets, pieces, backend=None, order=1, **options):
    own = functools.reduce(
        np.maximum, [shards.target_logits(block, targets, vocab_start=v) for v, block in cut(logits, pieces)]
    )
    states = [
        shards.accumulate_scores(
            block, targets, own, vocab_start=v, classes=logits.shape[1], backend=backend, **options
        )
        for v, block in cut(logits, pieces)
    ]
    state = functools.reduce(ScoreState.merge, states[::order])
    top_k = options.get("top_k", 0)
    return shards.finalize_scores(state, targets, top_k=top_k, dtype=logits.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [*KINDS, "hostile"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 3, "softcap": 4.0, "temperature": 0.7}], ids=str)
def test_scores_of_shards_are_those_of_the_whole(backend, kind, dtype, options):
    logits, targets, _ = Case(12, 300, "typical" if kind == "hostile" else kind, dtype).build()
    if kind == "hostile":
        logits[0], logits[1, :150], logits[2, 7], logits[3, 200] = -np.inf, -np.inf, np.nan, np.inf
        targets[1], targets[4], logits[5, targets[5]] = 3, -100, -np.inf
    whole = fastxent.score(logits, targets, backend="reference", **options)
    computed = exact.computed(dtype)
    distance = np.abs(np.where(np.isfinite(logits), logits, 0).astype(float)).max() * np.finfo(np.float64).eps
    rtol = 8 * exact.LOSS[computed] + 8 * distance
    if "softcap" in options:
        rtol += options["softcap"] * {"float32": 2.0**-20, "float64": 2.0**-49}[computed] / options["temperature"]
    for order in (1, -1):
        got = scores_of(logits, targets, 4, backend, order, **options)
        for name, want in whole.as_dict().items():
            found = getattr(got, name)
            assert found.dtype == want.dtype
            if want.dtype.kind == "f":
                atol = rtol * np.abs(np.where(np.isfinite(want), want, 0)).max() if name == "lse" else 0.0
                np.testing.assert_allclose(found, want, rtol, atol, err_msg=name)
            else:
                np.testing.assert_array_equal(found, want, err_msg=name)


@given(data=st.data(), rows=st.integers(1, 3), classes=st.integers(4, 30), top_k=st.integers(0, 4))
@settings(deadline=None, max_examples=100)
def test_laws_of_the_score_state(data, rows, classes, top_k):
    few = st.one_of(st.sampled_from([-np.inf, -1.0, 0.0, 2.0, 3e7]), st.floats(-300, 300, width=32))
    draw = st.lists(st.lists(few, min_size=classes, max_size=classes), min_size=rows, max_size=rows)
    logits = np.array(data.draw(draw))
    targets = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    edges = [0, *sorted(data.draw(st.tuples(st.integers(1, classes - 1), st.integers(1, classes - 1)))), classes]
    own = shards.target_logits(logits, targets)
    a, b, c = (
        shards.accumulate_scores(logits[:, i:j], targets, own, vocab_start=i, classes=classes, top_k=top_k)
        if i < j
        else ScoreState.empty(rows, top_k)
        for i, j in itertools.pairwise(edges)
    )
    want = fastxent.score(logits, targets, top_k=top_k, backend="reference")
    for state in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)):
        got = shards.finalize_scores(ScoreState.unpack(state.pack()), targets, top_k=top_k)
        for name in ("rank", "rank_hi", "argmax", "is_greedy", "top_ids", "valid"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        for name in ("log_prob", "entropy", "sum_p2", "top_log_probs"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), 1e-7, 1e-300, err_msg=name)
    for same in (a.merge(ScoreState.empty(rows, top_k)), ScoreState.empty(rows, top_k).merge(a)):
        np.testing.assert_array_equal(same.columns, a.columns)


def test_scores_that_cannot_be():
    logits, targets = np.zeros((2, 6)), np.array([0, 5])
    half = shards.accumulate_scores(logits[:, :3], targets, np.zeros(2), classes=6, top_k=2)
    with pytest.raises(ValueError, match="every target must lie in one shard; 1 of 2"):
        shards.finalize_scores(half, targets)
    with pytest.raises(ValueError, match="top_k must be at most 2, what the state keeps; got 3"):
        shards.finalize_scores(half, targets, top_k=3)
    with pytest.raises(ValueError, match="must keep as many classes; got 2 and 1"):
        half.merge(ScoreState.empty(2))
    with pytest.raises(ValueError, match="a logit for each of 2 targets; got 1"):
        shards.accumulate_scores(logits, targets, [0.0])
    with pytest.raises(ValueError, match=r"columns must have shape \(N, 14 \+ 2 k\)"):
        ScoreState.unpack(half.pack()[:, :15])
