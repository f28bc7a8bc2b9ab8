"""No kernel reads or writes beyond its arrays: pages that may not be touched lie before or after each of them.

NUMBA_BOUNDSCHECK sees what is indexed, the few numbers of a row; the vectors of logits, gradients and probabilities
go through pointers, which these pages guard.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.battery import DTYPES

GUARDED = """
import ctypes, functools, itertools, mmap, sys
import numpy as np, fastxent
from fastxent import shards
from fastxent.backends import cpu
from fastxent.backends.cpu import twins

PAGE, allocate = mmap.PAGESIZE, np.empty
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

def guarded(shape, dtype=float, *, at_end=True, **named):
    '''An array that ends, or begins, where the process may not go on.'''
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    whole = (size + PAGE - 1) // PAGE * PAGE
    room = np.frombuffer(mmap.mmap(-1, whole + 2 * PAGE), np.uint8)
    for page in (0, PAGE + whole):
        assert mprotect(room.ctypes.data + page, PAGE, 0) == 0
    start = PAGE + (whole - size if at_end else 0)
    return room[start : start + size].view(dtype).reshape(shape)

def guard(array, at_end):
    copy = guarded(array.shape, array.dtype, at_end=at_end)
    copy[...] = array
    return copy

def with_gaps(lay, array):
    '''The rows of an array with something between them, but not before the first and after the last.'''
    (rows, classes), width = array.shape, array.shape[1] + 5
    flat = lay(np.full(rows * width - 5, 3, array.dtype))
    bits = flat.view(f"u{flat.itemsize}")  # NumPy knows no strides of float8
    gapped = np.lib.stride_tricks.as_strided(bits, array.shape, (width * flat.itemsize, flat.itemsize))
    gapped = gapped.view(array.dtype)
    gapped[...] = array
    return flat, gapped
"""
CALLS = """
dtype = np.dtype(sys.argv[1])
few, many = (1, 2, 15, 16, 17, 33, 127, 128), (129, 255, 257, 515)
shapes = [*itertools.product((1, 15, 17), few), *itertools.product((3,), many), (1, 4095), (1, 4097), (2, 9001)]

def calls(lay, logits, targets, weight, soft, out):
    own = {"reduction": "none", "label_smoothing": 0.1, "weight": weight}
    ids = np.stack([targets, targets], axis=1)
    yield fastxent.cross_entropy(logits, targets, reduction="none", z_loss=0.1, return_lse=True)
    yield fastxent.cross_entropy_with_grad(logits, targets, reduction="none", out=out)
    yield fastxent.cross_entropy_with_grad(logits, targets, softcap=3.0, **own)
    yield fastxent.cross_entropy_with_grad(logits, soft, **own)
    yield fastxent.cross_entropy_with_grad(logits, (ids, np.ones(ids.shape)), reduction="none")
    yield (fastxent.log_softmax(logits), fastxent.softmax(logits), fastxent.logsumexp(logits))
    yield tuple(fastxent.score(logits, targets, top_k=min(3, logits.shape[1]), ids=ids[0]).as_dict().values())
    state = shards.accumulate(logits, targets)
    yield (state.columns, shards.gradient(logits, targets, state))
    yield (fastxent.js_divergence_from_logits(logits, logits),)
    kept = lay(logits)
    yield fastxent.cross_entropy_with_grad(kept, targets, out=kept if kept.dtype.itemsize > 1 else None, **own)
    yield fastxent.binary_cross_entropy_with_logits_with_grad(
        logits, soft, reduction="none", weight=weight, pos_weight=weight, grad_output=soft
    )
    yield (cpu.count(logits, lay(logits[:, 0].astype(np.float64))),)
    nothing = np.zeros(logits.shape, np.float64 if dtype == np.float64 else np.float32)
    across, written = lay(logits.T.copy()).T, lay(nothing.T.copy()).T  # copied to rows and back
    yield fastxent.cross_entropy_with_grad(across, targets, out=written, **own)
    (_, apart), (flat, written) = with_gaps(lay, logits), with_gaps(lay, nothing)
    yield (*fastxent.cross_entropy_with_grad(apart, targets, out=written, **own), flat)

done = 0
for rows, classes in shapes:
    rng = np.random.default_rng([rows, classes])
    plain = [
        rng.standard_normal((rows, classes)).astype(dtype), rng.integers(0, classes, rows), rng.random(classes),
        rng.random((rows, classes)).astype(np.float32),
    ]
    plain[1][rows // 2] = -100 if rows > 2 else 0
    want = list(calls(np.copy, *plain, None))
    for at_end, always_parallel in itertools.product((True, False), repeat=2):  # either twin, either end
        twins.PARALLEL_FROM = 0 if always_parallel else 1 << 62
        np.empty = functools.partial(guarded, at_end=at_end)
        given = [guard(array, at_end) for array in plain]
        out = guarded(plain[0].shape, np.float32, at_end=at_end)
        found = list(calls(lambda array: guard(array, at_end), *given, out))
        np.empty = allocate
        done += len(found)
        for number, (one, other) in enumerate(zip(found, want, strict=True)):
            for left, right in zip(one, other, strict=True):
                if number == 1: right = np.asarray(right, left.dtype)
                assert number == 1 or left.tobytes() == right.tobytes(), (rows, classes, number)
print(done)
"""
BEYOND = """
logits = guard(np.zeros((1, CLASSES), np.float32), True)
SHIFTED
fastxent.cross_entropy(logits, [0])
"""


def run(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )


# the others differ in how a number is decoded and encoded, not in where
SHARE = ("float32", "float16")
EACH = [pytest.param(dtype, marks=[] if dtype in SHARE else pytest.mark.slow) for dtype in DTYPES]


@pytest.mark.parametrize("dtype", EACH)
def test_nothing_beyond_an_array_is_touched(dtype):
    done = run(GUARDED + CALLS, dtype)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 31 * 4 * 14


@pytest.mark.parametrize("classes", [100, 300])
@pytest.mark.parametrize("shift", [1, -1])
def test_what_is_beyond_would_be_seen(classes, shift):
    shifted = f"logits = np.lib.stride_tricks.as_strided(logits[:, 1:] if {shift} > 0 else logits, logits.shape)"
    code = GUARDED + BEYOND.replace("CLASSES", str(classes)).replace("SHIFTED", shifted)
    assert run(code).returncode == (-signal.SIGSEGV if shift > 0 else 0)


CHECKED = """
import numpy as np
from tests import battery
from fastxent.backends import cpu
from fastxent.backends.cpu import twins

twins.PARALLEL_FROM = 1 << 62  # one twin to compile
kinds = "typical, scale 4", "confident, loss 1e-10", "a third -inf", "one NaN", "stairs", "ties"
blocks = [battery.Block(kind, width, "float32") for kind in kinds for width in (17, 128, 129, 257, 4097)]
strips = cpu._strips
cpu._strips = lambda block, classes: np.ascontiguousarray(strips(block, classes)[:, :, :5])
try:
    battery.check(blocks[2], "cpu")
    raise SystemExit("too little scratch was not seen")
except IndexError:
    cpu._strips = strips
for block in blocks: battery.check(block, "cpu")
"""


def test_a_share_of_the_battery_with_indices_checked(tmp_path):
    done = run(CHECKED, NUMBA_BOUNDSCHECK="1", FASTXENT_CACHE_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
