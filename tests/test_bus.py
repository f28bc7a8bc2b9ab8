"""A file that shrinks while it is mapped ends the process with a line, in whatever thread."""

import subprocess
import sys

import pytest

CODE = """
import mmap, os, sys, threading
from fastxent.io.bus import end_with
end_with(b"error: gone\\n", 1)
with open(sys.argv[1], "w+b") as file:
    file.truncate(1 << 20)
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    file.truncate(0)
look = lambda: mapped[1 << 19]
thread = threading.Thread(target=look)
look() if sys.argv[2] == "main" else (thread.start(), thread.join())
"""


@pytest.mark.parametrize("thread", ["main", "other"])
def test_one_line_and_the_code(tmp_path, thread):
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "a", thread], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: gone\n")
