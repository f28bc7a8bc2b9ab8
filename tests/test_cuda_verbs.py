"""Blocks of classes, counts and divergences on the simulated GPU, against the reference and exact arithmetic."""

import itertools
import operator

import numpy as np
import pytest

import fastxent
from fastxent import shards
from fastxent.backends import cuda, reference
from fastxent.backends.cuda import run
from fastxent.backends.cuda.resident import DeviceRows
from fastxent.backends.cuda.stream import Slot, in_turn
from fastxent.bench.cases import Case
from tests import exact, test_divergences


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")


BLOCKS = (
    Case(3, 1203, "confident"),
    Case(3, 700, "wide", weights=True, ignored=0.3, options=(("label_smoothing", 0.1), ("z_loss", 1e-3))),
    Case(2, 70, "confident", "bfloat16", options=(("temperature", 0.7),)),
    Case(2, 70, "typical", "float64", options=(("softcap", 3.0), ("temperature", 1.5))),
    Case(2, 600, "typical", options=(("softcap", 5.0), ("label_smoothing", 0.2))),
)


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_gradients_of_blocks_keep_the_promise(case):
    want = exact.Exact(case)
    logits, targets, options, cut = want.logits, want.targets, want.options, case.classes // 3
    named = options | {"classes": case.classes, "backend": "cuda"}
    blocks = {0: np.ascontiguousarray(logits[:, :cut]), cut: np.ascontiguousarray(logits[:, cut:])}
    state = None
    for start, block in blocks.items():
        state = shards.accumulate(block, targets, vocab_start=start, state=state, **named)
    loss = shards.finalize(state, targets, classes=case.classes, **options)
    tiny = np.finfo(exact.computed(case.dtype)).tiny
    scale = np.abs(want.loss) + want.loss_slack / want.loss_budget
    exact.assert_close(np.asarray(loss), want.loss, scale, want.loss_budget, tiny)
    parts = [shards.gradient(block, targets, state, vocab_start=start, **named) for start, block in blocks.items()]
    gradient = np.hstack(parts)
    assert not gradient[~want.counted].any()
    lost = 2 * tiny  # below that an entry may be 0, whose factor is part of its exponent
    exact.assert_close(gradient, want.gradient, want.terms, want.gradient_budget, lost)


def test_a_gradient_of_a_block_in_place():
    logits, targets, _ = Case(3, 600, "wide").build()
    state = shards.accumulate(logits, targets, backend="cuda")
    want = shards.gradient(logits, targets, state, backend="cuda")
    kept = logits.copy()
    assert shards.gradient(kept, targets, state, out=kept, backend="cuda") is kept
    np.testing.assert_array_equal(kept, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("classes", [5, 64, 1203])
def test_counts(dtype, classes):
    logits, targets, _ = Case(4, classes, "ties", dtype).build()
    logits[1, : classes // 2] = -np.inf
    logits[2, 0] = np.nan
    levels = logits[np.arange(4), targets].astype(np.float64)
    levels[1], levels[3] = -np.inf, 0.5
    np.testing.assert_array_equal(cuda.count(logits, levels), reference.count(logits, levels))


@pytest.mark.parametrize("classes", [40, 700])
def test_scores_of_blocks(classes):
    logits, targets, _ = Case(3, classes, "confident").build()
    targets[1] = -100
    whole = fastxent.score(logits, targets, top_k=3, backend="cuda")
    cut, own, state = classes // 3, shards.target_logits(logits, np.maximum(targets, 0)), None
    for start, stop in ((0, cut), (cut, classes)):
        block = np.ascontiguousarray(logits[:, start:stop])
        part = shards.accumulate_scores(block, targets, own, vocab_start=start, top_k=3, backend="cuda")
        state = part if state is None else state.merge(part)
    merged = shards.finalize_scores(state, targets, top_k=3, dtype=np.float32)
    for name, figures in whole.as_dict().items():
        if figures.dtype.kind == "f":
            np.testing.assert_allclose(getattr(merged, name), figures, 2e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(getattr(merged, name), figures, name)


@pytest.mark.parametrize(
    ("measure", "kind", "dtype"),
    [
        ("kullback_leibler", "typical", "float32"),
        ("kullback_leibler", "confident", "float64"),
        ("jensen_shannon", "masked", "float32"),
        ("entropy", "wide", "float32"),
    ],
)
def test_divergences_and_entropy(measure, kind, dtype, monkeypatch):
    """The tests of every backend, on two rows of four."""
    pair = test_divergences.pair
    monkeypatch.setattr(test_divergences, "pair", lambda *asked: [logits[:2].copy() for logits in pair(*asked)])
    getattr(test_divergences.TestAgreement(), f"test_{measure}")("cuda", kind, dtype)


def test_corners_of_divergences():
    test_divergences.test_corners("cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_divergences_of_small_formats_and_several_strips(dtype):
    pair = [Case(2, 2200, kind, dtype).build()[0] for kind in ("typical", "wide")]
    for divergence in (fastxent.kl_divergence_from_logits, fastxent.js_divergence_from_logits):
        got, want = (divergence(*pair, backend=backend) for backend in ("cuda", "reference"))
        np.testing.assert_allclose(got, want, 1e-6)
    wide = pair[0].astype(np.float32)
    assert (fastxent.kl_divergence_from_logits(wide, pair[0], backend="cuda") < 1e-15).all()


def test_divergences_of_rows_far_apart():
    """The two logsumexps differ by what float32 does not hold."""
    p = np.random.default_rng(0).integers(-64, 64, (2, 300)).astype(np.float32) / 16
    q = p + np.float32(4096) + np.random.default_rng(1).integers(0, 3, p.shape).astype(np.float32) * np.float32(2**-11)
    for divergence in (fastxent.kl_divergence_from_logits, fastxent.js_divergence_from_logits):
        got, want = (divergence(p, q, backend=backend) for backend in ("cuda", "reference"))
        np.testing.assert_allclose(got, want, 1e-4)


def test_divergences_on_the_device():
    pairs = [Case(2, 70, kind, "bfloat16").build()[0] for kind in ("typical", "wide")]
    lse = [cuda.logsumexp(logits) for logits in pairs]
    want = cuda.divergences(*pairs, *lse)
    machine = run.runner().machine
    places = [machine.reserve(logits.nbytes) for logits in pairs]
    for place, logits in zip(places, pairs, strict=True):
        machine._memory[place][: logits.nbytes] = logits.reshape(-1).view(np.uint8)
    rows = [DeviceRows(place, 2, 70, 70, logits.dtype) for place, logits in zip(places, pairs, strict=True)]
    np.testing.assert_array_equal(cuda.divergences(*rows, *lse), want)
    with pytest.raises(NotImplementedError, match="compared in one dtype; got bfloat16 and float32"):
        cuda.divergences(rows[0], pairs[1].astype(np.float32), *lse)
    for place in places:
        machine.unreserve(place)


@pytest.mark.parametrize("verb", [fastxent.cross_entropy, fastxent.cross_entropy_with_grad, fastxent.score])
def test_blocks_of_the_host_are_copied_while_others_are_computed(verb):
    """A block is asked of one of two streams, which is waited for when the next block but one needs its place."""
    machine = run.runner().machine
    classes = machine.layout.launch // (4 * 3)  # three rows a block, of five
    logits, targets, _ = Case(13, classes, "typical").build()
    machine.events.clear()
    verb(logits, targets, backend="cuda")
    turns = [
        (stream, [name for _, name in events])
        for stream, events in itertools.groupby(machine.events, key=operator.itemgetter(0))
    ]
    one, other = (stream for stream, _ in turns[:2])
    assert [stream for stream, _ in turns] == [one, other, one, other, one, other]
    for begins, (_, names) in zip((0, 0, 1, 1, 1), turns, strict=False):
        assert names[:begins] == ["wait"] * begins
        assert names[begins] == "to device"
        assert "to host" in names
    assert [names.count("wait") for _, names in turns] == [0, 0, 1, 1, 2, 1]  # and both at the end


def test_what_fails_leaves_nothing_for_the_next_call():
    """Else the next one on those streams would write the rows of the one before."""
    machine, filled = run.runner().machine, []

    def failing(slot):
        raise KeyboardInterrupt

    with machine.current():
        slots = [Slot(machine), Slot(machine)]
        with pytest.raises(KeyboardInterrupt):
            in_turn(slots, [lambda slot: slot.then(lambda: filled.append("old")), failing])
        in_turn(slots, [lambda slot: slot.then(lambda: filled.append("new"))])
    assert filled == ["new"]


def test_a_piece_that_could_not_grow_is_not_used_again(monkeypatch):
    machine = run.runner().machine
    with machine.current():
        slot = Slot(machine)
        _, freed = slot.piece("rows", (4,), np.int64)
        with monkeypatch.context() as patched:
            patched.setattr(machine, "allocate", lambda size: (_ for _ in ()).throw(RuntimeError("no memory")))
            with pytest.raises(RuntimeError, match="no memory"):
                slot.piece("rows", (8,), np.int64)
        assert freed not in machine._memory
        _, address = slot.piece("rows", (4,), np.int64)
        assert address in machine._memory
