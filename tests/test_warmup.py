"""`fastxent warmup` leaves nothing to compile, and there are few kernels."""

import os
import subprocess
import sys

import pytest

# every public call there is for a dtype, few rows and many, with every option that could ask for another kernel
CALLS = """
import numpy as np, fastxent
from fastxent.backends import cpu
dtype = np.dtype("DTYPE")
for shape in ((2, 3), (3, 200), (3000, 100), (600, 1000), (1, 600_000)):
    logits, targets = np.zeros(shape).astype(dtype), np.zeros(shape[0], int)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": np.ones(shape[1]), "label_smoothing": 0.2}):
        fastxent.cross_entropy(logits, targets, **options)
        for out in (None, np.empty(shape, np.float32), np.empty(shape, np.float64), logits.copy()):
            fastxent.cross_entropy_grad(logits, targets, out=out, **options)
    fastxent.cross_entropy(np.asfortranarray(logits), targets.astype(np.uint8))
    fastxent.log_softmax(logits), fastxent.softmax(logits), fastxent.logsumexp(logits)
    cpu.count(logits, np.zeros(shape[0]))
    for options in ({}, {"weight": np.ones(shape[1]), "label_smoothing": 0.2}, {"softcap": 3.0}):
        state = fastxent.shards.accumulate(logits, targets, **options)
        for out in (None, np.empty(shape, np.float32), np.empty(shape, np.float64), logits.copy()):
            fastxent.shards.gradient(logits, targets, state, out=out, **options)
    fastxent.score(logits, targets, top_k=2, ids=[0], temperature=0.5, softcap=3.0)
    fastxent.compare_models(logits, logits, targets)
    fastxent.entropy_from_logits(logits), fastxent.js_divergence_from_logits(logits, logits)
    soft, few = np.full(shape, 0.5, np.float32), (targets[:, None], np.ones((shape[0], 1)))
    for kind in (targets, soft, few):
        options = {"z_loss": 0.1, "softcap": 3.0, "temperature": 0.5, "sample_weight": np.ones(shape[0])}
        fastxent.cross_entropy_with_grad(logits, kind, return_lse=True, **options)
    if dtype.itemsize > 2:
        fastxent.binary_cross_entropy_with_logits_with_grad(logits, soft)
"""


def warm(folder, dtypes, calls):
    environment = os.environ | {"FASTXENT_CACHE_DIR": str(folder)}
    options = [part for dtype in dtypes for part in ("--dtype", dtype)]
    command = [sys.executable, "-m", "fastxent", "warmup", *options]
    first, again = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(2)
    )
    kept = {path.name for path in folder.rglob("*.nbc")}
    for dtype in calls:
        code = CALLS.replace("DTYPE", dtype)
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert {path.name for path in folder.rglob("*.nbc")} == kept
    assert first[-1] == f"{len(kept)} kernels, {len(kept)} compiled now"
    assert again[-1] == f"{len(kept)} kernels, 0 compiled now"
    return len(kept)


def test_nothing_is_left_to_compile_for_a_dtype(tmp_path):
    assert warm(tmp_path, ["float32"], ["float32"]) <= 26


@pytest.mark.slow
def test_how_many_kernels_there_are(tmp_path):
    """Six for each dtype and three more where it is written too, parallel and serial; and copies of four sizes."""
    dtypes = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    assert warm(tmp_path, [], dtypes) <= 124


def test_nowhere_to_keep_kernels_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    environment = os.environ | {"FASTXENT_CACHE_DIR": str(tmp_path / "file")}
    command = [sys.executable, "-m", "fastxent", "warmup"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no folder can be written")
    assert done.stderr.count("\n") == 1
