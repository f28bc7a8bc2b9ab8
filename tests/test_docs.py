"""Every recipe and shell command of the documentation runs as it stands, each page in a folder of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(page.relative_to(DOCS)): blocks
    for page in sorted(DOCS.rglob("*.md"))
    if "_build" not in page.parts and (blocks := BLOCK.findall(page.read_text("utf-8")))
}
NEEDS = {"howto/torch.md": "torch"}
NOT_OURS = ("python -m pip install",)


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
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
