"""The CUDA kernels as machine code of three architectures, made and read without a GPU.

What the simulator cannot show: registers, spills, 16-byte accesses, and where float64 begins. Needs the packages of
``fastxent[cuda-check]``.
"""

import re

import pytest

from fastxent import rowmath
from fastxent.backends.cuda import compiler, forms, layout, warmup
from tests import machine_code

pytestmark = pytest.mark.skipif(machine_code.why_missing() is not None, reason=str(machine_code.why_missing()))

ARCHITECTURES = ((8, 0), (9, 0), (10, 0))
# of 256 threads, by how many of them a multiprocessor holds
BUDGETS = {3: 80, 2: 128, 1: 255}
VOCABULARY, MORE, SOME, FEW = 32_000, 4096, 1000, 256


def code(name, form, classes=VOCABULARY, written=None, entries="gradient", ends="verb", **options):
    """A kernel as the backend would ask for it."""
    how = {"capped": False, "spread": "none", "largest": False, "mergeable": classes == VOCABULARY} | options
    return compiler.Code(name, layout.GPU.kind(form, classes, **how), written, entries, ends, (9, 0))


# in every run: what most calls use, in the two formats that differ most
COMMON = (
    code("statistics", "float32"),
    code("statistics", "bfloat16"),
    code("gradient", "float32", written="float32"),
    code("gradient", "bfloat16", written="bfloat16"),
    code("gradient", "bfloat16", SOME, written="bfloat16"),
    code("gradient", "float64", written="float64"),
    code("gradient", "float64", MORE // 4, written="float64", spread="even"),
    code("shared_gradient", "bfloat16", written="bfloat16"),
    code("strip_sums", "bfloat16", spread="even"),
    code("strip_entries", "float32", written="float32", largest=True, entries="log_softmax"),
    code("gradient", "bfloat16", written="bfloat16", capped=True, spread="weights"),
    code("statistics", "bfloat16", ends="loss"),
    code("statistics", "bfloat16", FEW, ends="loss"),
    code("statistics", "float32", FEW, ends="loss"),
    code("statistics", "bfloat16", SOME, ends="loss"),
    code("statistics", "bfloat16", MORE, ends="loss"),
    code("gradient", "bfloat16", MORE, written="bfloat16", ends="loss"),
    code("gradient", "float32", written="float32", ends="loss"),
    code("gradient", "bfloat16", written="bfloat16", ends="loss"),
    code("gradient", "bfloat16", FEW, written="bfloat16", ends="loss"),
    code("gradient", "float32", SOME, written="float32", ends="loss"),
    code("shared_gradient", "float32", written="float32", ends="loss"),
    code("gradient", "bfloat16", written="bfloat16", spread="probabilities", largest=True, ends="loss"),
    code("total_weight", "float32"),
    code("total_loss", "float32"),
    code("settle_lse", "bfloat16", largest=True),
    code("strip_scores", "float32"),
    code("strip_scores", "bfloat16"),
    code("finish_scores", "bfloat16"),
    code("strip_divergences", "bfloat16"),
    # and every other kernel once, and each format
    code("finish_statistics", "float32", largest=True),
    code("finish_gradient", "bfloat16", written="bfloat16"),
    code("finish_state", "bfloat16"),
    code("slope_of_targets", "float16", capped=True),
    code("strip_counts", "float16"),
    code("log_probs", "float8_e5m2"),
    code("strip_scores", "float64"),
    code("binary", "float64"),
    code("gradient", "float16", written="float16", ends="loss"),
    code("gradient", "float8_e4m3fn", written="float32"),
    code("statistics", "float8_e5m2", ends="loss"),
)


def name_of(asked):
    kind = asked.kind
    options = ["capped"] * kind.capped + [kind.spread] * (kind.spread != "none") + ["largest"] * kind.largest
    options += [asked.entries] * (asked.entries != "gradient") + [asked.ends] * (asked.ends != "verb")
    words = [asked.name, kind.form, asked.written, f"{kind.threads}", *options, "".join(map(str, asked.architecture))]
    return "-".join(word for word in words if word)


def on(architectures, codes):
    return [asked._replace(architecture=architecture) for asked in codes for architecture in architectures]


# kernels that read logits, of which those that keep them look through shared memory too
READING = (
    *("statistics", "gradient", "strip_sums", "strip_entries", "shared_gradient"),
    *("strip_scores", "strip_counts", "strip_divergences"),
)


def is_in_registers(kind):
    """Whether a row's words are all there at once: of short rows in formats of two bytes or more, without options."""
    with_options = kind.capped or kind.largest or kind.spread != "none"
    return kind.rows > 1 and forms.FORMS[kind.form].itemsize > 1 and not with_options


def check(asked, folder):
    """All that is promised of a kernel's machine code."""
    found = machine_code.MachineCode(compiler.compile_code(asked), folder)
    assert not found.stack
    assert not found.local
    names = found.names()
    assert not [name for name in names if re.match(r"LDL|STL", name)]
    assert found.registers <= BUDGETS[compiler.resident(asked)]
    memory = "LDG" if asked.name == "strip_scores" else "LDG|LDS|STG|STS"
    over_logits = found.loops(rf"({memory}).*\.128")
    if asked.name in READING:
        assert any(re.match(r"LDG.*\.128", name) for name in names)
        assert over_logits
    if asked.name in ("gradient", "strip_entries", "shared_gradient"):
        assert any(re.match(r"STG.*\.128", name) for name in names)
        assert any(re.match(r"STG.*\.128", name) for loop in over_logits for name in loop)
    if asked.kind.form != "float64":
        for loop in over_logits:
            double = [name for name in loop if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64", name)]
            # a row that is all in registers needs no loop of its own: that over rows has their sums' float64 too
            assert not double or (
                is_in_registers(asked.kind) and len(double) < sum(name.startswith("MUFU.EX2") for name in loop)
            )


@pytest.mark.parametrize("asked", on(ARCHITECTURES, COMMON), ids=name_of)
def test_common_kernels(asked, tmp_path):
    check(asked, tmp_path)


def loads_of_four_bytes(primitives):
    load, _ = primitives._access(primitives.WORD, primitives._WORD, primitives._pointer, 4)
    return {"load_word": load}


def stores_of_four_bytes(primitives):
    _, store = primitives._access(primitives.WORD, primitives._WORD, primitives._pointer, 4)
    return {"store_word": store}


def a_constant_in_float64(primitives):
    function, sum_lanes, float32 = primitives.function, primitives.OPS.sum_lanes, primitives.types.float32
    return {"sum_lanes": function(lambda x: float32(sum_lanes(x) * 1.0000001))}


class TestBrokenKernels:
    """A kernel that is broken on purpose has machine code that is refused."""

    ASKED = code("gradient", "float32", written="float32")

    @pytest.mark.parametrize("broken", [loads_of_four_bytes, stores_of_four_bytes, a_constant_in_float64])
    def test_is_seen(self, monkeypatch, tmp_path, broken):
        from fastxent.backends.cuda import primitives

        ops = rowmath.Table(**vars(primitives.OPS) | broken(primitives))
        monkeypatch.setattr(primitives, "OPS", ops)
        with pytest.raises(AssertionError):
            check(self.ASKED, tmp_path)

    def test_spills_are_seen(self, monkeypatch, tmp_path):
        with monkeypatch.context() as crowded:
            crowded.setattr(compiler, "resident", lambda code: 6)
            found = machine_code.MachineCode(compiler.compile_code(self.ASKED), tmp_path)
        assert found.stack
        monkeypatch.setattr(machine_code, "MachineCode", lambda cubin, folder: found)
        with pytest.raises(AssertionError):
            check(self.ASKED, tmp_path)


# what an H200 that reads 4.3 TB/s has time for is 27.5 a logit in float32 and 13.8 in bfloat16
@pytest.mark.parametrize(
    ("form", "name", "options", "words", "most"),
    [
        ("float32", "statistics", {}, 4, 12),
        ("float32", "gradient", {}, 4, 12),
        ("float32", "gradient", {}, 1, 16),
        ("float32", "statistics", {"spread": "even"}, 4, 14.5),
        ("float32", "gradient", {"spread": "even"}, 4, 14.75),
        ("float32", "gradient", {"spread": "even"}, 1, 17.25),
        ("float32", "statistics", {"capped": True}, 4, 22.5),
        ("float32", "gradient", {"capped": True}, 4, 23),
        ("float32", "gradient", {"capped": True}, 1, 30),
        ("bfloat16", "statistics", {}, 4, 10.75),
        ("bfloat16", "gradient", {}, 4, 11),
        ("bfloat16", "gradient", {}, 1, 13),
        ("bfloat16", "statistics", {"spread": "even"}, 4, 13),
        ("bfloat16", "gradient", {"spread": "even"}, 4, 13.25),
        ("bfloat16", "gradient", {"spread": "even"}, 1, 14),
        ("bfloat16", "statistics", {"capped": True}, 4, 21),
        ("bfloat16", "gradient", {"capped": True}, 4, 21),
        ("bfloat16", "gradient", {"capped": True}, 1, 26),
    ],
)
def test_instructions_a_logit(form, name, options, words, most, tmp_path):
    """Of the loops that read four words at a time, and of those that write one; under a softcap where words are near 0,
    and their tanh has no exponential.
    """
    asked = code(name, form, written=form if name == "gradient" else None, ends="loss", **options)
    found, logits = machine_code.MachineCode(compiler.compile_code(asked), tmp_path), words * forms.FORMS[form].lanes
    assert found.shortest_way_round({"MUFU": logits}) <= most * logits


@pytest.mark.parametrize(
    ("form", "name", "options", "sums", "entries"),
    [
        ("float32", "statistics", {}, 14, None),
        ("float32", "gradient", {}, 13.75, 18.5),
        ("float32", "gradient", {"spread": "even"}, 16.5, 19.5),
        ("bfloat16", "statistics", {}, 11.75, None),
        ("bfloat16", "statistics", {"spread": "even"}, 14, None),
        ("bfloat16", "gradient", {}, 12, 15.25),
        ("bfloat16", "gradient", {"spread": "even"}, 14.25, 16.25),
    ],
)
def test_instructions_a_logit_of_rows_that_begin_anywhere(form, name, options, sums, entries, tmp_path):
    """Where two loads make a word, from memory for sums and from shared memory for entries."""
    asked = code(name, form, written=form if name == "gradient" else None, ends="loss", **options)
    found, count = machine_code.MachineCode(compiler.compile_code(asked), tmp_path), forms.FORMS[form].lanes
    assert found.shortest_way_round({"MUFU": 4 * count, "LDG": 8}) <= sums * 4 * count
    if entries is not None:
        assert found.shortest_way_round({"MUFU": count, "LDS": 2}) <= entries * count


@pytest.mark.parametrize(("form", "most"), [("float32", 38.5), ("bfloat16", 37)])
def test_instructions_of_a_tanh_with_an_exponential_and_a_reciprocal(form, most, tmp_path):
    found = machine_code.MachineCode(
        compiler.compile_code(code("statistics", form, ends="loss", capped=True)), tmp_path
    )
    logits = 4 * forms.FORMS[form].lanes
    assert found.shortest_way_round({"MUFU": 3 * logits}) <= most * logits


# of rows of 512 and of 1,024 bytes an H200 has time for 441 and 882 a warp's four
@pytest.mark.parametrize(
    ("form", "name", "words", "most"),
    [
        ("bfloat16", "statistics", 4, 455),
        ("bfloat16", "gradient", 4, 475),
        ("float32", "statistics", 8, 485),
        ("float32", "gradient", 8, 505),
    ],
)
def test_instructions_of_short_rows(form, name, words, most, tmp_path):
    """From one of eight threads to their next, past three meetings for its largest logit and six halves for its sum."""
    asked = code(name, form, FEW, written=form if name == "gradient" else None, ends="loss")
    found = machine_code.MachineCode(compiler.compile_code(asked), tmp_path)
    exponentials = words * forms.FORMS[form].lanes
    assert exponentials < found.shortest_way_round({r"MUFU\.EX2|SHFL": exponentials + 9}) <= most


def everything():
    """Every kernel in every format, with each option."""
    return dict.fromkeys(asked for form in forms.FORMS for asked in warmup.codes(form, (9, 0), every_option=True))


def by_kind():
    """The kernels of each kind, which have most of their functions in common."""
    found = {}
    for asked in everything():
        found.setdefault(asked.kind, []).append(asked)
    return found.values()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", by_kind(), ids=lambda kernels: name_of(kernels[0]))
def test_every_kernel(kernels, tmp_path):
    for asked in kernels:
        check(asked, tmp_path)


def test_common_kernels_are_in_the_list_and_name_all_kernels_and_formats():
    assert set(COMMON) <= set(everything())
    assert {asked.name for asked in COMMON} == set(compiler.KERNELS)
    assert {asked.kind.form for asked in COMMON} == set(forms.FORMS)


def test_a_machine_without_a_gpu_compiles_for_one_that_has(monkeypatch, tmp_path):
    """In processes of their own, to files that the other machine needs no compiler for."""
    some = [code("total_loss", "float32"), code("settle_lse", "float32", FEW, largest=True)]
    monkeypatch.setenv("FASTXENT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warmup, "codes", lambda *about: some)
    compiler.cache.folder.cache_clear()
    try:
        found = [list(warmup.compile_all(["float32"], (9, 0))) for _ in range(2)]
        monkeypatch.setattr(compiler, "compile_code", None)
        kept = [compiler.machine_code(asked) for asked in some]
    finally:
        monkeypatch.undo()
        compiler.cache.folder.cache_clear()
    assert found == [[("float32", 2, 2)], [("float32", 2, 0)]]
    assert [asked.name in compiler.entry_of(cubin) for asked, cubin in zip(some, kept, strict=True)] == [True, True]


@pytest.mark.parametrize("capability", [(7, 5), (9, 9), (99, 0)])
def test_no_kernels_for_an_architecture(capability):
    with pytest.raises(ValueError, match=r"no kernels for compute capability \d+\.\d; it may be 8\.0, .*9\.0, "):
        next(warmup.compile_all(["float32"], capability))
