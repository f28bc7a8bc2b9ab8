"""`fastxent warmup --backend cuda` compiles each kernel once; its list has all that a call can ask for, and no other.

What calls ask for is taken down by a GPU of the real one's layout that runs next to nothing.
"""

import inspect
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner

import fastxent
from fastxent import backends, checks, cli, shards
from fastxent.backends.cuda import calls, compiler, forms, run, scratch, simulated, warmup
from fastxent.backends.cuda.layout import GPU
from fastxent.bench import gpu, gpu_checks, gpu_kernels

SM_90 = 9, 0
ROWS = 2


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    monkeypatch.setattr(calls, "_PLANS", {})
    monkeypatch.setattr(scratch, "_STREAMS", {})
    # so that three strips are too many to wait for each other
    runner = run.Runner(gpu_kernels.Asked(SM_90, together=2))
    monkeypatch.setattr(run, "_RUNNERS", [runner])
    return runner.machine


def widths(dtype):
    """Classes of eight threads' row, of a warp's, of two warps', of a block's, of blocks that wait for each other, and
    of more blocks than do.
    """
    sizes = GPU.tiny, GPU.small, GPU.middle, GPU.strip
    tiny, small, middle, strip = (size // np.dtype(dtype).itemsize for size in sizes)
    return tiny, small, middle, middle + 1, strip + 1, 2 * strip + 1


def options_of(classes, every_option):
    """Every option that could ask for another kernel, in every combination."""
    for softcap, smoothing, weighted in itertools.product((None, 3.0), (0.0, 0.1, 1.0), (False, True)):
        if every_option or not (softcap or smoothing or weighted):
            weight = {"weight": np.ones(classes)} if weighted else {}
            yield weight | {"softcap": softcap, "label_smoothing": smoothing}


def targets_of(classes, every_option):
    """By the kind of target: class indices, probabilities of all classes and of a few."""
    indices = np.zeros(ROWS, int)
    if not every_option:
        return (indices,)
    return indices, np.full((ROWS, classes), 1 / classes), (indices[:, None], np.ones((ROWS, 1)))


def ask_of_host(logits, every_option):
    classes, indices = logits.shape[1], np.zeros(ROWS, int)
    outs = [None, np.empty(logits.shape, checks.loss_dtype(logits.dtype))][: 1 + every_option]
    for options in options_of(classes, every_option):
        for targets in targets_of(classes, every_option):
            fastxent.cross_entropy(logits, targets, backend="cuda", **options)
            for out in outs:
                fastxent.cross_entropy_with_grad(logits, targets, out=out, backend="cuda", **options)
            nobody = {"sample_weight": np.zeros(ROWS)} if every_option else {}
            fastxent.cross_entropy_with_grad(logits, targets, backend="cuda", **options, **nobody)
        fastxent.score(logits, indices, top_k=2, softcap=options["softcap"], backend="cuda")
    fastxent.logsumexp(logits, backend="cuda")
    for function, out in itertools.product((fastxent.softmax, fastxent.log_softmax), outs):
        function(logits, out=out, backend="cuda")
    backends.get("cuda").count(logits, np.zeros(ROWS))
    fastxent.kl_divergence_from_logits(logits, logits, backend="cuda")
    fastxent.binary_cross_entropy_with_logits_with_grad(logits, np.zeros(logits.shape), backend="cuda")


def ask_of_blocks(logits, every_option):
    """Of classes: their rows have strips whatever their length."""
    classes, indices = logits.shape[1], np.zeros(ROWS, int)
    for options in options_of(classes, every_option):
        about = options | {"classes": classes}
        shards.accumulate(logits, indices, backend="cuda", **about)
        state = shards.accumulate(logits, indices, backend="reference", **about)
        for out in (None, np.empty(logits.shape, checks.loss_dtype(logits.dtype)))[: 1 + every_option]:
            shards.gradient(logits, indices, state, out=out, backend="cuda", **about)


def ask_of_device(logits, every_option):
    (_, classes), real = logits.shape, checks.loss_dtype(logits.dtype)

    def placed(value):
        if not isinstance(value, np.ndarray):
            return value
        return gpu_checks._placed(value if value.dtype.kind == "i" else value.astype(real))

    given = gpu_checks._placed(logits)
    outs = [None, placed(logits.astype(real))][: 1 + every_option]
    for options in options_of(classes, every_option):
        for targets in targets_of(classes, every_option)[:2]:
            goals, there = placed(targets), {name: placed(value) for name, value in options.items()}
            fastxent.cross_entropy(given, goals, **there)
            fastxent.cross_entropy(gpu_checks._placed(logits[:0]), placed(targets[:0]), **there)
            for out in outs:
                fastxent.cross_entropy_with_grad(given, goals, out=out, **there)
    fastxent.logsumexp(given)
    for function, out in itertools.product((fastxent.softmax, fastxent.log_softmax), outs):
        function(given, out=out)


def names(codes):
    """What differs in a few words a kernel."""
    return sorted(str((*code.kind, *code)) for code in codes)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of figures that no kernel has computed
class TestTheList:
    @pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every option"])
    @pytest.mark.parametrize("form", forms.FORMS)
    def test_it_is_what_calls_ask_for(self, machine, form, every_option):
        for classes in widths(form):
            logits = np.zeros((ROWS, classes)).astype(form)
            ask_of_host(logits, every_option)
            ask_of_device(logits, every_option)
        ask_of_blocks(np.zeros((ROWS, 3)).astype(form), every_option)
        listed = warmup.codes(form, SM_90, every_option)
        assert len(listed) == len(set(listed))
        assert names(machine.codes.keys() - set(listed)) == []
        assert names(set(listed) - machine.codes.keys()) == []

    @pytest.mark.parametrize("form", forms.FORMS)
    def test_the_suite_of_a_gpu_asks_for_no_other(self, machine, form):
        for _, check in gpu_checks.each((form,), widths(form), seed=0, many=False, large=None):
            check()
        plain, every = (
            {code for of in (form, "float32") for code in warmup.codes(of, SM_90, every_option)}
            for every_option in (False, True)
        )
        assert names(machine.codes.keys() - every) == []
        assert len(machine.codes.keys() - plain) > 50

    def test_what_the_suite_asks_for_is_found_by_asking(self, machine, monkeypatch):
        """Its checks in one format, and one shape of its times."""
        each = gpu_checks.each
        monkeypatch.setattr(
            gpu_checks, "each", lambda seed, large: each(("float16",), (40, 700), seed, many=False, large=large)
        )
        monkeypatch.setattr(gpu_kernels, "GPU_SHAPES", ((8, 3000), (8, 9000)))
        monkeypatch.setattr(gpu, "OPTION_SHAPE", (8, 40))
        monkeypatch.setattr(gpu_kernels, "Asked", lambda *about: machine)
        monkeypatch.setattr(gpu_kernels.simulated, "Machine", None)
        found = gpu_kernels._ask(SM_90, 2)
        every = {code for of in forms.FORMS for code in warmup.codes(of, SM_90, every_option=True)}
        assert set(found) <= every
        assert {code.kind.threads for code in found} == {8, 32, 64, 256}
        assert {code.kind.form for code in found} == {"float16", "bfloat16", "float32"}
        assert {"strip_scores", "log_probs", "binary", "finish_state", "total_weight"} <= {code.name for code in found}

    def test_those_without_options_come_first(self):
        for form in forms.FORMS:
            plain, every = (warmup.codes(form, SM_90, every_option) for every_option in (False, True))
            assert every[: len(plain)] == plain


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """What is compiled, by threads that make nothing of it, into a folder."""
    compiled = []
    monkeypatch.setattr(compiler, "compile_code", lambda code: compiled.append(code) or b"made")
    monkeypatch.setattr(compiler, "folder", lambda: tmp_path)
    monkeypatch.setattr(compiler, "can_compile", lambda: True)
    monkeypatch.setattr(warmup, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(warmup, "_architectures", lambda: [SM_90, (10, 0)])
    return compiled


class TestCompiling:
    def test_each_kernel_is_compiled_once(self, compilers, tmp_path):
        dtypes = ["float32", "bfloat16"]
        found = [list(warmup.compile_all(dtypes, SM_90)) for _ in range(2)]
        wanted = [warmup.codes(dtype, SM_90) for dtype in dtypes]
        both = len(wanted[1]) - len(set(wanted[0]) & set(wanted[1]))
        assert found[0] == [("float32", len(wanted[0]), len(wanted[0])), ("bfloat16", both, both)]
        assert found[1] == [("float32", len(wanted[0]), 0), ("bfloat16", both, 0)]
        assert set(compilers) == {*wanted[0], *wanted[1]}
        assert len(compilers) == len(set(compilers)) == len(list(tmp_path.glob("*.cubin")))

    def test_a_process_has_kernels_of_one_kind(self, compilers, monkeypatch):
        """As many at once as share what is compiled of them; another may have the rest."""
        batches, together = [], warmup._keep_all
        monkeypatch.setattr(warmup, "_keep_all", lambda codes: batches.append(codes) or together(codes))
        list(warmup.compile_all(["float32", "bfloat16"], SM_90))
        assert max(map(len, batches)) == warmup._BATCH
        assert all(len({code.kind for code in codes}) == 1 for codes in batches)
        kinds = {code.kind for code in compilers}
        assert len(batches) <= len(kinds) + len(compilers) // warmup._BATCH

    def test_kernels_of_a_kind_have_the_same_functions(self):
        kind = GPU.kind("float32", 1000, False, "none", False)
        made = [compiler.Code(name, kind, "float32", "gradient", "loss", SM_90) for name in ("statistics", "gradient")]
        loss, gradient = (inspect.getclosurevars(compiler.function_of(simulated.OPS, code)).nonlocals for code in made)
        assert loss["sum_in_turn"] is gradient["sum_in_turn"]

    def test_every_option_leaves_those_without_as_they_are(self, compilers):
        list(warmup.compile_all(["float16"], SM_90))
        every = len(warmup.codes("float16", SM_90, every_option=True))
        assert list(warmup.compile_all(["float16"], SM_90, every_option=True)) == [
            ("float16", every, every - len(warmup.codes("float16", SM_90)))
        ]

    def test_of_those_that_are_chosen_each_is_compiled(self, compilers):
        chosen = [*warmup.codes("float16", SM_90)[:3], warmup.codes("float32", SM_90, every_option=True)[200]]
        found = list(warmup.compile_all(["float16", "float32"], SM_90, chosen=lambda architecture: chosen))
        assert found == [("float16", 3, 3), ("float32", 1, 1)]
        assert set(compilers) == set(chosen)

    @pytest.mark.usefixtures("compilers")
    def test_what_is_not_kept_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setattr(compiler, "folder", lambda: tmp_path / "gone")
        with pytest.raises(OSError, match=r"kernels cannot be kept in .*gone"):
            list(warmup.compile_all(["float32"], SM_90))


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["warmup", *arguments])


class TestCommand:
    @pytest.mark.parametrize("named", ["10.0", "100", "sm_100"])
    def test_for_an_architecture(self, compilers, named):
        done = invoke("--backend", "cuda", "--dtype", "float64", "--architecture", named)
        number = len(warmup.codes("float64", (10, 0)))
        said = f"{number} kernels, {number} compiled now"
        assert (done.exit_code, done.stdout.splitlines()) == (0, [f"float64: {said}", said])
        assert {code.architecture for code in compilers} == {(10, 0)}

    @pytest.mark.usefixtures("machine")
    def test_for_the_gpu_at_hand_with_every_option(self, compilers):
        done = invoke("--backend", "cuda", "--dtype", "float32", "--every-option")
        assert done.exit_code == 0
        assert set(compilers) == set(warmup.codes("float32", SM_90, every_option=True))

    @pytest.mark.parametrize("named", ["9", "9.0.1", "sm_90a", "hopper", "-9.0", ""])
    def test_what_is_no_capability(self, named):
        done = invoke("--backend", "cuda", f"--architecture={named}")
        assert done.exit_code == 2
        assert f"{named!r} is not a compute capability such as 9.0" in done.stderr

    @pytest.mark.parametrize("named", ["7.5", "9.9"])
    @pytest.mark.usefixtures("compilers")
    def test_one_without_kernels(self, named):
        done = invoke("--backend", "cuda", "--architecture", named)
        wanted = f"error: there are no kernels for compute capability {named}; it may be 9.0, 10.0\n"
        assert (done.exit_code, done.stderr, done.stdout) == (2, wanted, "")

    @pytest.mark.parametrize("missing", ["numba_cuda", "cuda.core", "cuda.bindings"])
    def test_compilers_that_cannot_be_loaded_are_one_sentence(self, monkeypatch, missing):
        monkeypatch.setattr(compiler, "can_compile", lambda: True)
        monkeypatch.setitem(sys.modules, missing, None)
        done = invoke("--backend", "cuda", "--architecture", "9.0")
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith("error: the compilers of CUDA are not installed: pip install fastxent[cuda13]")

    def test_without_compilers_kernels_may_have_been_compiled_elsewhere(self, compilers, monkeypatch):
        """Then nothing is left to do."""
        about = "--backend", "cuda", "--dtype", "float64", "--architecture", "9.0"
        carried, number = invoke(*about), len(compilers)
        assert carried.stdout.splitlines()[-1] == f"{number} kernels, {number} compiled now"
        monkeypatch.setattr(compiler, "_compilers", list)
        monkeypatch.setattr(compiler, "can_compile", lambda: False)
        monkeypatch.setattr(warmup, "_architectures", None)
        assert invoke(*about).stdout.splitlines()[-1] == f"{number} kernels, 0 compiled now"

    def test_without_compilers_a_missing_kernel_is_one_sentence(self, monkeypatch, tmp_path):
        monkeypatch.setattr(compiler, "folder", lambda: tmp_path)
        monkeypatch.setattr(compiler, "_compilers", list)
        done = invoke("--backend", "cuda", "--architecture", "9.9")
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "for compute capability 9.9 has not been compiled, and what compiles it is not installed" in done.stderr

    def test_of_the_suite(self, compilers, monkeypatch):
        some = warmup.codes("float64", SM_90)[:2]
        monkeypatch.setattr(gpu_kernels, "asked", lambda architecture: some)
        done = invoke("--backend", "cuda", "--suite", "--architecture", "9.0")
        assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "2 kernels, 2 compiled now")
        assert set(compilers) == set(some)
        refused = invoke("--backend", "cuda", "--suite", "--every-option", "--architecture", "9.0")
        assert (refused.exit_code, "exclude each other" in refused.stderr) == (2, True)

    @pytest.mark.slow
    def test_of_the_whole_suite(self):
        found = gpu_kernels.asked(SM_90)
        assert len(found) == len(set(found)) > 900
        assert set(found) <= {code for of in forms.FORMS for code in warmup.codes(of, SM_90, every_option=True)}

    @pytest.mark.parametrize("option", [("--architecture", "9.0"), ("--every-option",), ("--suite",)])
    def test_they_are_for_cuda(self, option):
        done = invoke(*option)
        assert done.exit_code == 2
        assert "are for --backend cuda" in done.stderr
