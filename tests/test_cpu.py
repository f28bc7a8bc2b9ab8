"""What the CPU kernels promise beyond their values: the same bits however the work is cut, and packed code."""

import ast
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numba
import numpy as np
import pytest

import fastxent
from fastxent import shards
from fastxent.backends import cpu
from fastxent.backends.cpu import cache, kernels, twins
from fastxent.bench.cases import SMALL_DTYPES, Case

SHAPES = ((700, 1000), (40, 32_000), (3, 300_000))


@pytest.fixture
def many_threads():
    before = numba.get_num_threads()
    yield numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(before)


def both(logits, targets):
    return fastxent.cross_entropy_with_grad(logits, targets, reduction="none", label_smoothing=0.1)


def assert_same(got, want):
    for left, right in zip(got, want, strict=True):
        np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestSameBits:
    def test_for_any_number_of_threads(self, shape, dtype, many_threads):
        logits, targets, _ = Case(*shape, dtype=dtype).build()
        want = both(logits, targets)
        for threads in range(1, many_threads + 1):
            numba.set_num_threads(threads)
            assert_same(both(logits, targets), want)

    def test_for_either_twin(self, shape, dtype, monkeypatch):
        logits, targets, _ = Case(*shape, dtype=dtype).build()
        results = []
        for work in (0, 1 << 62):
            monkeypatch.setattr(twins, "PARALLEL_FROM", work)
            results.append(both(logits, targets))
        assert_same(*results)

    def test_for_any_number_of_segments(self, shape, dtype, monkeypatch):
        logits, targets, _ = Case(*shape, dtype=dtype, ignored=0.3).build()
        want = both(logits, targets)
        for segments in (2, 7, 74):
            monkeypatch.setattr(cpu, "_segments", lambda block, targets, n=segments: n)
            assert_same(both(logits, targets), want)
            kept = logits.copy()
            fastxent.cross_entropy_grad(kept, targets, out=kept, reduction="none", label_smoothing=0.1)
            assert_same([kept], [want[1]])

    def test_for_any_batch_split_and_order(self, shape, dtype):
        logits, targets, _ = Case(*shape, dtype=dtype).build()
        want = both(logits, targets)
        order = np.random.default_rng(0).permutation(len(logits))
        assert_same([part[np.argsort(order)] for part in both(logits[order], targets[order])], want)
        pieces = [both(logits[i : i + 7], targets[i : i + 7]) for i in range(0, len(logits), 7)]
        assert_same([np.concatenate(part) for part in zip(*pieces, strict=True)], want)

    def test_with_and_without_the_gradient(self, shape, dtype):
        logits, targets, _ = Case(*shape, "confident", dtype).build()
        want, _ = fastxent.cross_entropy_with_grad(logits, targets, reduction="none")
        assert_same([fastxent.cross_entropy(logits, targets, reduction="none")], [want])


@pytest.mark.parametrize("dtype", SMALL_DTYPES)
class TestSmallDtypes:
    def test_every_code_is_read_exactly(self, dtype):
        """A row for each bit pattern, its other class a bit less than 1: the loss tells which number was read."""
        width = np.dtype(dtype).itemsize * 8
        codes = np.arange(1 << width, dtype=f"u{width // 8}").view(dtype)
        logits = np.stack([codes, np.full(len(codes), 0.875, dtype)], axis=1)
        wide = np.stack([codes.astype(np.float32), np.full(len(codes), 0.875, np.float32)], axis=1)
        targets = np.ones(len(codes), int)
        for padding in (0, 200):  # a lane a row, and lanes along a row
            pad = np.full((len(codes), padding), -4, np.float32)
            few, many = (np.concatenate([x, pad.astype(x.dtype)], axis=1) for x in (logits, wide))
            got = fastxent.cross_entropy(few, targets, reduction="none")
            np.testing.assert_array_equal(got, fastxent.cross_entropy(many, targets, reduction="none"))

    def test_the_gradient_is_that_of_float32_rounded_once(self, dtype):
        logits, targets, _ = Case(40, 5003, "wide", dtype).build()
        options = {"reduction": "none", "label_smoothing": 0.1, "grad_output": 3.0}
        want = fastxent.cross_entropy_grad(logits.astype(np.float32), targets, **options)
        wide = fastxent.cross_entropy_grad(logits, targets, out=np.empty(logits.shape, np.float32), **options)
        np.testing.assert_array_equal(wide, want)
        for out in (np.empty_like(logits), logits):
            narrow = fastxent.cross_entropy_grad(logits, targets, out=out, **options)
            np.testing.assert_array_equal(narrow.astype(np.float32), want.astype(dtype).astype(np.float32))

    def test_rounding_reaches_infinity_and_keeps_nan(self, dtype):
        logits = np.array([[0, 0], [0, np.nan]], dtype)
        out = fastxent.cross_entropy_grad(logits, [0, 0], reduction="none", grad_output=1e30, out=np.empty_like(logits))
        with np.errstate(over="ignore"):
            want = (np.float32([[-5e29, 5e29], [np.nan, np.nan]])).astype(dtype)
        np.testing.assert_array_equal(out.astype(np.float32), want.astype(np.float32))


@pytest.mark.skipif(
    not re.search(r"\+(avx2|avx512f)\b", numba.core.codegen.get_host_cpu_features()),
    reason="needs x86-64 with AVX2 or more",
)
def test_float32_forward_is_packed():
    fresh = numba.njit(error_model="numpy")(kernels.statistics)  # a kernel from the cache shows no code
    logits, scaling = np.zeros((1, 2), np.float32), cpu._scaling(np.dtype(np.float32), None, 1.0)
    results = kernels.Results(np.zeros(1), *np.empty((4, 0)))
    shares = cpu._shares(None, np.dtype(np.float32))
    fresh(logits, 2, np.zeros(1, np.int64), shares, scaling, 1, np.zeros((1, 1, 8)), results)
    (code,) = fresh.inspect_asm().values()
    packed = re.compile(r"vfmadd\w+ps\s.*%[yz]mm")
    loops = [block for block in re.split(r"^\.LBB", code, flags=re.MULTILINE) if len(packed.findall(block)) >= 36]
    assert loops
    if numba.config.CPU_NAME == "haswell":
        assert "zmm" not in code
    for loop in loops:
        assert not re.search(r"vcvtps2pd|vfmadd\w+[sp]d|vfmadd\w+ss|\bcall", loop)
    assert not re.search(r"\bcall\w*\s+.*\bexpf?\b", code)


# the kernel that compiles fastest
RUN = "import numpy as np, fastxent; print(fastxent.binary_cross_entropy_with_logits(np.float32([20]), [1]))"


def run_with(environment):
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("2.0611537e-09\n", "", 0)


class TestCache:
    def test_kernels_are_kept(self, tmp_path):
        environment = os.environ | {"FASTXENT_CACHE_DIR": str(tmp_path)}
        run_with(environment)
        kept = list(tmp_path.rglob("*.nbc"))
        assert kept
        written = {path: path.stat().st_mtime_ns for path in kept}
        run_with(environment)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == written

    @pytest.mark.parametrize("suffix", ["nbc", "nbi"])
    def test_a_torn_file_is_healed(self, tmp_path, suffix):
        environment = os.environ | {"FASTXENT_CACHE_DIR": str(tmp_path)}
        run_with(environment)
        torn = {path: path.stat().st_size for path in tmp_path.rglob(f"*.{suffix}")}
        assert torn
        for path in torn:
            path.write_bytes(path.read_bytes()[:50])
        run_with(environment)
        run_with(environment)
        assert all(path.stat().st_size > 50 for path in torn)

    def test_a_folder_others_can_write_is_not_trusted(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTXENT_CACHE_DIR", str(tmp_path))
        cache.path().mkdir(parents=True)
        cache.path().chmod(0o777)
        cache.folder.cache_clear()
        assert cache.folder() is None
        cache.path().chmod(0o700)
        cache.folder.cache_clear()
        assert cache.folder() == cache.path()
        monkeypatch.undo()
        cache.folder.cache_clear()

    def test_only_its_own_old_folders_are_removed(self, tmp_path):
        for name in ("0123456789abcdef", "src", "0123456789abcdee", "fedcba9876543210"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.nbc").write_text("kernel")
        (tmp_path / "0123456789abcdee" / "thesis.txt").write_text("precious")
        (tmp_path / "notes.txt").write_text("precious")
        for path in (*tmp_path.iterdir(),):
            if path.name != "fedcba9876543210":
                os.utime(path, (0, 0))
        cache._remove_old(tmp_path)
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        assert left == ["0123456789abcdee/thesis.txt", "fedcba9876543210/a.nbc", "notes.txt", "src/a.nbc"]
        assert not (tmp_path / "0123456789abcdef").exists()

    def test_two_processes_filling_it_at_once(self, tmp_path):
        environment = os.environ | {"FASTXENT_CACHE_DIR": str(tmp_path)}
        codes = [RUN, RUN.replace("[1])", "[1], label_smoothing=0.5)"), RUN.replace("float32", "float64")]
        first = [subprocess.Popen([sys.executable, "-c", code], env=environment) for code in codes]
        assert [process.wait() for process in first] == [0, 0, 0]
        for code in codes:
            fresh = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
            alone = os.environ | {"FASTXENT_CACHE_DIR": str(tmp_path / "alone")}
            want = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, check=True)
            assert fresh.stdout == want.stdout

    def test_no_writable_folder(self):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG", "NUMBA"))}
        run_with(environment | {"HOME": "/proc/no-home"})

    def test_the_folder_changes_with_what_a_kernel_is_made_of(self, monkeypatch, tmp_path):
        (tmp_path / "rowmath.py").write_text("LN2 = 0.7")
        monkeypatch.setattr(cache, "sources", lambda: [tmp_path / "rowmath.py"])
        before = cache._digest()
        (tmp_path / "rowmath.py").write_text("LN2 = 0.6")
        assert cache._digest() != before

    def test_the_folder_changes_with_whether_indices_are_checked(self, monkeypatch):
        before = cache._digest()
        monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)
        assert cache._digest() != before

    def test_kernels_are_made_of_nothing_else(self):
        root, made_of = Path(fastxent.__file__).parents[1], cache.sources()
        assert {"rows.py", "rowmath.py", "state.py", "formulas.py"} <= {source.name for source in made_of}
        for source in made_of:
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("fastxent"):
                    module = root / node.module.replace(".", "/")
                    for name in node.names:
                        submodule = module / f"{name.name}.py"
                        imported = submodule if submodule.exists() else module.with_suffix(".py")
                        assert imported in made_of, f"{source.name} imports {imported}"


def test_next_tokens_are_scored_where_they_lie(monkeypatch):
    """logits[:, :-1]: rows that lie together by the thousand are neither gathered nor scattered."""
    monkeypatch.setattr(cpu.strided, "copy", None)
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((3, 1101, 1024), np.float32)
    targets, out = generator.integers(0, 1024, (3, 1100)), np.empty_like(logits)[:, :-1]
    found = fastxent.cross_entropy_with_grad(logits[:, :-1], targets, out=out)
    wanted = fastxent.cross_entropy_with_grad(logits[:, :-1].copy(), targets)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_whole_copy_of_a_gradient_that_is_not_written_where_it_lies(dtype):
    out = np.empty((1000, 16_384), dtype).T
    logits = np.random.default_rng(0).standard_normal((16_384, 1000), np.float32)
    fastxent.log_softmax(logits, out=out)
    tracemalloc.start()
    fastxent.log_softmax(logits, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < logits.nbytes / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 11, 300), (2, 2, 70_000)])
def test_padded_vocabularies_are_read_and_written_where_they_lie(monkeypatch, dtype, shape):
    """logits[..., a:b]: no copy, what is beside the classes neither read nor written, the same bits."""
    monkeypatch.setattr(cpu.strided, "copy", None)
    generator = np.random.default_rng(0)
    whole = np.full((*shape[:2], shape[2] + 21), np.nan).astype(dtype)
    logits = whole[..., 7:-14]
    logits[...] = generator.normal(0.0, 3.0, shape).astype(dtype)
    plain, targets = logits.copy(), generator.integers(0, shape[2], shape[:2])
    wanted = fastxent.cross_entropy_with_grad(plain, targets, label_smoothing=0.1, reduction="none")
    assert_same([fastxent.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")], wanted[:1])
    score, plain_score = (fastxent.score(z, targets, top_k=3) for z in (logits, plain))
    assert score == plain_score
    for function in (fastxent.log_softmax, fastxent.softmax, fastxent.logsumexp):
        assert_same([function(logits)], [function(plain)])
    kl = fastxent.kl_divergence_from_logits
    assert_same([kl(logits, plain[::1] * 2)], [kl(plain, plain * 2)])
    state, plain_state = (shards.accumulate(z, targets) for z in (logits, plain))
    assert_same([state.columns], [plain_state.columns])
    assert_same([shards.gradient(logits, targets, state)], [shards.gradient(plain, targets, state)])
    found = fastxent.cross_entropy_with_grad(
        logits, targets, label_smoothing=0.1, reduction="none", out=logits if wanted[1].dtype == logits.dtype else None
    )
    assert_same([np.ascontiguousarray(array) for array in found], wanted)
    assert np.isnan(whole[..., :7].astype(np.float32)).all()
    assert np.isnan(whole[..., -14:].astype(np.float32)).all()


def test_rows_too_long_to_gather_several():
    every_other = np.random.default_rng(0).standard_normal((2, 2 * (2**20 + 1)), np.float32)[:, ::2]
    whole, targets = np.ascontiguousarray(every_other), [5, 2**20]
    assert fastxent.score(every_other, targets) == fastxent.score(whole, targets)
    out = np.zeros((2, 2 * (2**20 + 1)), np.float32)[:, ::2]
    fastxent.cross_entropy_grad(every_other, targets, out=out)
    np.testing.assert_array_equal(out, fastxent.cross_entropy_grad(whole, targets))
