"""The accuracy battery on every backend, every loss and gradient entry held to the promise; its tables in the docs."""

import re
from pathlib import Path

import mpmath
import numpy as np
import pytest

import fastxent
from fastxent.bench.exact import worst_ulps
from tests import battery, exact
from tests.battery import Block

DOCS = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text("utf-8")
EACH = [pytest.param(kind, dtype, id=f"{dtype}-{kind}") for dtype in battery.DTYPES for kind in battery.KINDS]


def check(block, backend, **how):
    try:
        battery.check(block, backend, **how)
    except AssertionError as error:
        raise AssertionError(f"{block.name}: {error}") from error


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "dtype"), EACH)
def test_every_case_keeps_the_promise(backend, kind, dtype):
    for block in battery.blocks(kind, dtype):
        check(block, backend)


OPTIONS = {
    "temperature": {"temperature": 0.3},
    "softcap": {"softcap": 30.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-3},
}
BEYOND = ("of any exponent", "the largest numbers", "masked by the lowest number")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", [kind for kind in battery.KINDS if kind not in battery.UNDEFINED])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_keep_the_promise(backend, kind, option):
    """Of float64 not where a sum over classes overflows, and not the reference: it rounds z / temperature."""
    for dtype in ("float32", "float16", *(["float64"] if backend == "cpu" and kind not in BEYOND else [])):
        for classes in (40, 300):
            check(Block(kind, classes, dtype, tuple(OPTIONS[option].items())), backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", battery.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_cut_into_shards_keep_the_promise(backend, kind, dtype):
    """In two, the first of 117 classes."""
    block = Block(kind, 300, dtype)
    want = battery.exact_of(block)
    shards = {0: want.logits[:, :117].copy(), 117: want.logits[:, 117:].copy()}
    state = None
    for start, shard in shards.items():
        state = fastxent.shards.accumulate(shard, want.targets, vocab_start=start, state=state, backend=backend)
    gradients = [
        fastxent.shards.gradient(shard, want.targets, state, vocab_start=start, reduction="none", backend=backend)
        for start, shard in shards.items()
    ]
    with np.errstate(over="ignore"):
        losses = state.nll().astype(dtype)
    battery.compare(block, backend, losses, np.concatenate(gradients, axis=1))


@pytest.mark.parametrize("kind", battery.KINDS)
def test_the_simulated_gpu_keeps_the_promise(monkeypatch, kind):
    """A small share: a row takes some 50 ms. Kinds take the dtypes other than float32 in turn."""
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    other = battery.DTYPES[1 + list(battery.KINDS).index(kind) % (len(battery.DTYPES) - 1)]
    for classes, dtype in ((16, "float32"), (600, "float32"), (70, other)):
        block = Block(kind, classes, dtype, rows=2)
        if len(block.build()[0]):
            check(block, "cuda", tiny=1.0 if dtype == "float64" else 2.0)  # a float32 entry below that may be 0 there


def test_no_case_is_a_copy():
    for dtype in battery.DTYPES:
        cases, rows = set(), 0
        for kind in battery.KINDS:
            for block in battery.blocks(kind, dtype):
                logits, targets, _ = block.build()
                rows += len(logits)
                cases |= {(row.tobytes(), int(target)) for row, target in zip(logits, targets, strict=True)}
        assert len(cases) >= 1500, dtype
        assert len(cases) >= 0.85 * rows, dtype


# the worst of all cases, kept by name: kind, classes, row, and units of the last place, rounded up
WORST = {
    ("float32", "loss"): ("tied at the top", 3, 0, 1.66),
    ("float32", "gradient"): ("confident, loss 1e-4", 9001, 0, 3.95),
    ("float64", "loss"): ("confident, loss 1e-4", 128, 4, 3.60),
    ("float64", "gradient"): ("confident, loss 1e-15", 100, 0, 7.60),
    ("float16", "loss"): ("confident, loss 1e-7", 3, 1, 1.45),
    ("bfloat16", "loss"): ("confident, loss 1e-25", 3, 4, 1.56),
    ("float8_e4m3fn", "loss"): ("confident, loss 1e-4", 3, 2, 1.38),
    ("float8_e4m3fn", "gradient"): ("sorted downwards", 128, 3, 3.74),
    ("float8_e5m2", "loss"): ("sorted downwards", 9001, 1, 3.50),
    ("float8_e5m2", "gradient"): ("confident, loss 1e-4", 1000, 0, 3.86),
}


def in_many_digits(row, target):
    """The loss and the gradient with 60 digits, from which long doubles are rounded once."""
    exact.needed()
    with mpmath.workdps(60):
        terms = [mpmath.exp(mpmath.mpf(float(x)) - float(row[target])) for x in row]
        others = mpmath.fsum(terms[:target] + terms[target + 1 :])
        gradient = [term / (1 + others) for term in terms]
        gradient[target] = -others / (1 + others)
        return [np.longdouble(mpmath.nstr(number, 30)) for number in (mpmath.log1p(others), *gradient)]


@pytest.mark.parametrize(("dtype", "what"), WORST, ids="-".join)
def test_the_worst_case_is_no_worse(dtype, what):
    """On its own, and judged by mpmath; another type of CPU may round it otherwise, by a quarter of a unit at most."""
    kind, classes, row, most = WORST[dtype, what]
    logits, targets, options = Block(kind, classes, dtype).build()
    got, gradient = fastxent.cross_entropy_with_grad(logits[[row]], targets[[row]], **options)
    loss, *entries = in_many_digits(logits[row].astype(np.float64), targets[row])
    found = (got, [loss]) if what == "loss" else (gradient[0], entries)
    assert worst_ulps(found[0], np.array(found[1])) <= most + 0.25


def test_the_table_of_the_docs():
    """Cases as counted, units of the last place as measured but for what another type of CPU may round otherwise."""
    lines = list(battery.table())
    start = DOCS.index(lines[0])
    shown = DOCS[start:].split("\n\n")[0].splitlines()
    assert len(shown) == len(lines)
    for one, other in zip(shown, lines, strict=True):
        (words, numbers), (want, measured) = (
            (re.sub(r"\d+\.\d\d", "", line), [float(n) for n in re.findall(r"\d+\.\d\d", line)])
            for line in (one, other)
        )
        assert words == want
        np.testing.assert_allclose(numbers, measured, atol=0.25)
