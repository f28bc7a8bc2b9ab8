"""Every recipe and shell command of the documentation runs as it stands, each page in a folder of its own.

What does not is in ``NOT_RUN``, with the reason.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fastxent
import fastxent.dask
from fastxent import backends, bench, demo, information, shards
from tests import promises

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ANY_FENCE = re.compile(r"^(`{3,}|:{3,})(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n)+")
PAGES = {
    str(page.relative_to(DOCS)): blocks
    for page in sorted(DOCS.rglob("*.md"))
    if "_build" not in page.parts and (blocks := BLOCK.findall(page.read_text("utf-8")))
}
NEEDS = {"howto/torch.md": "torch"}
NOT_OURS = ("python -m pip install",)
SIMULATED = {"howto/gpu.md"}  # pages whose GPU is simulated

_README = "the README's, which .ci/run takes from there and runs in an empty home"
_MEASURES = "measures, for longer than a test may take; .ci/run runs the suites once"
_GPU = "needs a GPU; tests/test_bench_gpu.py runs the suite on a simulated one"
# page: how a line of it that is shown but not run here begins, "" for all of them; and why
NOT_RUN = {
    "README.md": {
        "python3 -m venv": "run by .ci/run in an empty home",
        "uv run": "uv makes an environment of its own",
        '.venv/bin/python -m pip install -q -e ".[docs]"': "the site's build, run by .ci/run with warnings as errors",
    },
    "CONTRIBUTING.md": {
        "python3 -m venv": "the first step of .ci/run does the same",
        ".venv/bin/python -m pip install": "the same",
        ".venv/bin/ruff": "run by .ci/run",
        ".venv/bin/python -m pytest -q -n 2 tests/test_cuda": "run by .ci/run",
        "python -m fuzz": "looks for what is new, without end; tests/test_fuzz.py draws from the same",
        "python -m tests.mutation": "an hour",
        "nox": "run by .github/workflows/versions.yml",
        "uv pip compile": "asks a server; tests/test_security.py holds the lock to the extras",
        "asv": _MEASURES,
        "pytest test_speed.py": _MEASURES,
        "python history.py": _MEASURES,
        "fastxent compare": _MEASURES,
        "python -m fastxent.bench.publish": "writes the pages; tests/test_bench_pages.py holds them to the record",
        "towncrier build": "moves the fragments; .ci/run builds a draft",
    },
    "docs/index.md": {"python3 -m venv": _README},
    "docs/zh/index.md": {"python3 -m venv": _README},
    "docs/cuda.md": {"": _GPU},
    "docs/performance.md": {"": _MEASURES},
    "docs/howto/compare.md": {"": _MEASURES},
    "docs/howto/gpu.md": {
        "loss, dlogits": "needs arrays on a GPU; tests/test_cuda_device.py has simulated ones",
        "loss, dhidden": "needs arrays on a GPU; tests/test_cuda_linear.py has simulated ones",
        "fastxent warmup": "needs a GPU; tests/test_cuda_warmup.py compiles for a simulated one",
        "FASTXENT_CACHE_DIR": "needs the compilers of CUDA; tests/test_cuda_machine_code.py has them",
        "fastxent compare": _GPU,
    },
    "docs/howto/hidden_states.md": {
        "python -m pip install": "needs a model in a wheel; tests/test_linear_peers.py runs it"
    },
    "docs/howto/torch.md": {"": "needs a group of processes, or JAX; tests/test_torch.py and tests/test_jax.py"},
}


def test_pages():
    assert {"index.md", "concepts.md", "howto/score_a_file.md", "zh/index.md"} <= set(PAGES)


def commands(block):
    for line in block.splitlines():
        assert line.startswith("$ "), f"output or a continued line in a block of commands: {line}"
        if not line[2:].startswith(NOT_OURS):
            command, *arguments = shlex.split(line[2:])
            yield [sys.executable, "-m", command, *arguments]


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path):
    """Python blocks share their names from the first to the last; commands run in between, where they stand."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"needs {NEEDS[page]}: pip install fastxent[peers]")
    pytest.importorskip("pyarrow"), pytest.importorskip("jinja2"), pytest.importorskip("matplotlib")
    script = ["import subprocess"]
    for kind, block in PAGES[page]:
        if kind == "python":
            script.append(block)
        else:
            script += [f"subprocess.run({command!r}, check=True)" for command in commands(block)]
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    if page in SIMULATED:
        environment["FASTXENT_CUDA_SIMULATED"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def shown_alone(text):
    """The blocks that are no Python, no commands with a prompt and no output: indented ones, and fenced for a shell."""
    fenced = [block for _, kind, block in ANY_FENCE.findall(text) if kind in ("shell", "sh", "bash", "")]
    return fenced + INDENTED.findall(ANY_FENCE.sub("", text))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_what_is_not_run_has_a_reason(page):
    name = str(page.relative_to(ROOT))
    reasons = NOT_RUN.get(name, {})
    blocks = [block.replace("\\\n", "") for block in shown_alone(page.read_text("utf-8"))]
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    for line in lines:
        assert any(line.startswith(beginning) for beginning in reasons), f"{name} shows, but nothing runs: {line}"
    for beginning in filter(None, reasons):
        assert any(line.startswith(beginning) for line in lines), f"{name} no longer shows: {beginning}"


def test_the_two_commands_are_the_readmes():
    readme = (ROOT / "README.md").read_text("utf-8")
    for page in ("index.md", "zh/index.md"):
        commands = re.findall(r"^python3 -m venv .*$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
        assert len(commands) == 2
        assert all(f"\n    {command}\n" in readme for command in commands)


def test_the_demo_that_start_here_shows():
    shown = (DOCS / "demo.txt").read_text("utf-8")
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)%", shown, re.MULTILINE)
    *steps, _ = demo.train()
    got = [[of.step, of.train_loss, of.held_out_loss, 100 * of.held_out_accuracy] for of in steps]
    np.testing.assert_allclose(np.array(rows, float), got, rtol=2e-3)


def test_the_focal_loss_of_the_page_has_its_own_gradient():
    names = {}
    exec(PAGES["howto/add_an_option.md"][0][1], names)  # noqa: S102
    rng = np.random.default_rng(1)
    logits, targets = 3 * rng.standard_normal((4, 6)), rng.integers(0, 6, 4)

    def run(logits):
        code = PAGES["howto/add_an_option.md"][0][1].split("\n\n", 2)[2]
        here = names | {"logits": logits, "targets": targets}
        exec(code, here)  # noqa: S102
        return here["loss"], here["dlogits"]

    _, dlogits = run(logits)
    for at in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[at] = 1e-5
        slope = (run(logits + step)[0] - run(logits - step)[0]) / 2e-5
        np.testing.assert_allclose(dlogits[at], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("module", [fastxent, backends, bench, fastxent.dask, information, shards])
def test_every_public_name_is_in_the_reference(module):
    listed = re.findall(r"^   ([a-zA-Z_.]+)$", (DOCS / "reference" / "index.md").read_text("utf-8"), re.MULTILINE)
    prefix = module.__name__.removeprefix("fastxent").lstrip(".")
    names = [name for name in module.__all__ if not isinstance(getattr(module, name), types.ModuleType)]
    assert names
    for name in names:
        assert f"{prefix}.{name}".lstrip(".") in listed, name


def test_what_a_page_may_load():
    pytest.importorskip("sphinx")
    specification = importlib.util.spec_from_file_location("sitechecks", DOCS / "sitechecks.py")
    sitechecks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(sitechecks)
    for allowed in (
        '<script defer src="https://cdn.jsdelivr.net/npm/mathjax@4/tex-mml-chtml.js"></script>',
        '<script src="_static/doctools.js"></script><img src="_images/a.png">',
        '<link rel="stylesheet" href="_static/a.css"><link rel="canonical" href="https://example.org/">',
        '<a href="https://numpy.org">NumPy</a>',
        "a { background: url(data:image/png;base64,AAAA) }",
    ):
        assert sitechecks.external(allowed) == []
    for loading in (
        '<script src="https://example.org/a.js"></script>',
        "<script\n async src='//example.org/a.js'></script>",
        '<link href="https://example.org/a.css" rel="stylesheet" />',
        '<link rel="preload" href="https://example.org/a.woff2" as="font">',
        '<img alt="a" src="http://example.org/a.png">',
        '@import "https://example.org/a.css";',
        "a { background: url(https://example.org/a.png) }",
    ):
        assert len(sitechecks.external(loading)) == 1, loading


def test_values_the_pages_name(tmp_path, monkeypatch):
    """``expression  # value`` on the pages that explain: the expression gives the value, to the digits shown."""
    monkeypatch.chdir(tmp_path)
    for page in ("concepts.md", "zh/concepts.md", "index.md"):
        names = {}
        found = 0
        for kind, block in PAGES[page]:
            for line in block.splitlines() if kind == "python" else ():
                expression, _, value = line.partition("  # ")
                numbers = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", value)]
                if numbers and "=" not in expression.split("(")[0]:
                    result = eval(expression, names)  # noqa: S307, our own pages
                    got = [result] if getattr(result, "ndim", 0) == 0 else list(result)
                    for number, wanted in zip(reversed(numbers), reversed(got), strict=False):
                        assert abs(number - float(wanted)) <= 1e-3 * abs(number), (page, line, result)
                    found += 1
                else:
                    exec(line, names)  # noqa: S102
        assert found >= 1, page


def test_each_promise_is_held_by_as_many_tests_as_are_said():
    tests = promises.collected()
    for _, promise, held_by, number in promises.promises():
        assert not list(promises.missing(held_by)), promise
        assert number > 0
        assert not promises.countable(held_by) or number <= promises.count(held_by, tests), promise


def test_a_promise_whose_test_is_gone_is_seen():
    gone = ["tests/test_docs.py::test_gone", "tests/test_gone.py", "test_gone"]
    assert list(promises.missing(", ".join(f"`{name}`" for name in (*gone, "test_pages")))) == gone
