"""Threads, forks, signals, limits and foreign libraries: each test a process of its own, as it would be met."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastxent
from tests import battery

ROOT = Path(__file__).parents[1]
LAYERS = ("omp", "tbb", "workqueue")
# found in a virtual environment only when it is loaded first
LOAD_TBB = "import ctypes; ctypes.CDLL({!r}, ctypes.RTLD_GLOBAL)\n"
WORK = """
import os, numpy as np, fastxent
logits, targets = np.ones((600, 1000), np.float32), np.zeros(600, int)
def check(): assert abs(fastxent.cross_entropy(logits, targets) - np.log(1000)) < 1e-5
"""


def ended(command, seconds=300, **options):
    """A command once it has ended. One that hangs is killed with its children, and fails the test."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **pipes, **options) as process:
        try:
            out, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"it hung: not ended after {seconds} s")
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def run(code, **options):
    """Run Python code in a process of its own; what it printed. It must end well and say nothing else."""
    done = ended([sys.executable, "-c", code], **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_what_hangs_is_ended():
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="it hung"):
        run("import os, time; os.fork(); time.sleep(60)", seconds=1)
    assert time.monotonic() - started < 30


def run_on(layer, code):
    """With a threading layer of Numba's; TBB is a package of its own, for x86-64."""
    if layer == "tbb":
        try:
            files = importlib.metadata.files("tbb")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("needs tbb")
        (library,) = (file.locate().resolve() for file in files if file.name == "libtbb.so.12")
        code = LOAD_TBB.format(str(library)) + code
    run(code, env=os.environ | {"NUMBA_THREADING_LAYER": layer})


AT_ONCE = """
import threading
want, got = fastxent.cross_entropy(logits, targets), []
call = lambda: got.extend(fastxent.cross_entropy(logits, targets) for _ in range(20))
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
call()
for thread in threads: thread.join()
assert got == [want] * 180
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_threads_calling_at_once_on_every_layer(layer):
    run_on(layer, WORK + AT_ONCE + f"import numba; assert numba.threading_layer() == {layer!r}\n")


SOMEBODY_ELSE = """
import numba
@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(x.size): s += x[i]
    return s
total(np.ones(1000))
"""
BEFORE = {
    "nothing": "",
    "a small call": "fastxent.cross_entropy(logits[:2], targets[:2])\n",
    "a large call": "check()\n",
    "a small call and somebody else's threads": "fastxent.cross_entropy(logits[:2], targets[:2])\n" + SOMEBODY_ELSE,
    "somebody else's threads": SOMEBODY_ELSE,
}
FORK = """
child = os.fork()
if child == 0:
    if CHILD: check()
    os._exit(0)
if PARENT: check()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
if PARENT: check()
"""


WHO = [(before, who) for before in ("nothing", "a large call") for who in ("CHILD", "PARENT")]


@pytest.mark.parametrize(("before", "who"), [*WHO, *((before, "BOTH") for before in BEFORE)])
@pytest.mark.parametrize("layer", LAYERS)
def test_forks_can_compute(layer, before, who):
    """An assertion that fails in the child is the exit code 1."""
    constants = f"CHILD, PARENT = {who != 'PARENT'}, {who != 'CHILD'}\n"
    run_on(layer, WORK + constants + BEFORE[before] + FORK)


POOL = """
import multiprocessing
import numpy as np, fastxent

def losses(seed):
    logits = np.random.default_rng(seed).standard_normal((600, 1000), np.float32)
    return fastxent.cross_entropy(logits, np.zeros(600, int), reduction="none").tobytes()

if __name__ == "__main__":
    want = [losses(seed) for seed in range(4)]
    with multiprocessing.get_context("METHOD").Pool(2) as pool:
        assert pool.map(losses, range(4)) == want
        pool.close()
        pool.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_pools_of_processes(tmp_path, method):
    (tmp_path / "pool.py").write_text(POOL.replace("METHOD", method))
    done = ended([sys.executable, tmp_path / "pool.py"])
    assert (done.returncode, done.stderr) == (0, "")


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np, fastxent
from tests.test_size import CLASSES, PERIOD, ROWS, Repeated
fastxent.set_num_threads(min(2, fastxent.get_num_threads()))  # with many, a call ends before it is interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
chunk = np.random.default_rng(0).standard_normal((PERIOD, CLASSES), np.float32)
logits = Repeated().fill(chunk, chunk)  # 2^32 of them, as they lie in memory: launches of 2^25
targets, times = np.zeros(ROWS, int), []

def send(when):
    when()
    times.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

def interrupted(call, when):
    # seconds from the signal to the answer
    threading.Thread(target=send, args=(when,), daemon=True).start()
    try:
        call()
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        return time.perf_counter() - times[-1]

def soon(): time.sleep(0.1)
def tries(call): return [interrupted(lambda: call(slice(None)), soon) for _ in range(3) if call(slice(8)) is not None]
"""
CALLS = {
    "gradient": """
want = fastxent.cross_entropy_grad(logits[:PERIOD], targets[:PERIOD], reduction="sum")
assert (fastxent.cross_entropy_grad(logits[:1], [0], reduction="sum") == want[:1]).all()
some, found = slice(4096), []
for _ in range(3):
    out = np.zeros(logits[some].shape, np.float32)
    def begun():
        while not out[5, 7]: time.sleep(1e-3)
    call = lambda: fastxent.cross_entropy_grad(logits[some], targets[some], reduction="sum", out=out)
    found.append(interrupted(call, begun))
    written = np.flatnonzero(out[:, 7])
    assert 0 < len(written) < len(out)
    assert (written == np.arange(len(written))).all()
    for i in written: assert (out[i] == want[i % PERIOD]).all()
    assert not out[len(written):].any()
""",
    "losses": "found = tries(lambda rows: fastxent.cross_entropy(logits[rows], targets[rows]))",
    "scores": "found = tries(lambda rows: fastxent.score(logits[rows], targets[rows], top_k=5))",
    "float64 with a softcap": """
wide = logits.view(np.float64)
found = tries(lambda rows: fastxent.cross_entropy(wide[rows], targets[rows], softcap=30.0))
""",
    "along axis 1": """
across, zeros = logits.reshape(ROWS, -1, 128), np.broadcast_to(0, (ROWS, 128))
found = tries(lambda rows: fastxent.cross_entropy(across[rows], zeros[rows], axis=1))
""",
}
AFTERWARDS = """
assert (fastxent.cross_entropy_grad(logits[:1], [0]) == fastxent.cross_entropy_grad(chunk[:1], [0])).all()
print(min(found))
"""


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_is_answered_soon_and_leaves_whole_rows(call):
    """Work is cut into launches of 2^25 logits; Ctrl-C is answered after the one under way."""
    assert float(run(INTERRUPTED + CALLS[call] + AFTERWARDS, cwd=ROOT)) < 0.5


# kills itself in the middle of writing the COUNTed file, before or after it takes its name
KILLED = """
import os, signal
replace, left = os.replace, COUNT
def replace_and_die(*arguments):
    global left
    left -= 1
    if not left and BEFORE: os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    if not left: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
"""
# the kernel that compiles fastest
BINARY = "import numpy as np, fastxent; print(fastxent.binary_cross_entropy_with_logits(np.float32([20]), [1]))\n"


@pytest.mark.parametrize(("count", "before"), [(1, True), (1, False), (2, True), (2, False)])
def test_killed_while_kernels_are_kept(tmp_path, count, before):
    environment = os.environ | {"FASTXENT_CACHE_DIR": str(tmp_path)}
    killer = KILLED.replace("COUNT", str(count)).replace("BEFORE", str(before))
    done = ended([sys.executable, "-c", killer + BINARY], env=environment)
    assert done.returncode == -signal.SIGKILL
    for _ in range(2):
        assert run(BINARY, env=environment) == "2.0611537e-09\n"
    assert list(tmp_path.rglob("*.nbc"))


HOMES = {"read-only": "home", "cannot be made": "file/home", "unset": None}
# a user without an entry, where a home would be looked for
UNKNOWN = "import pwd; pwd.getpwuid = {}.__getitem__\n"


@pytest.mark.parametrize("home", HOMES)
def test_a_read_only_installation_without_a_home(tmp_path, home):
    """Nothing may be written: root, which may all, gives that up."""
    unable = []
    if os.getuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root needs setpriv to be held to permissions")
        unable = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
    package = tmp_path / "installed" / "fastxent"
    shutil.copytree(Path(fastxent.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG", "NUMBA", "FASTXENT", "HOME"))
    }
    environment["PYTHONPATH"] = str(package.parent)
    if HOMES[home]:
        environment["HOME"] = str(tmp_path / HOMES[home])
    before = sorted(tmp_path.rglob("*"))
    for folder in folders:
        folder.chmod(0o555)
    try:
        code = f"import fastxent; assert fastxent.__file__.startswith({str(package)!r})\n" + BINARY
        command = [*unable, sys.executable, "-c", code if HOMES[home] else UNKNOWN + code]
        done = ended(command, env=environment, cwd=tmp_path / "home")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "2.0611537e-09\n")
    assert sorted(tmp_path.rglob("*")) == before


MANY = """
import numpy as np, fastxent
from fastxent.bench.cases import Case
logits, targets, _ = Case(700, 1000).build()
loss, gradient = fastxent.cross_entropy_with_grad(logits, targets)
print(fastxent.get_num_threads(), loss.tobytes().hex(), hash(gradient.tobytes()))
"""


def test_odd_numbers_of_threads():
    """1, 3 and more than there are cores: the same bits; what is no number is as if it were not set."""

    def call(threads):
        environment = os.environ | {"NUMBA_NUM_THREADS": threads, "PYTHONHASHSEED": "0"}
        return ended([sys.executable, "-c", MANY], env=environment)

    found = {threads: call(threads) for threads in ("1", "3", "67", "many", "1.5", "")}
    assert {done.returncode for done in found.values()} == {0}
    assert [found[threads].stdout.split()[0] for threads in ("1", "3", "67")] == ["1", "3", "67"]
    assert len({tuple(done.stdout.split()[1:]) for done in found.values()}) == 1
    assert "NUMBA_NUM_THREADS" in found["many"].stderr
    for threads in ("0", "-2"):
        done = call(threads)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "ValueError: Number of threads specified must be > 0."


# of the fenv_t of glibc on x86-64, the last four bytes are MXCSR; 0x8040 flushes results and operands
FLUSH = """
import ctypes
libm, state = ctypes.CDLL("libm.so.6"), ctypes.create_string_buffer(32)
libm.fegetenv(state)
state[28:32] = (int.from_bytes(state.raw[28:32], "little") | 0x8040).to_bytes(4, "little")
libm.fesetenv(state)
"""
FLUSHED = """
import sys
import numpy as np
from tests import battery

dtype = sys.argv[1]
blocks = [battery.Block(kind, width, dtype) for kind in battery.KINDS for width in (100, 1000)]
blocks = [block for block in blocks if len(block.build()[0])]
wanted = {block: battery.exact_of.__wrapped__(block) for block in blocks}
battery.exact_of = wanted.__getitem__
BEGIN
assert np.float64(1e-310) * np.float64(1) == 0
for block in blocks: battery.check(block, "cpu", tiny=2.0)
print(sum(len(wanted[block].logits) for block in blocks))
"""


def under_flushing(begin, dtype):
    code = FLUSHED.replace("BEGIN", begin)
    command = [sys.executable, "-W", "ignore::UserWarning", "-c", code, dtype]
    done = ended(command, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 300


SHARE = ("float32", "float64", "float16")
EACH = [pytest.param(dtype, marks=[] if dtype in SHARE else pytest.mark.slow) for dtype in battery.DTYPES]


@pytest.mark.parametrize("dtype", EACH)
def test_where_subnormals_are_flushed(dtype):
    """A thread whose MXCSR flushes keeps the promise, but that entries below twice the smallest normal may be 0."""
    under_flushing(FLUSH, dtype)


def test_a_foreign_library_that_flushes(tmp_path):
    """Built with -ffast-math, GCC's start-up code sets MXCSR where the library is loaded."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    (tmp_path / "fast.c").write_text("int nothing(void) { return 0; }\n")
    library = tmp_path / "fast.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-ffast-math", "-o", library, tmp_path / "fast.c"], check=True)
    under_flushing(f"import ctypes; ctypes.CDLL({str(library)!r})", "float32")


EXHAUSTED = """
import resource
import numpy as np, fastxent
row = np.random.default_rng(0).standard_normal((1, 100_000), np.float32)
logits, targets = np.broadcast_to(row, (20_000, 100_000)), np.zeros(20_000, int)
many, nothing = np.broadcast_to(np.float32(0), (1 << 25, 3)), np.broadcast_to(0, 1 << 25)
few = lambda: [
    *fastxent.cross_entropy_with_grad(logits[:40].copy(), targets[:40]),
    fastxent.softmax(logits[:40]),
    fastxent.score(logits[:40], targets[:40], top_k=5).log_prob,
    fastxent.cross_entropy(logits[:40, ::-1], targets[:40]),
]
calls = [
    lambda: fastxent.cross_entropy_grad(logits, targets),
    lambda: fastxent.softmax(logits),
    lambda: fastxent.score(many, nothing, top_k=2),
    lambda: fastxent.cross_entropy(many, nothing),
    lambda: fastxent.cross_entropy(logits[:, ::-1], targets),
]
want, failed = few(), 0
for spare in (0, 1 << 16, 1 << 20, 1 << 22, 1 << 24):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + spare, -1))
    for call in calls:
        try: call()
        except MemoryError: failed += 1
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    for found, wanted in zip(few(), want): assert np.array_equal(found, wanted)
print(failed)
"""


def test_memory_exhausted_is_an_error_and_the_next_call_works():
    assert int(run(EXHAUSTED)) >= 20


REPEATED = """
import os, gc, resource
import numpy as np, fastxent
from tests.processes import anonymous_megabytes
logits, targets = np.random.default_rng(0).standard_normal((3, 50), np.float32), [1, 2, -100]
out = np.empty_like(logits)

def call(times):
    for _ in range(times):
        fastxent.cross_entropy(logits, targets)
        fastxent.cross_entropy_with_grad(logits, targets, out=out, label_smoothing=0.1)
        fastxent.score(logits, targets, top_k=2)
        fastxent.logsumexp(logits)
        try: fastxent.cross_entropy(logits, [1, 2, 50])
        except IndexError: pass
    gc.collect()
    return anonymous_megabytes("self"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

call(2000)
before, after = call(1000), call(20_000)
assert before[1:] == after[1:], (before, after)
print(after[0] - before[0])
"""


def test_a_hundred_thousand_calls_leak_nothing():
    """Neither memory, where a leak of ten bytes a call were a megabyte, nor files, nor threads."""
    assert float(run(REPEATED, cwd=ROOT)) < 1
