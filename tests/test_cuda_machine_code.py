"""The CUDA kernels as machine code of three architectures, made and read without a GPU.

What the simulator cannot show: registers, spills, 16-byte accesses, and where float64 begins. Needs the packages of
``fastxent[cuda-check]``.
"""

import re

import pytest

from fastxent.backends.cuda import compiler, forms, layout
from tests import machine_code

pytestmark = pytest.mark.skipif(machine_code.why_missing() is not None, reason=str(machine_code.why_missing()))

ARCHITECTURES = ((8, 0), (9, 0), (10, 0))
# of 256 threads, by how many of them a multiprocessor holds
BUDGETS = {3: 80, 2: 128, 1: 255}
VOCABULARY, FEW = 32_000, 256


def code(name, form, classes=VOCABULARY, written=None, entries="gradient", **options):
    """A kernel as the backend would ask for it."""
    how = {"capped": False, "spread": "none", "largest": False, "mergeable": classes == VOCABULARY} | options
    return compiler.Code(name, layout.GPU.kind(form, classes, **how), written, entries, (9, 0))


# in every run: what most calls use, in the two formats that differ most
COMMON = (
    code("statistics", "float32"),
    code("statistics", "bfloat16"),
    code("gradient", "float32", written="float32"),
    code("gradient", "bfloat16", written="bfloat16"),
    code("gradient", "bfloat16", FEW, written="bfloat16"),
    code("shared_gradient", "bfloat16", written="bfloat16"),
    code("strip_sums", "bfloat16", spread="even"),
    code("strip_entries", "float32", written="float32", largest=True, entries="log_softmax"),
    code("gradient", "bfloat16", written="bfloat16", capped=True, spread="weights"),
)


def everything():
    """Every kernel in every format, with each option."""
    for form, about in forms.FORMS.items():
        own = "float64" if form == "float64" else "float32"
        for written in dict.fromkeys((own, form)) if about.itemsize > 1 else (own,):
            for classes in (VOCABULARY, FEW):
                yield code("gradient", form, classes, written=written)
                yield code("gradient", form, classes, written=written, entries="log_softmax", largest=True)
                for spread in ("none", "even", "weights", "probabilities"):
                    largest = spread == "probabilities"
                    yield code("statistics", form, classes, spread=spread, largest=largest)
                    for capped in (False, True):
                        how = {"written": written, "spread": spread, "largest": largest, "capped": capped}
                        yield code("gradient", form, classes, **how)
            for name in ("strip_sums", "finish_statistics", "finish_state"):
                yield code(name, form)
            for name in ("finish_gradient", "strip_entries", "shared_gradient"):
                yield code(name, form, written=written)
        if form == own:
            yield code("binary", form)


def name_of(asked):
    kind = asked.kind
    options = ["capped"] * kind.capped + [kind.spread] * (kind.spread != "none") + ["largest"] * kind.largest
    words = [asked.name, kind.form, asked.written, f"{kind.threads}", *options, "".join(map(str, asked.architecture))]
    return "-".join(word for word in words if word)


def on(architectures, codes):
    return [asked._replace(architecture=architecture) for asked in codes for architecture in architectures]


def check(asked, folder):
    """All that is promised of a kernel's machine code."""
    found = machine_code.MachineCode(compiler.compile_code(asked), folder)
    assert not found.stack
    assert not found.local
    names = found.names()
    assert not [name for name in names if re.match(r"LDL|STL", name)]
    assert found.registers <= BUDGETS[compiler.resident(asked.kind)]
    reading = asked.name in ("statistics", "gradient", "strip_sums", "strip_entries", "shared_gradient")
    over_logits = [loop for loop in found.loops() if any(re.match(r"(LDG|LDS|STG|STS).*\.128", name) for name in loop)]
    if reading:
        assert any(re.match(r"LDG.*\.128", name) for name in names)
        assert over_logits
    if asked.name in ("gradient", "strip_entries", "shared_gradient"):
        assert any(re.match(r"STG.*\.128", name) for name in names)
        assert any(re.match(r"STG.*\.128", name) for loop in over_logits for name in loop)
    if asked.kind.form != "float64":
        double = [name for loop in over_logits for name in loop if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F.*F64", name)]
        assert not double


@pytest.mark.parametrize("asked", on(ARCHITECTURES, COMMON), ids=name_of)
def test_common_kernels(asked, tmp_path):
    check(asked, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("asked", on(ARCHITECTURES, dict.fromkeys(everything())), ids=name_of)
def test_every_kernel(asked, tmp_path):
    check(asked, tmp_path)
