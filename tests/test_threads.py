"""The number of threads: Numba's, checked by name, rule and value."""

import concurrent.futures
import subprocess
import sys
import sysconfig
import threading

import numba
import numpy as np
import pytest

import fastxent


def test_it_is_numbas():
    before = fastxent.get_num_threads()
    try:
        fastxent.set_num_threads(1)
        assert numba.get_num_threads() == fastxent.get_num_threads() == 1
    finally:
        fastxent.set_num_threads(before)


@pytest.mark.parametrize("number", [0, -1, 10**6])
def test_a_number_out_of_range(number):
    with pytest.raises(ValueError, match=rf"threads must lie in \[1, \d+\]; got {number}"):
        fastxent.set_num_threads(number)


def test_not_a_number():
    with pytest.raises(TypeError, match=r"threads must be an integer, not 1\.5"):
        fastxent.set_num_threads(1.5)


def call_in_threads(number=8):
    """Eight threads at once get the bits of one."""
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((number, 64, 1000), dtype=np.float32), rng.integers(0, 1000, (number, 64))
    want = [fastxent.cross_entropy_with_grad(*pair) for pair in zip(logits, targets, strict=True)]
    barrier = threading.Barrier(number)

    def call(i):
        barrier.wait()
        for _ in range(50):
            loss, gradient = fastxent.cross_entropy_with_grad(logits[i], targets[i])
            assert loss == want[i][0]
            np.testing.assert_array_equal(gradient, want[i][1])

    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        for done in [pool.submit(call, i) for i in range(number)]:
            done.result()


def test_eight_threads_at_once():
    call_in_threads()


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a global interpreter lock")
def test_without_a_lock_it_stays_off():
    code = "import sys; from tests.test_threads import call_in_threads as f; f(); assert not sys._is_gil_enabled()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
