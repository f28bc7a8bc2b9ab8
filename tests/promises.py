"""What docs/reliability.md counts: the tests behind each promise. ``python -m tests.promises`` writes the numbers.

Tests that need an extra are counted where the peers are installed; elsewhere their numbers stay as they are, and only
that what they name is there is seen.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
_NAMED = re.compile(r"`((?:tests/\w+\.py)?(?:(?:::)?(?:Test\w+|test_\w+))*)`")
_PEERS = "expecttest", "jax", "magika", "onnx", "onnxruntime", "optax", "sklearn", "torch"


def collected():
    """The identifiers of all tests, slow ones too, as pytest finds them here."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PAGE.parents[1], check=True)
    return [line for line in done.stdout.splitlines() if "::" in line and not line.startswith("SKIPPED")]


def promises():
    """Each line of the table: the promise, what holds it, and how many tests that are."""
    table = PAGE.read_text("utf-8").split("| promise |")[1].split("\n\n")[0].splitlines()[2:]
    for line in table:
        promise, held_by, count = (cell.strip() for cell in line.strip("|").rsplit("|", 2))
        yield line, promise, held_by, int(count.replace(",", ""))


def countable(held_by):
    """Whether all that a line names is collected here."""
    return "extra" not in held_by or all(importlib.util.find_spec(peer) for peer in _PEERS)


def missing(held_by):
    """What a line names and no file defines, whether or not it can be collected."""
    for name in filter(None, _NAMED.findall(held_by)):
        file, *inner = name.split("::") if name.startswith("tests/") else ("", *name.split("::"))
        files = [TESTS.parent / file] if file else TESTS.glob("test_*.py")
        texts = [path.read_text("utf-8") for path in files if path.exists()]
        if not any(all(re.search(rf"^ *(def|class) {one}\b", text, re.MULTILINE) for one in inner) for text in texts):
            yield name


def count(held_by, tests):
    """How many of ``tests`` are named: by file, by file and name, or by a name found in any file."""
    found = set()
    for name in filter(None, _NAMED.findall(held_by)):
        parts = name.split("::")
        for test in tests:
            file, *inner = test.split("[")[0].split("::")
            if (parts[0] == file and parts[1:] == inner[: len(parts) - 1]) or (len(parts) == 1 and name in inner):
                found.add(test)
    return len(found)


if __name__ == "__main__":
    tests, text = collected(), PAGE.read_text("utf-8")
    for line, promise, held_by, _ in promises():
        if countable(held_by):
            text = text.replace(line, f"| {promise} | {held_by} | {count(held_by, tests):,} |")
    PAGE.write_text(text, "utf-8")
