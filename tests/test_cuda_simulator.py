"""Every CUDA kernel on the simulated GPU, against exact arithmetic and against its own bits.

The simulated layout is small, so that small problems meet every case: rows of a warp and of a block, ragged words,
rows of several strips. What must not happen on a GPU is an error there: tests at the end see that it is.
"""

import ast
import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

import fastxent
from fastxent import checks, rowmath
from fastxent.backends import cuda, reference
from fastxent.backends.cpu import cache as cpu_cache
from fastxent.backends.cuda import compiler, counts, elements, gradients, losses, run, scores, simulated, states, warmup
from fastxent.backends.cuda import rows as rows_of_kernels
from fastxent.backends.cuda.arrays import DeviceArray
from fastxent.backends.cuda.resident import DeviceRows
from fastxent.backends.cuda.stream import Slot
from fastxent.bench.cases import AGREEMENT, SMALL_DTYPES, Case
from fastxent.state import IGNORED, LARGEST, Coefficients, LseState, Spread
from tests import exact


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")


def options(**named):
    return tuple(named.items())


# few rows, for a simulated row takes a tenth of a second
COMMON = (
    *(Case(3, width) for width in (1, 4, 63, 64, 65)),  # two rows a block, each a warp's
    *(Case(2, width) for width in (300, 512, 513, 1203)),  # a block, a whole strip, two, three
    *(Case(2, 300, kind) for kind in ("flat", "offset", "huge offset", "sorted", "ties")),
    *(Case(2, 1203, kind) for kind in ("confident", "masked")),
    *(Case(2, 40, kind) for kind in ("confident", "wide", "masked")),
    *(Case(2, width, "confident", "float64") for width in (21, 300)),
    Case(2, 300, "huge offset", "float64"),
    *(Case(2, width, "confident", dtype) for dtype in SMALL_DTYPES for width in (40, 301)),
    Case(6, 70, ignored=0.3, weights=True, options=options(label_smoothing=0.1, z_loss=1e-3, reduction="none")),
    Case(2, 600, weights=True, options=options(label_smoothing=0.3, reduction="sum")),
    Case(3, 600, "masked", weights=True, targets="dense", options=options(z_loss=1e-3)),
    Case(2, 70, "confident", targets="dense", options=options(temperature=0.3, label_smoothing=0.1)),
    Case(2, 300, "confident", targets="sparse", options=options(reduction="none", label_smoothing=0.1)),
    Case(2, 40, options=options(softcap=5.0, temperature=0.8, label_smoothing=0.2)),
    Case(2, 600, "wide", options=options(softcap=30.0, reduction="none")),
    Case(2, 60, "wide", "float64", weights=True, targets="dense", options=options(label_smoothing=1.0)),
    Case(2, 70, "typical", "float64", options=options(softcap=3.0, temperature=1.5)),
    Case(3, 301, "typical", "bfloat16", weights=True, options=options(softcap=3.0, label_smoothing=0.1)),
    Case(2, 150, "typical", "float8_e5m2", weights=True, targets="dense"),
)


def check(case):
    want = exact.Exact(case)
    loss, gradient = fastxent.cross_entropy_with_grad(want.logits, want.targets, backend="cuda", **want.options)
    alone = fastxent.cross_entropy(want.logits, want.targets, backend="cuda", **want.options)
    np.testing.assert_array_equal(alone, loss)
    tiny = np.finfo(exact.computed(case.dtype)).tiny
    scale = np.abs(want.loss) + want.loss_slack / want.loss_budget
    exact.assert_close(loss, want.loss, scale, want.loss_budget, tiny)
    assert not gradient[~want.counted].any()
    lost = 2 * tiny  # below that an entry may be 0, whose factor is part of its exponent
    exact.assert_close(gradient, want.gradient, want.terms, want.gradient_budget, lost)


@pytest.mark.parametrize("case", COMMON, ids=lambda case: case.name)
def test_losses_and_gradients_keep_the_promise(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", AGREEMENT, ids=lambda case: case.name)
def test_every_case_keeps_the_promise(case):
    check(case)


# four words a thread and more, in a row of a warp and in strips: the loop with four on the way
LONG = (
    Case(1, 1023, "sorted"),
    Case(4, 1023, "confident"),
    Case(2, 2047, "confident", "bfloat16"),
    Case(1, 1030, "wide", "bfloat16", options=(("label_smoothing", 0.1),)),
    Case(1, 2300, "sorted", weights=True, options=(("label_smoothing", 0.1),)),
    *(Case(2, width, "sorted", options=options(label_smoothing=0.1)) for width in (1020, 1023)),
    Case(2, 1203, "confident", options=options(label_smoothing=1.0, reduction="none")),
    Case(2, 1111, "huge offset", options=options(label_smoothing=0.1)),
    *(Case(2, 1030, "wide", dtype, options=options(softcap=5.0)) for dtype in ("float32", "float16", "float64")),
    Case(2, 2048, "sorted", "bfloat16", options=options(softcap=30.0, label_smoothing=0.1, temperature=0.7)),
    Case(2, 1030, "flat", options=options(softcap=0.01, reduction="none")),
)


@pytest.fixture
def _long_shares(monkeypatch):
    layout = simulated.SIMULATED._replace(small=4096, middle=4096, threads=32, strip=4096, shared=1 << 14)
    monkeypatch.setattr(simulated.Machine, "layout", layout)


@pytest.mark.usefixtures("_long_shares")
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_several_words_a_thread(case):
    check(case)


# rows of eight threads and of a warp as a GPU has them, all of whose words are in registers: four and eight a thread
SHORT = (
    *(Case(9, width, "confident") for width in (1, 127, 128, 129, 256)),
    *(Case(2, width, kind) for width, kind in ((250, "masked"), (257, "sorted"), (1000, "confident"), (1024, "ties"))),
    *(Case(2, width, "huge offset") for width in (130, 1000)),
    *(Case(3, width, "confident", "bfloat16") for width in (256, 257, 511, 1000, 2047)),
    *(Case(2, width, "wide", "float16") for width in (200, 1100)),
    *(Case(2, width, "confident", "float64") for width in (127, 400)),
    *(Case(2, width, "typical", dtype) for width, dtype in ((600, "float8_e4m3fn"), (1500, "float8_e5m2"))),
    Case(40, 100, ignored=0.3, weights=True, options=options(z_loss=1e-3)),
    Case(2, 200, weights=True, options=options(label_smoothing=0.1, reduction="none")),
    Case(2, 700, "confident", "bfloat16", targets="dense", options=options(softcap=5.0)),
)


@pytest.fixture
def _short_rows(monkeypatch):
    layout = simulated.SIMULATED._replace(tiny=1024, few=8, small=4096, middle=4096, shared=1 << 15)
    monkeypatch.setattr(simulated.Machine, "layout", layout)


@pytest.mark.usefixtures("_short_rows")
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_rows_in_registers(case):
    check(case)


@pytest.mark.usefixtures("_short_rows")
@pytest.mark.parametrize("classes", [90, 300])
def test_rows_in_registers_whose_first_or_last_words_are_masked(classes):
    """By a finite number, which must not become the base of what comes after."""
    logits = np.random.default_rng(0).normal(size=(4, classes)).astype(np.float32)
    for number, part in ((-3e38, slice(2, 60)), (-1e9, slice(40, None)), (-np.inf, slice(1, None, 2))):
        logits[1:, part] = number
        want = fastxent.cross_entropy(logits, [0, 0, 1, 2], reduction="none", backend="reference")
        got = fastxent.cross_entropy(logits, [0, 0, 1, 2], reduction="none", backend="cuda")
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("classes", "kind"), [(40, "wide"), (300, "confident"), (1203, "masked")])
def test_softmax_log_softmax_and_logsumexp(dtype, classes, kind):
    logits, _, _ = Case(2, classes, kind, dtype).build()
    z = logits.astype(exact.REAL)
    computed = exact.computed(dtype)
    tiny, largest = np.finfo(computed).tiny, z.argmax(axis=1)
    excess = np.array([exact.nll(row, k) for row, k in zip(z, largest, strict=True)])[:, None]
    peak = z.max(axis=1, keepdims=True)
    p = np.exp((z - peak) - excess)
    got = cuda.softmax(logits, np.empty(logits.shape, dtype))
    exact.assert_close(got, p, p, exact.GRADIENT[computed], tiny)
    got = cuda.log_softmax(logits, np.empty(logits.shape, dtype))
    terms = (peak - z) + excess
    exact.assert_close(got, -terms, np.where(np.isfinite(terms), terms, 0), exact.LOSS[computed], tiny)
    lse = cuda.logsumexp(logits)
    exact.assert_close(lse, (peak + excess)[:, 0], (np.abs(peak) + excess)[:, 0], exact.LOSS[computed], tiny)


@pytest.mark.parametrize("classes", [2, 40, 600])
def test_all_others_without_mass_leave_a_smoothed_loss_infinite(classes):
    logits = np.full((1, classes), -np.inf, np.float32)
    logits[0, 1] = 1.0
    assert fastxent.cross_entropy(logits, [1], label_smoothing=0.1, backend="cuda") == np.inf


@pytest.mark.parametrize("softcap", [0.01, 5.0, 15.0, 30.0, 50.0])
def test_a_softcap_adds_no_more_than_is_promised(softcap):
    """However the exponential and the reciprocal err. The worst is where the polynomial ends."""
    tanh_parts = rowmath.build_terms(simulated.OPS, rowmath.FLOAT32).tanh_parts
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(*ends, 100_000) for ends in ((0, 10), (0.6, 0.7))])
    x = (x * softcap).astype(np.float32)
    off = tanh_parts(x * np.float32(1 / softcap))[0] - np.tanh(x.astype(exact.REAL) / softcap)
    assert np.abs(off).max() <= 2.0**-22


def test_float64_near_its_largest_number():
    with np.errstate(all="ignore"):  # as while a kernel runs
        assert simulated.OPS.fma(np.float64(4e307), np.float64(1.5), np.float64(-1e307)) == 5e307
    logits = np.tile(np.array([1.0, 0.5, 0.0, -0.5]) * 4e307, (3, 1))
    want = fastxent.cross_entropy(logits, [0, 1, 2], reduction="none", backend="reference")
    np.testing.assert_array_equal(fastxent.cross_entropy(logits, [0, 1, 2], reduction="none", backend="cuda"), want)


def test_far_beyond_a_softcap():
    """Where exp(-2 |y|) is less than the smallest normal number, and before."""
    logits = np.linspace(40, 60, 257, dtype=np.float32)[:, None] * np.float32([1, 0.01, -1])
    for softcap in (1.0, 0.7):
        want = fastxent.cross_entropy(logits, np.ones(257, int), softcap=softcap, reduction="none", backend="reference")
        got = fastxent.cross_entropy(logits, np.ones(257, int), softcap=softcap, reduction="none", backend="cuda")
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [[-np.inf] * 3, [np.inf, 0, 0], [np.nan, 0, 1], [np.nan] * 3], ids=str)
@pytest.mark.parametrize("classes", [40, 600])
def test_a_bad_row_is_nan_alone(bad, classes):
    logits = np.full((3, classes), -np.inf, np.float32)
    logits[:, :3] = 0
    logits[1, :3] = bad
    for target in (0, LARGEST):
        targets = np.full(3, target)
        out = np.empty_like(logits)
        nothing = np.zeros(1)
        found = cuda.statistics_and_gradient(
            logits, targets, Coefficients(np.ones(1), nothing, nothing, nothing), out, wanted=("lse",)
        )
        np.testing.assert_array_equal(np.isnan(found.nll), [False, True, False])
        assert np.isnan(out[1, :3]).all()
        assert np.isfinite(out[::2]).all()
    with np.errstate(invalid="ignore"):
        want = [np.log(3), reference.logsumexp(logits[1:2])[0], np.log(3)]
    np.testing.assert_allclose(cuda.logsumexp(logits), want, rtol=1e-7)


@pytest.mark.parametrize("spread", [None, Spread(np.linspace(0.1, 2, 1203), None, 0.0, 1.0)], ids=["plain", "weights"])
def test_shards_are_the_whole(spread):
    """A cut at a multiple of the strip leaves the very bits."""
    logits, targets, _ = Case(3, 1203, "confident").build()
    targets[1] = IGNORED
    whole = cuda.accumulate(logits, targets, spread=spread)
    strip = simulated.SIMULATED.strip // 4
    for cut, exactly in ((strip, True), (2 * strip, True), (700, False)):
        state = None
        for start, stop in ((0, cut), (cut, 1203)):
            part = None if spread is None else spread._replace(weight=spread.weight[start:stop])
            shard = np.ascontiguousarray(logits[:, start:stop])
            state = cuda.accumulate(shard, targets, spread=part, vocab_start=start, state=state)
        np.testing.assert_allclose(state.nll(), whole.nll(), rtol=0 if exactly else 5e-7)
        if exactly and spread is None:
            np.testing.assert_array_equal(state.columns, whole.columns)
    want = reference.accumulate(logits, targets, spread=spread)
    np.testing.assert_allclose(whole.nll(), want.nll(), rtol=5e-7)
    for field in ("peak", "gap", "mass"):
        np.testing.assert_allclose(whole[field], want[field], rtol=1e-6)
    assert isinstance(whole, LseState)


def results(logits, targets, out=None, **named):
    named = {"reduction": "none", "label_smoothing": 0.1, "backend": "cuda"} | named
    loss, gradient = fastxent.cross_entropy_with_grad(logits, targets, out=out, **named)
    return loss.tobytes(), gradient.tobytes()


@pytest.mark.parametrize(
    ("dtype", "classes"), [("float32", 45), ("float32", 1203), ("bfloat16", 301), ("float64", 301)]
)
class TestSameBits:
    @pytest.mark.parametrize("words", ["few", "many"])
    def test_for_any_address(self, dtype, classes, words, monkeypatch):
        """Rows one after the other begin anywhere; those of the backend's own buffers at multiples of 16 bytes. With
        ``many`` words a thread takes four at a time.
        """
        if words == "many":
            layout = simulated.SIMULATED._replace(tiny=8192, small=8192, middle=8192, strip=8192, shared=1 << 17)
            monkeypatch.setattr(simulated.Machine, "layout", layout)
        logits, targets, _ = Case(9, classes, "wide", dtype).build()
        want = results(logits, targets)

        def packed(slot, name, values, dtype):
            return slot.upload(name, values, dtype), values.shape[1]

        monkeypatch.setattr(Slot, "upload_rows", packed)
        assert results(logits, targets) == want
        monkeypatch.setattr(run, "_padded", lambda classes, dtype: classes)
        assert results(logits, targets) == want
        if dtype == "bfloat16":
            wide = np.empty(logits.shape, np.float32)
            results(logits, targets, wide)
            assert wide.astype(dtype).tobytes() == want[1]

    def test_for_blocks_that_wait_and_blocks_that_read_again(self, dtype, classes, monkeypatch):
        logits, targets, _ = Case(4, classes, "wide", dtype, ignored=0.3).build()
        want = results(logits, targets)
        monkeypatch.setattr(simulated.Machine, "together", 0)
        monkeypatch.setattr(simulated.Machine, "launch", functools.partialmethod(simulated.Machine.launch, resident=1))
        assert results(logits, targets) == want

    def test_for_any_batch_split_order_and_place(self, dtype, classes):
        logits, targets, _ = Case(5, classes, "confident", dtype).build()
        loss, gradient = results(logits, targets)
        for rows in (slice(0, 1), slice(1, 5), [4, 2, 0]):
            got = results(np.ascontiguousarray(logits[rows]), targets[rows])
            assert got[0] == np.frombuffer(loss, checks.loss_dtype(logits.dtype))[rows].tobytes()
            assert got[1] == np.frombuffer(gradient, dtype).reshape(logits.shape)[rows].tobytes()
        kept = logits.copy()
        assert results(kept, targets, out=kept)[1] == gradient


@pytest.mark.parametrize(("dtype", "classes"), [("float32", 45), ("float32", 1203), ("bfloat16", 1203)])
class TestRowsOnTheDevice:
    """They stay there, wherever they begin, and have the bits of those of the host."""

    @pytest.fixture
    def place(self, dtype, classes):
        """Logits on the device, not at a multiple of 16 bytes; and how to look at them."""
        logits, targets, _ = Case(3, classes, "wide", dtype).build()
        machine, stride = run.runner().machine, classes + 3
        size = logits.itemsize * (3 * stride + 1)
        address = machine.reserve(size)
        seen = machine._memory[address][logits.itemsize : size].view(dtype).reshape(3, stride)
        seen[:, :classes] = logits
        yield logits, targets, DeviceRows(address + logits.itemsize, 3, classes, stride, logits.dtype), seen
        machine.unreserve(address)

    def test_statistics(self, place):
        logits, targets, rows, _ = place
        wanted = "target_logit", "peak", "lse"
        got, want = (cuda.statistics(given, targets, wanted=wanted) for given in (rows, logits))
        for field in ("nll", *wanted):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        np.testing.assert_array_equal(cuda.logsumexp(rows), cuda.logsumexp(logits))

    def test_the_gradient_in_place(self, place, classes):
        logits, targets, rows, seen = place
        nothing = np.zeros(1)
        coefficients, want = Coefficients(np.ones(1), nothing, nothing, nothing), np.empty_like(logits)
        cuda.statistics_and_gradient(logits, targets, coefficients, want)
        beside = seen[:, classes:].copy()
        cuda.statistics_and_gradient(rows, targets, coefficients, rows)
        assert seen[:, :classes].tobytes() == want.tobytes()
        assert seen[:, classes:].tobytes() == beside.tobytes()

    def test_formats_that_no_kernel_writes(self, place, dtype):
        _, _, rows, _ = place
        other = DeviceRows(rows.address, 3, rows.classes, rows.stride, np.dtype(np.float64))
        with pytest.raises(NotImplementedError, match=f"{dtype} logits on a device"):
            cuda.softmax(rows, other)


def test_an_array_of_a_device_is_taken_for_its_rows(monkeypatch):
    class Tensor:
        """As torch's: only where it is is asked."""

        def __dlpack_device__(self):
            return 2, 0

    runner, found = run.runner(), []
    monkeypatch.setattr(run, "rows_of", lambda array, stream: found.append(array) or "rows")
    tensor, array = Tensor(), np.zeros((1, 2))
    assert runner.taken(tensor) == "rows"
    assert found == [tensor]
    assert runner.taken(array) is array


def test_a_target_out_of_range_is_flagged_and_not_read(monkeypatch):
    """The host checks its own targets, so this is what a kernel does with those it has not seen."""
    flags = []
    zeros = Slot.zeros

    def spied(slot, name, count):
        address = zeros(slot, name, count)
        flags.extend([(slot, address)] * (name == "flag"))
        return address

    monkeypatch.setattr(Slot, "zeros", spied)
    for classes in (40, 600):
        logits, nothing = np.zeros((3, classes), np.float32), np.zeros(1)
        out = np.ones_like(logits)
        coefficients = Coefficients(np.ones(1), nothing, nothing, nothing)
        found = cuda.statistics_and_gradient(logits, np.array([0, classes, 1]), coefficients, out)
        np.testing.assert_array_equal(np.isnan(found.nll), [False, True, False])
        np.testing.assert_array_equal(np.isnan(out).all(axis=1), [False, True, False])
        slot, address = flags[-1]
        assert slot.machine._memory[address].view(np.int64)[0] == 2


def test_kept_machine_code_is_named_after_the_sources(monkeypatch, tmp_path):
    """No kernel outlives an edit of what it is made of."""
    monkeypatch.setenv("FASTXENT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_code", lambda code: b"made")
    kind = simulated.SIMULATED.kind("float32", 4, False, "none", False)
    asked = compiler.Code("binary", kind, None, "", "verb", (9, 0))
    names = []
    for source in (compiler.sources()[0], tmp_path / "edited.py"):
        (tmp_path / "edited.py").write_text("other")
        monkeypatch.setattr(compiler, "sources", lambda source=source: [source])
        monkeypatch.setattr(compiler, "_DIGEST", compiler._digest_of_sources())
        for _ in range(2):
            assert compiler.machine_code(asked) == b"made"
        names.append(set(tmp_path.rglob("*.cubin")))
    assert [len(found) for found in names] == [1, 2]


def test_sources_that_change_while_they_are_in_use_are_those_that_were_read(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTXENT_CACHE_DIR", str(tmp_path))
    before = compiler.folder()
    monkeypatch.setattr(compiler, "sources", list)
    assert compiler._digest_of_sources() != before.name
    assert compiler.folder() == before


def test_a_package_without_sources_keeps_no_kernels(monkeypatch, tmp_path):
    missing = tmp_path / "rowmath.py"
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [missing])
    spec = importlib.util.spec_from_file_location("compiler_without_sources", compiler.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.folder() is None


def test_where_nothing_can_be_compiled_what_others_have_compiled_is_taken(monkeypatch, tmp_path):
    """Of other versions of the compilers; where one can compile, it compiles anew."""
    monkeypatch.setattr(compiler, "folder", lambda: tmp_path)
    kind = simulated.SIMULATED.kind("float32", 4, False, "none", False)
    asked = compiler.Code("binary", kind, None, "", "verb", (9, 0))
    for installed, made in ((["numba 1"], b"elsewhere"), ([], None), (["numba 2"], b"here")):
        monkeypatch.setattr(compiler, "_compilers", lambda installed=installed: installed)
        monkeypatch.setattr(compiler, "can_compile", lambda installed=installed: bool(installed))
        monkeypatch.setattr(compiler, "compile_code", {asked: made}.get)
        assert compiler.machine_code(asked) == (made or b"elsewhere")
        assert not warmup.keep(asked)
    assert sorted(file.read_bytes() for file in tmp_path.iterdir()) == [b"elsewhere", b"here"]


def test_what_cannot_be_compiled_is_one_sentence(monkeypatch):
    monkeypatch.setattr(compiler, "_compilers", lambda: ["numba 1"])
    asked = compiler.Code(
        "binary", simulated.SIMULATED.kind("float32", 4, False, "none", False), None, "", "verb", (9, 0)
    )
    with pytest.raises(RuntimeError, match=r"binary for compute capability 9\.0 .* pip install"):
        compiler.compile_code(asked)


def test_machine_code_that_cannot_be_kept_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "folder", lambda: tmp_path)
    monkeypatch.setattr(compiler, "compile_code", lambda code: b"made")
    kind = simulated.SIMULATED.kind("float32", 4, False, "none", False)
    asked = compiler.Code("binary", kind, None, "", "verb", (9, 0))
    compiler.file_of(asked).mkdir()
    assert compiler.machine_code(asked) == b"made"
    assert list(tmp_path.iterdir()) == [compiler.file_of(asked)]


def test_machine_code_is_named_after_what_kernels_are_made_of_and_nothing_else():
    """The files that the compiler imports, here or by another."""
    here, root = Path(compiler.__file__).parent, Path(fastxent.__file__).parents[1]
    found, left = set(), [Path(compiler.__file__)]
    while left:
        source = left.pop()
        found.add(source)
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fastxent"):
                module = root / node.module.replace(".", "/")
                for name in node.names:
                    submodule = module / f"{name.name}.py"
                    imported = submodule if submodule.exists() else module.with_suffix(".py")
                    left += [imported] * (imported.parent == here and imported not in found)
                    if imported.parent != here and imported != Path(cpu_cache.__file__):
                        assert imported in compiler.sources(), f"{source.name} imports {name}"
                        found.add(imported)
    assert sorted(found) == compiler.sources()


def test_machine_code_is_found_whatever_compiled_kernels_for_the_cpu(monkeypatch, tmp_path):
    """On a machine that has other versions: what is carried there was compiled elsewhere."""
    monkeypatch.setenv("FASTXENT_CACHE_DIR", str(tmp_path))
    cpu_cache.folder.cache_clear()
    try:
        place, of_cpu = compiler.folder(), cpu_cache.folder()
        (place / "carried.cubin").touch()
        os.utime(place, (0, 0))
        monkeypatch.setattr(cpu_cache.numba, "__version__", "another")
        cpu_cache.folder.cache_clear()
        cpu_cache.folder()  # makes one, and removes old ones of the CPU's beside it
        assert compiler.folder() == place
        assert (place / "carried.cubin").exists()
        assert of_cpu.parent == cpu_cache.folder().parent == place.parents[1]
        assert len({place, of_cpu, cpu_cache.folder()}) == 3
    finally:
        monkeypatch.undo()
        cpu_cache.folder.cache_clear()


def test_numpy_without_a_name_that_numba_cuda_uses(monkeypatch):
    monkeypatch.delattr(np, "row_stack", raising=False)
    compiler.repair_numpy()
    assert np.vstack is np.vstack


def test_rows_with_and_without_a_target_are_not_mixed():
    with pytest.raises(NotImplementedError, match="separate calls"):
        cuda.statistics(np.zeros((2, 4), np.float32), np.array([LARGEST, 0]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_binary(dtype):
    rng = np.random.default_rng(0)
    logits = np.concatenate([[30, -30, 80, -80, np.inf, -np.inf], 4 * rng.standard_normal(600)]).astype(dtype)
    targets, weight = (rng.random(606) < 0.5).astype(dtype), rng.integers(0, 3, 606).astype(float)
    arguments = {"weight": weight, "pos_weight": np.full(606, 2.5), "reduction": "none", "label_smoothing": 0.0}
    got, want = (
        (
            fastxent.binary_cross_entropy_with_logits(logits, targets, backend=backend, **arguments),
            fastxent.binary_cross_entropy_with_logits_grad(logits, targets, backend=backend, **arguments),
        )
        for backend in ("cuda", "reference")
    )
    budget = {"float32": 1e-6, "float64": 4e-15}[dtype]
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, rtol=budget)


def off_by_a_ten_thousandth(exp2):
    return lambda x: exp2(x) * np.float32(1 + 1e-4)


def read_behind_the_row(load):
    return lambda address: load(address + 16)


def alone(shuffle):
    """Each thread has its own."""
    return lambda x, distance, width: x


def of_three_lanes(add):
    return lambda x: add(x[:2]) + x[2] if len(x) == 4 else add(x)


def as_if_added_before(add):
    def fetch_add(address, value):
        return add(address, value) + 1

    return fetch_add


def without_a_sign(less):
    return lambda x, base: less(base, x)


def published_at_once(wait_for):
    return lambda address, value: None


class TestBrokenKernels:
    """A kernel that is broken on purpose, in what its threads are given, does not keep the promise."""

    @pytest.mark.parametrize(
        ("name", "broken", "case"),
        [
            ("exp2", off_by_a_ten_thousandth, Case(2, 300, "typical")),
            ("load_word", read_behind_the_row, Case(2, 40, "typical")),
            ("shuffle_xor", alone, Case(2, 40, "typical")),
            ("sum_lanes", of_three_lanes, Case(2, 300, "typical")),
            ("fetch_add", as_if_added_before, Case(2, 1203, "typical")),
            ("less_the_base", without_a_sign, Case(2, 300, "huge offset")),
            ("wait_for", published_at_once, Case(2, 1203, "typical")),
        ],
        ids=lambda value: getattr(value, "__name__", None),
    )  # fmt: skip
    def test_is_seen(self, monkeypatch, name, broken, case):
        ops = vars(simulated.OPS)
        check(case)
        monkeypatch.setattr(simulated, "OPS", rowmath.Table(**ops | {name: broken(ops[name])}))
        with pytest.raises((AssertionError, simulated.SimulationError)):
            check(case)


class TestSimulation:
    """What must not happen is seen."""

    def launch(self, kernel, buffers=(), threads=32, shared=0):
        simulated.Launch(list(buffers)).run(kernel, (), [0], threads, shared)

    def test_addresses(self):
        room = simulated._aligned(64)
        first = room.ctypes.data
        for address, message in ((first + 64, "outside"), (first - 16, "outside"), (first + 4, "no multiple")):
            with pytest.raises(simulated.SimulationError, match=message):
                self.launch(lambda at=address: simulated.load_word(at), [(first, first + 64)])
        with pytest.raises(simulated.SimulationError, match="shared memory"):
            self.launch(lambda: simulated.shared_load_word(16), shared=16)

    def test_threads_that_wait_for_ever(self):
        room = simulated._aligned(16)
        room[:] = 0
        address = room.ctypes.data
        with pytest.raises(simulated.SimulationError, match="for ever"):
            self.launch(lambda: simulated.OPS.wait_for(address, 1), [(address, address + 16)])

        def some_shuffle():
            if simulated.OPS.thread() < 3:
                simulated.OPS.shuffle_xor(0.0, 1, 32)

        with pytest.raises(simulated.SimulationError, match="warp"):
            self.launch(some_shuffle)

    def test_every_kernel_is_in_this_file(self, monkeypatch):
        """Kernels are found by name where they are launched."""
        seen = set()
        function_of = compiler.function_of

        def spied(ops, code):
            seen.add(code.name)
            return function_of(ops, code)

        nothing = np.zeros(1)
        monkeypatch.setattr(compiler, "function_of", spied)
        for classes in (4, 600, 2100):
            logits = np.zeros((1, classes), np.float32)
            fastxent.cross_entropy(logits, [0], backend="cuda")
            fastxent.cross_entropy_grad(logits, [0], backend="cuda")

        def on_device(shape, dtype):
            machine = run.runner().machine
            array = DeviceArray(machine, 0, shape, dtype)
            with machine.current():
                machine.clear(0, array.address, array.dtype.itemsize * max(shape[0], 1))
            return array

        fastxent.logsumexp(on_device((1, 4), np.float32))
        fastxent.cross_entropy_grad(on_device((1, 4), np.float32), on_device((1,), np.int64))
        fastxent.cross_entropy(on_device((0, 4), np.float32), on_device((0,), np.int64), reduction="sum")
        state = cuda.accumulate(logits, np.zeros(1, int), softcap=3.0)
        cuda.gradient(logits, np.zeros(1, int), state, Coefficients(*[nothing] * 4), np.empty_like(logits))
        fastxent.score(logits[:, :9], [0], top_k=1, backend="cuda")
        cuda.count(logits, nothing)
        cuda.divergences(logits, logits, nothing, nothing)
        fastxent.binary_cross_entropy_with_logits(logits[0], logits[0], backend="cuda")
        monkeypatch.undo()
        assert seen == set(compiler.KERNELS)
        kind = simulated.SIMULATED.kind("float32", 600, False, "none", False)
        for module in (counts, elements, losses, scores, states):
            assert set(vars(module.build(simulated.OPS, kind))) == set(module.KERNELS)
        assert set(vars(rows_of_kernels.build(simulated.OPS, kind, "loss"))) == set(rows_of_kernels.KERNELS)
        made = gradients.build(simulated.OPS, kind, "verb", "float32", "gradient")
        assert set(vars(made)) == set(gradients.KERNELS)
