"""The kernels as the compilers made them: their PTX, run on a CPU, against the reference and the simulated GPU.

Needs the compilers of ``fastxent[cuda-check]``, of ``[cuda13]`` or of ``[cuda12]``, and no GPU.
"""

import functools
import importlib.util
import re

import numpy as np
import pytest

import fastxent
from fastxent import checks
from fastxent.backends.cuda import compiler, run, simulated
from fastxent.backends.cuda.layout import GPU, SIMULATED
from fastxent.backends.cuda.scheduler import SimulationError
from fastxent.bench import gpu_checks
from fastxent.bench.cases import Case
from tests import ptx

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="needs numba_cuda: pip install fastxent[cuda-check]"
)

TOGETHER = 16  # blocks that may wait for each other on a GPU of 132 multiprocessors


@functools.cache
def ptx_of(code):
    return compiler.linked(compiler.intermediate_code(code), code.architecture, ptx=True).decode("ascii", "ignore")


@pytest.fixture
def run_on(monkeypatch):
    """A function that makes a machine this process's GPU."""
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")

    def install(machine):
        runner = run.Runner(machine)
        monkeypatch.setattr(run, "_RUNNERS", [runner])
        return machine

    return install


def on_a_gpu(ptx_of=ptx_of, apart=False):
    return ptx.Machine(GPU._replace(launch=1 << 20), TOGETHER, ptx_of, apart)


def failed(checks_of_a_gpu):
    found = [check() for _, check in checks_of_a_gpu]
    assert found
    return [(str(one), one.errors) for one in found if not one.right]


# rows of eight threads and of two strips, with ragged ends
@pytest.mark.parametrize(("dtype", "classes"), [("bfloat16", 300), ("float32", 20_001)])
def test_what_a_gpu_is_checked_with_first(run_on, dtype, classes):
    """Every verb, with every option."""
    run_on(on_a_gpu())
    assert failed(gpu_checks.each((dtype,), (classes,), many=False, large=None)) == []


@pytest.mark.parametrize(
    ("dtype", "classes", "names"),
    [
        ("bfloat16", 5001, ("plain", "score with top 5")),
        ("float32", 300, ("plain", "smoothing", "score with top 5", "softmax")),
        ("float32", 20_000, ("plain",)),
    ],
)
def test_warps_wait_for_each_other_where_they_have_to(run_on, dtype, classes, names):
    """They and parts of them go on as chance has it: what is read before it is written is nonsense."""
    run_on(on_a_gpu(apart=True))
    found = gpu_checks.each((dtype,), (classes,), many=False, large=None)
    assert failed([one for one in found if one[0].rpartition(", ")[2] in names]) == []


def test_what_blocks_tell_each_other_is_ordered():
    """By the words that say so: the interpreter sees every store at once."""
    kind = GPU.kind("bfloat16", 50_257, False, "none", False)
    code = compiler.Code("shared_gradient", kind, "bfloat16", "gradient", "loss", (9, 0))
    text = ptx_of(code)
    shared = re.findall(r"\b(?:atom|ld|st)\.(?:acq_rel|acquire|release)\.gpu\.global\.\w+(?:\.u64)?", text)
    assert set(shared) == {
        "atom.acq_rel.gpu.global.add.u64", "ld.acquire.gpu.global.u64", "st.release.gpu.global.u64",
    }  # fmt: skip
    assert not re.search(r"\batom\.(?!acq_rel)", text)


@pytest.mark.slow
@pytest.mark.parametrize("classes", gpu_checks.CLASSES)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_all_that_a_gpu_is_checked_with(run_on, dtype, classes):
    run_on(on_a_gpu())
    assert failed(gpu_checks.each((dtype,), (classes,), many=False, large=None)) == []


@pytest.mark.slow
def test_many_rows_and_many_classes(run_on):
    run_on(on_a_gpu())
    assert failed(gpu_checks.each((), gpu_checks.CLASSES, large=None)) == []


CASES = (
    *(Case(3, classes, "confident", dtype) for dtype in ("float32", "bfloat16") for classes in (7, 65, 1203)),
    Case(3, 40, "typical", "float64"),
    Case(3, 301, "masked", "float16", options=(("softcap", 3.0),)),
    Case(3, 150, "typical", "float8_e4m3fn", options=(("label_smoothing", 0.1),)),
    Case(3, 150, "wide", "float8_e5m2", weights=True, targets="dense"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_simulated_gpu(run_on, case):
    """What was compiled does what is written, to the last bit: nothing is fused, reordered or left out."""
    logits, targets, options = case.build()
    found = []
    for machine in (simulated.Machine(), ptx.Machine(SIMULATED, simulated.Machine.together, ptx_of)):
        run_on(machine)
        out = np.full(logits.shape, np.nan, checks.gradient_dtype(logits.dtype))
        named = options | {"reduction": "none", "return_lse": True}
        found.append(fastxent.cross_entropy_with_grad(logits, targets, out=out, backend="cuda", **named))
    for simulation, compiled in zip(*found, strict=True):
        assert simulation.tobytes() == compiled.tobytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"bar\.sync\s+0;", ""),
        (r"add\.rn\.f64", "sub.rn.f64"),
        (r"ex2\.approx\.ftz\.f32", "mov.f32"),
        (r"(ld\.global\.v4\.u32\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+16]"),
        (r"setp\.lt\.s64", "setp.le.s64"),
        (r"(shfl\.sync\.bfly\.b32\s+\S+ %r\d+, )%r\d+", r"\g<1>1"),
    ],
)
def test_what_is_compiled_wrongly_is_seen(run_on, old, new):
    changes = []

    def spoiled(code):
        text, count = re.subn(old, new, ptx_of(code))
        changes.append(count)
        return text

    run_on(on_a_gpu(spoiled, apart=True))
    _, check = next(gpu_checks.each(("float32",), (20_000,), many=False, large=None))
    try:
        seen = not check().right
    except SimulationError:
        seen = True
    assert any(changes)
    assert seen


HEAD = """.visible .entry kernel(.param .u64 to) { .reg .b16 %s<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>;
    .reg .pred %p<9>;"""


def run_ptx(body, threads=32, blocks=(0,), size=512, shared=0, apart=False):
    """What a kernel leaves at the one address it is given, int32."""
    array = np.zeros(size, np.uint8)
    kernel = ptx.Kernel(f"{HEAD} ld.param.u64 %rd1, [to]; mov.u32 %r1, %tid.x; mul.wide.s32 %rd2, %r1, 4; "
                        f"add.s64 %rd3, %rd1, %rd2; {body} }}")  # fmt: skip
    kernel.launch(ptx.Memory({4096: array}), [4096], blocks, threads, shared, 2, apart)
    return array.view(np.int32)


class TestInterpreter:
    def test_threads_that_part_meet_again(self):
        body = """setp.lt.s32 %p1, %r1, 5; @%p1 bra $A; mov.u32 %r2, 7; bra $B;
            $A: mov.u32 %r2, 3; $B: add.s32 %r2, %r2, 1; st.global.u32 [%rd3], %r2; ret;"""
        assert run_ptx(body)[:32].tolist() == [4] * 5 + [8] * 27

    def test_a_loop_that_threads_leave_one_by_one(self):
        body = """mov.u32 %r2, 0; $A: add.s32 %r2, %r2, 2; setp.lt.s32 %p1, %r2, %r1; @%p1 bra $A;
            st.global.u32 [%rd3], %r2; ret;"""
        assert run_ptx(body)[:32].tolist() == [max(2, thread + thread % 2) for thread in range(32)]

    def test_a_block_meets_with_what_was_stored_before(self):
        body = """sub.s32 %r2, 63, %r1; shl.b32 %r3, %r1, 2; shl.b32 %r4, %r2, 2; setp.lt.s32 %p1, %r1, 32;
            @%p1 bra $A; st.shared.u32 [%r3], %r1; bra $B; $A: st.shared.u32 [%r3], %r2; $B: bar.sync 0;
            ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd3], %r5; ret;"""
        assert run_ptx(body, 64, shared=256)[:64].tolist() == [*range(63, 31, -1), *range(32, 64)]

    def test_a_shuffle_waits_for_those_it_names(self):
        body = """setp.lt.s32 %p1, %r1, 16; @%p1 bra $A; add.s32 %r1, %r1, 100;
            $A: shfl.sync.bfly.b32 %r2|%p2, %r1, 16, 31, -1; st.global.u32 [%rd3], %r2; ret;"""
        assert run_ptx(body)[:32].tolist() == [*range(116, 132), *range(16)]

    def test_one_block_waits_for_another(self):
        body = """mov.u32 %r2, %ctaid.x; setp.eq.s32 %p1, %r2, 1; @%p1 bra $A;
            $B: ld.acquire.gpu.global.u64 %rd4, [%rd1+256]; setp.ne.s64 %p2, %rd4, 9; @%p2 bra $B;
            st.global.u32 [%rd3], 5; ret; $A: st.release.gpu.global.u64 [%rd1+256], 9; ret;"""
        assert run_ptx(body, blocks=(0, 1))[:32].tolist() == [5] * 32

    def test_a_thread_that_has_ended_is_not_waited_for(self):
        body = "setp.lt.s32 %p1, %r1, 9; @!%p1 bra $A; ret; $A: bar.sync 0; st.global.u32 [%rd3], 7; ret;"
        assert run_ptx(body)[:32].tolist() == [0] * 9 + [7] * 23
        late = (
            "setp.lt.s32 %p1, %r1, 9; @%p1 bra $A; bar.sync 0; st.global.u32 [%rd3], 7; ret; $A: mov.u32 %r2, 1; ret;"
        )
        assert run_ptx(late)[:32].tolist() == [0] * 9 + [7] * 23

    def test_warps_apart_show_a_barrier_that_is_missing(self):
        """Whoever reads what others have stored."""
        for barrier, block, threads in (("bar.sync 0;", 63, 64), ("bar.warp.sync -1;", 31, 32)):
            body = f"""sub.s32 %r2, {block}, %r1; shl.b32 %r3, %r1, 2; shl.b32 %r4, %r2, 2; st.shared.u32 [%r3], %r1;
                {barrier} ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd3], %r5; ret;"""
            wanted = list(range(block, -1, -1))
            assert run_ptx(body, threads, shared=256, apart=True)[:threads].tolist() == wanted
            assert run_ptx(body.replace(barrier, ""), threads, shared=256, apart=True)[:threads].tolist() != wanted

    def test_numbers_are_added_by_one_thread_after_the_other(self):
        body = """atom.acq_rel.gpu.global.add.u64 %rd4, [%rd1], 3; cvt.u32.u64 %r2, %rd4;
            st.global.u32 [%rd3+128], %r2; red.global.max.s64 [%rd1+8], %rd2; ret;"""
        found = run_ptx(body)
        assert found[0] == 96
        assert found[2] == 124
        assert found[32:64].tolist() == list(range(0, 96, 3))

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("st.global.u32 [%rd3+512], %r1; ret;", "outside every buffer"),
            ("st.global.v2.u32 [%rd3], {%r1, %r1}; ret;", "8 bytes are taken from"),
            ("setp.lt.s32 %p1, %r1, 9; @%p1 bra $A; bar.sync 0; $A: bar.sync 0; ret;", "for ever"),
            ("shfl.sync.bfly.b32 %r2, %r1, 16, 31, 255; ret;", "not among those"),
            ("shfl.sync.bfly.b32 %r2, %r1, 32, 31, -1; ret;", "parts of a warp"),
            ("setp.lt.s32 %p1, %r1, 4; selp.b32 %r3, 15, -1, %p1; bar.warp.sync %r3; ret;", "name the same"),
            ("st.global.u32 [%rd1], %r1; ret;", "different numbers at one address"),
            ("$A: ld.acquire.gpu.global.u64 %rd4, [%rd1]; setp.eq.s64 %p1, %rd4, 0; @%p1 bra $A; ret;", "for ever"),
        ],
    )
    def test_what_a_gpu_leaves_unsaid_is_an_error(self, body, words):
        with pytest.raises(SimulationError, match=words):
            run_ptx(body)

    def test_a_loop_without_end_is_an_error(self, monkeypatch):
        monkeypatch.setattr(ptx, "_MOST", 1000)
        with pytest.raises(SimulationError, match="come to an end"):
            run_ptx("$A: bra $A;")

    def test_an_instruction_that_is_not_known_is_an_error(self):
        with pytest.raises(NotImplementedError, match="lop3"):
            run_ptx("lop3.b32 %r2, %r1, %r1, %r1, 8; ret;")

    @pytest.mark.parametrize(
        ("body", "wanted"),
        [
            ("mov.u32 %r2, -9; shr.s32 %r3, %r2, 40;", -1),
            ("mov.u32 %r2, -9; shl.b32 %r3, %r2, 32;", 0),
            ("mov.u32 %r2, 6; mov.u32 %r4, -1; shf.r.wrap.b32 %r3, %r2, %r4, 33;", -(2**31) + 3),
            ("mov.u32 %r2, 5; bfi.b32 %r3, %r2, -1, 8, 4;", -1 - 0xF00 + 0x500),
            ("mov.u64 %rd4, -7; div.s64 %rd5, %rd4, 2; cvt.u32.u64 %r3, %rd5;", -3),
            ("mov.f32 %f1, 0f7FC00000; setp.neu.f32 %p1, %f1, %f1; selp.b32 %r3, 1, 2, %p1;", 1),
            ("mov.f32 %f1, 0f7FC00000; setp.ge.f32 %p1, %f1, %f1; selp.b32 %r3, 1, 2, %p1;", 2),
            ("mov.f32 %f1, 0f80000000; max.f32 %f2, %f1, 0f00000000; mov.b32 %r3, %f2;", 0),
            ("mov.f32 %f1, 0f80000000; min.f32 %f2, 0f00000000, %f1; mov.b32 %r3, %f2;", -(2**31)),
            ("copysign.f32 %f2, 0f80000000, 0f3F800000; mov.b32 %r3, %f2;", 0xBF800000 - 2**32),
            ("setp.lt.u32 %p1, -1, 3; selp.b32 %r3, 1, 2, %p1;", 2),
            ("mov.u32 %r2, 0x12345678; mov.b32 {%s1, %s2}, %r2; mov.b32 %r3, {%s2, %s1};", 0x56781234),
            ("mov.f32 %f1, 0f7FC00000; max.f32 %f2, %f1, 0f3F800000; mov.b32 %r3, %f2;", 0x3F800000),
            # 1 + 2^-23 + 2^-24 - 2^-70: rounded to float64 first, it is a tie
            ("fma.rn.f32 %f3, 0f39800001, 0f397FFFFE, 0f3F800001; mov.b32 %r3, %f3;", 0x3F800001),
        ],
    )
    def test_corners_of_instructions(self, body, wanted):
        assert run_ptx(f"{body} st.global.u32 [%rd3], %r3; ret;")[0] == wanted
