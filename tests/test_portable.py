"""What a system without POSIX's calls would see: they are taken away before anything is imported."""

import subprocess
import sys

WITHOUT_POSIX = """
import os, signal, sys
import filelock, numba, numpy as np  # these bring what they need of the system
sys.modules["fcntl"] = None
for name in ("getuid", "register_at_fork", "posix_fadvise"):
    delattr(os, name)
del signal.SIGBUS

import fastxent
from fastxent import cli
from fastxent.backends.cpu import cache

assert cache.folder() is not None
assert fastxent.cross_entropy(np.float32([[20, 0]]), [0]) == np.float32(np.log1p(np.exp(-20)))
np.save("logits.npy", np.zeros((3, 4), np.float32))
np.save("targets.npy", np.zeros(3, int))
cli._end_on_bus_error()
cli.main(["score", "logits.npy", "targets.npy", "-o", "scores.npy"])
"""


def test_the_functions_work_without_posix_and_files_are_refused_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_POSIX], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1:] == [
        "error: scores are written to files on POSIX systems only: their part is held by flock"
    ], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.npy", "targets.npy"]
