"""Arrays that are on the device, from the public functions on, on a simulated GPU: the values of the host's, on the
caller's stream, in the caller's kind, and nobody waits.
"""

import ctypes
import gc
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import fastxent
from fastxent import checks
from fastxent.backends.cuda import calls, device, dlpack, lent, run, scratch, simulated
from fastxent.backends.cuda.arrays import DeviceArray, View, _Interface
from fastxent.backends.cuda.resident import as_rows
from fastxent.bench.cases import Case

STREAM = 7


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")


class Array:
    """Numbers in the simulated device's memory, ``gap`` of them unused after each row, as another library has them."""

    read_only = False

    def __init__(self, values, gap=0, stream=STREAM):
        values = np.asarray(values)
        self.machine, self.dtype, self.shape = run.runner().machine, values.dtype, values.shape
        wide = np.zeros((*values.shape[:-1], values.shape[-1] + gap) if values.ndim else (), values.dtype)
        self._own = (..., slice(values.shape[-1])) if values.ndim else ()
        wide[self._own] = values
        self.address, self.handle = self.machine.reserve(wide.nbytes), stream
        self.room = self.machine._memory[self.address][: wide.nbytes].view(wide.dtype).reshape(wide.shape)
        self.room[...], self.strides = wide, wide.strides

    def __del__(self):
        self.machine.unreserve(self.address)

    @property
    def __cuda_array_interface__(self):
        where = {"data": (self.address, self.read_only), "shape": self.shape, "strides": self.strides}
        return where | {"typestr": self.dtype.str, "version": 3, "stream": self.handle}

    def numpy(self):
        return self.room[self._own]


def fetched(array):
    """What is at a result's address, as NumPy."""
    about = array.__cuda_array_interface__
    dtype = np.dtype(about["typestr"])
    size = int(np.prod(about["shape"])) * dtype.itemsize
    found = run.runner().machine._bytes(about["data"][0], size).view(dtype).reshape(about["shape"])
    return found.copy()


def placed(options):
    """Options whose arrays are on the device."""
    return {name: Array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


CASES = (
    Case(5, 45, "confident"),
    Case(5, 45, ignored=0.4, weights=True, options=(("label_smoothing", 0.1), ("z_loss", 1e-3))),
    Case(3, 1203, "wide", weights=True, options=(("reduction", "sum"),)),
    Case(3, 300, "wide", ignored=0.4, options=(("reduction", "none"), ("softcap", 5.0), ("temperature", 0.8))),
    Case(70, 6, "typical", "float64", ignored=0.2, options=(("denominator", 33.0),)),
    Case(5, 45, "wide", "float16", options=(("label_smoothing", 1.0),)),
    Case(150, 6, weights=True, ignored=0.3, options=(("z_loss", 1e-2),)),  # more rows than one block sums
    Case(5, 45, "confident", targets="dense"),
    Case(3, 1203, weights=True, targets="dense", options=(("label_smoothing", 0.1), ("z_loss", 1e-3))),
    Case(4, 300, "wide", "float16", targets="dense", options=(("softcap", 5.0), ("reduction", "sum"))),
    Case(70, 6, "typical", "float64", weights=True, targets="dense", options=(("label_smoothing", 1.0),)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_values_of_the_host(case):
    logits, targets, options = case.build()
    real = checks.loss_dtype(logits.dtype)
    for name in ("weight", "sample_weight"):  # the device is given what a kernel takes
        if name in options:
            options[name] = options[name].astype(real)
    if targets.dtype.kind == "f":
        targets = targets.astype(real)
    want, gradient = fastxent.cross_entropy_with_grad(logits, targets, backend="cuda", **options)
    given = Array(logits, gap=3), Array(targets)
    loss, dlogits = fastxent.cross_entropy_with_grad(*given, **placed(options))
    alone = fetched(fastxent.cross_entropy(*given, **placed(options)))
    assert alone.dtype == want.dtype
    assert fetched(loss).tobytes() == alone.tobytes()
    tight = {"rtol": 4 * np.finfo(want.dtype).eps}  # a mean adds its rows in another order, weights in another scale
    np.testing.assert_allclose(alone, want, **tight)
    eps = np.finfo(logits.dtype).eps
    near = {"rtol": 4 * float(eps), "atol": 4 * np.finfo(real).eps * float(np.abs(gradient).max())}  # terms differ
    np.testing.assert_allclose(fetched(dlogits).astype(real), gradient.astype(real), **near)
    assert fetched(dlogits).dtype == gradient.dtype


@pytest.mark.parametrize(
    "case",
    [CASES[0], CASES[1], CASES[2], Case(260, 9, ignored=0.3, weights=True)],
    ids=lambda case: case.name,
)
def test_rows_of_two_warps(case, monkeypatch):
    """In blocks that are smaller than others; what is added to what is the same in all."""
    layout = simulated.SIMULATED._replace(tiny=16, small=32, middle=2048, threads=128, strip=4096, shared=1 << 14)
    monkeypatch.setattr(simulated.Machine, "layout", layout)
    monkeypatch.setattr(calls, "_PLANS", {})  # of another layout
    test_the_values_of_the_host(case)


def test_batches_of_rows_return_lse_and_the_gradient_in_place():
    logits, targets, _ = Case(6, 45, "wide").build()
    shape = {"reduction": "none", "return_lse": True}
    want = fastxent.cross_entropy_with_grad(
        logits.reshape(2, 3, 45),
        targets.reshape(2, 3),
        grad_output=np.arange(6.0).reshape(2, 3),
        backend="cuda",
        **shape,
    )
    given = Array(logits.reshape(2, 3, 45)), Array(targets.reshape(2, 3).astype(np.int32))
    upstream = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    *found, gradient = fastxent.cross_entropy_with_grad(*given, grad_output=upstream, out=given[0], **shape)
    assert gradient is given[0]
    for got, figures in zip(found, want, strict=False):
        np.testing.assert_array_equal(fetched(got), figures)
    np.testing.assert_allclose(given[0].numpy(), want[-1], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_upstream_gradient_that_is_a_number(reduction):
    """A loss scale, say: it scales before a half gradient is rounded, and a call by plan takes another."""
    logits, targets, _ = Case(5, 45, "wide", "float16").build()
    given = Array(logits), Array(targets)
    for number in (2**10, 0.25, np.float64(3.0)):
        how = {"reduction": reduction, "grad_output": number}
        _, want = fastxent.cross_entropy_with_grad(logits, targets, backend="cuda", **how)
        loss, gradient = fastxent.cross_entropy_with_grad(*given, **how)
        np.testing.assert_array_equal(fetched(loss), fetched(fastxent.cross_entropy(*given, reduction=reduction)))
        np.testing.assert_allclose(fetched(gradient).astype(float), want.astype(float), rtol=2.0**-10, atol=2.0**-24)


def test_all_is_asked_of_the_callers_stream_and_nobody_waits():
    logits, targets, _ = Case(3, 1203).build()
    given = Array(logits), Array(targets)
    machine = run.runner().machine
    first = fastxent.cross_entropy_with_grad(*given)
    machine.events.clear()
    second = fastxent.cross_entropy_with_grad(*given)
    events = list(machine.events)
    assert {stream for stream, _ in events} == {STREAM}
    names = [name for _, name in events]
    assert not {"wait", "to device", "to host"} & set(names)
    assert names.count("take") == 2  # the results: what is left between kernels is there
    assert fetched(first[1]).tobytes() == fetched(second[1]).tobytes()
    assert second[0].stream == STREAM
    elsewhere = Array(targets, stream=9)
    fastxent.cross_entropy(given[0], elsewhere)
    events = list(machine.events)
    assert (STREAM, "after 9") in events
    # targets that are given back on their own stream are given back after the call
    assert events[-1] == (9, f"after {STREAM}")


def kernels_of(call):
    """The kernels of a call that has been made before."""
    call()
    machine = run.runner().machine
    machine.events.clear()
    call()
    return [name for _, name in machine.events if name != "take"]


def test_one_kernel_makes_a_loss_and_two_its_mean_with_the_gradient():
    logits, targets, _ = Case(3, 300).build()
    given = Array(logits), Array(targets)
    for reduction in ("mean", "sum", "none"):
        assert kernels_of(lambda named=reduction: fastxent.cross_entropy(*given, reduction=named)) == ["statistics"]
    gradient = fastxent.cross_entropy_with_grad
    assert kernels_of(lambda: gradient(*given)) == ["total_weight", "gradient"]
    assert kernels_of(lambda: gradient(*given, reduction="sum")) == ["gradient"]
    assert kernels_of(lambda: gradient(*given, denominator=3.0)) == ["gradient"]


def test_rows_of_several_strips_are_read_once_for_a_gradient_in_their_place():
    logits, targets, _ = Case(3, 1203, "confident").build()
    want, gradient = fastxent.cross_entropy_with_grad(Array(logits), Array(targets))
    given = Array(logits), Array(targets)
    loss, _ = fastxent.cross_entropy_with_grad(*given, out=given[0])
    assert fetched(loss) == fetched(want)
    assert given[0].numpy().tobytes() == fetched(gradient).tobytes()
    assert kernels_of(lambda: fastxent.cross_entropy_with_grad(*given, out=given[0])) == [
        "total_weight",
        "shared_gradient",
    ]


def test_what_blocks_count_by_is_0_again():
    logits, targets, _ = Case(150, 6).build()
    fastxent.cross_entropy_with_grad(Array(logits), Array(targets))
    slot = scratch.scratch_of(run.runner().machine, STREAM)
    _, address = slot._pieces["counters"]
    assert not slot.machine._memory[address].any()


# one strip and several
@pytest.mark.parametrize(
    ("name", "classes"),
    [(name, 45) for name in ("float32", "float64", "float16")]
    + [("float32", 1203), ("float64", 300), ("float16", 1203)],
)
class TestSoftmax:
    FUNCTIONS = fastxent.logsumexp, fastxent.log_softmax, fastxent.softmax

    def test_the_bits_of_the_host(self, name, classes):
        logits = Case(6, classes, "wide", name).build()[0].reshape(2, 3, classes)
        for function in self.FUNCTIONS:
            want = function(logits, scale=0.7, backend="cuda")
            got = fetched(function(Array(logits, gap=3), scale=0.7))
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert got.tobytes() == want.tobytes()

    def test_in_place(self, name, classes):
        logits = Case(3, classes, "confident", name).build()[0]
        for function in self.FUNCTIONS[1:]:
            want, given = function(logits, backend="cuda"), Array(logits)
            assert function(given, out=given) is given
            assert given.numpy().tobytes() == want.tobytes()


@pytest.mark.parametrize("far", [-200.0, -1e4, -1e9])
def test_a_row_whose_others_underflow_beside_lower_ones_still(far):
    """The largest in one strip, all others of it gone, and padding in the next."""
    logits = np.full((1, 1000), np.finfo(np.float32).min, np.float32)
    logits[0, :500], logits[0, 7] = far, 0.0
    want = np.zeros((1, 1000), np.float32)
    want[0, 7] = 1.0
    np.testing.assert_array_equal(fetched(fastxent.softmax(Array(logits))), want)
    np.testing.assert_array_equal(fastxent.softmax(logits, backend="cuda"), want)


def test_options_of_numpy():
    logits, targets, _ = Case(3, 45).build()
    given = Array(logits), Array(targets)
    named = {"label_smoothing": 0.125, "z_loss": 0.25, "softcap": 4.0, "temperature": 0.5}
    want = fetched(fastxent.cross_entropy(*given, **named))
    got = fastxent.cross_entropy(*given, **{name: np.float32(value) for name, value in named.items()})
    assert fetched(got) == want


def test_no_rows_have_no_mean():
    given = Array(np.zeros((0, 4), np.float32)), Array(np.zeros(0, np.int64))
    assert np.isnan(fetched(fastxent.cross_entropy(*given)))
    assert np.isnan(fetched(fastxent.cross_entropy_with_grad(*given)[0]))


def test_logsumexps_of_rows_with_infinities_and_without_numbers():
    for classes, times in ((5, 7), (700, 1)):  # a warp has 32 rows
        logits = np.zeros((6, classes), np.float32)
        logits[1], logits[2, 3], logits[3, 1] = -np.inf, np.inf, np.nan
        logits[4, [0, 2]], logits[5, :2] = (np.inf, np.nan), (-np.inf, np.inf)
        log_classes = np.float32(np.log(classes))
        want = [log_classes, -np.inf, np.inf, np.nan, np.nan, np.inf] * times
        np.testing.assert_allclose(fetched(fastxent.logsumexp(Array(np.tile(logits, (times, 1))))), want, rtol=1e-7)
        assert np.isnan(fetched(fastxent.logsumexp(Array(np.float32([[1, 0]])), scale=1e-45)))
    kept = fastxent.logsumexp(Array(logits), keepdims=True)
    assert kept.shape == (6, 1)


def test_a_plan_serves_other_arrays_until_memory_moves(monkeypatch):
    monkeypatch.setattr(calls, "_PLANS", {})
    carried = []
    carry_out = device._carry_out
    monkeypatch.setattr(device, "_carry_out", lambda *given: carried.append(1) or carry_out(*given))
    options = {"label_smoothing": 0.1, "return_lse": True}
    for seed, rows, planned in ((0, 4, 1), (1, 4, 1), (2, 4, 1), (3, 9, 2), (4, 4, 3), (5, 4, 3)):
        rng = np.random.default_rng(seed)
        logits, targets = rng.standard_normal((rows, 45), np.float32), rng.integers(0, 45, rows)
        want = fastxent.cross_entropy_with_grad(logits, targets, backend="cuda", **options)
        got = fastxent.cross_entropy_with_grad(Array(logits), Array(targets), **options)
        assert len(carried) == planned  # another number of rows moves what lies between kernels
        for found, figures in zip(got, want, strict=True):
            np.testing.assert_allclose(fetched(found), figures, rtol=1e-6)
    fastxent.cross_entropy(Array(logits), Array(targets), temperature=2.0, **options)
    assert len(carried) == 4


@pytest.mark.parametrize("bad", [-7, 45])
def test_a_target_out_of_range_is_an_index_error_later_or_at_once(bad, monkeypatch):
    monkeypatch.setattr(scratch, "_STREAMS", {})
    logits, targets, _ = Case(5, 45).build()
    targets[[1, 3]] = bad
    given = Array(logits), Array(targets)
    losses = fetched(fastxent.cross_entropy(*given, reduction="none"))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, True, False])
    with pytest.raises(IndexError, match="targets of an earlier call on this stream are out of range: 2 of them"):
        fastxent.cross_entropy(*given)
    right = Array(np.maximum(np.minimum(targets, 44), 0))
    assert np.isfinite(fetched(fastxent.cross_entropy(given[0], right)))
    message = rf"targets must lie in \[0, 44\] or be -100; 2 of 5 do not, the first in row 1 with value {bad}$"
    with pytest.raises(IndexError, match=message):
        fastxent.cross_entropy_with_grad(*given, check=True)
    assert np.isfinite(fetched(fastxent.cross_entropy(given[0], right, check=True)))


def test_the_news_of_a_bad_target_is_told_once(monkeypatch):
    """With that of kernels which are still at it when it is read."""
    logits, targets, _ = Case(3, 45).build()
    given, machine = (Array(logits), Array(targets)), run.runner().machine
    fastxent.cross_entropy(given[0], Array(targets + 45))
    noted, wait = scratch.scratch_of(machine, STREAM)._noted, machine.wait

    def end(stream):
        wait(stream)
        noted[0] += 2

    with monkeypatch.context() as late:
        late.setattr(machine, "wait", end)
        with pytest.raises(IndexError, match="targets of an earlier call on this stream are out of range: 5 of them"):
            fastxent.cross_entropy(*given)
    for _ in range(3):
        fastxent.cross_entropy(*given)


def test_a_call_that_is_refused_leaves_the_news_of_an_earlier_one():
    logits, targets, _ = Case(3, 45).build()
    given, slot = (Array(logits), Array(targets)), scratch.scratch_of(run.runner().machine, STREAM)
    fastxent.cross_entropy(given[0], Array(targets + 45))
    late = slot._noted.copy()
    slot._noted[:] = 0  # the kernel has not come so far
    with pytest.raises(ValueError, match="label_smoothing"):
        fastxent.cross_entropy(*given, label_smoothing=2.0)
    slot._noted[:] = late
    with pytest.raises(IndexError, match="targets of an earlier call on this stream are out of range: 3 of them"):
        fastxent.cross_entropy(*given)


def test_news_waits_while_a_graph_is_captured(monkeypatch):
    logits, targets, _ = Case(3, 45).build()
    given, machine = (Array(logits), Array(targets)), run.runner().machine
    out = {"reduction": "none", "out": Array(logits)}
    fastxent.cross_entropy_with_grad(*given, **out)
    fastxent.cross_entropy(given[0], Array(targets + 45))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "is_capturing", lambda stream: True)
        with pytest.raises(RuntimeError, match="a CUDA graph cannot take memory"):  # that of the loss
            fastxent.cross_entropy_with_grad(*given, **out)
    with pytest.raises(IndexError, match="targets of an earlier call"):
        fastxent.cross_entropy_with_grad(*given, **out)


class TestDLPack:
    """What a GPU's arrays are read by, by numpy, for which they are the host's."""

    @pytest.fixture(autouse=True)
    def _of_the_host(self, monkeypatch):
        monkeypatch.setattr(DeviceArray, "__dlpack_device__", lambda array: (1, 0))

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
    def test_numbers_and_how_long_they_live(self, dtype):
        logits, targets, _ = Case(3, 45, dtype=dtype).build()
        loss, gradient = fastxent.cross_entropy_with_grad(Array(logits), Array(targets))
        want, address = fetched(gradient), gradient.address
        machine, taken = run.runner().machine, [np.from_dlpack(array) for array in (loss, gradient)]
        del loss, gradient
        gc.collect()
        assert address in machine._memory
        assert (taken[0].shape, taken[1].dtype) == ((), want.dtype)
        assert taken[1].tobytes() == want.tobytes()
        del taken
        gc.collect()
        assert address not in machine._memory
        assert not dlpack._HELD

    def test_what_others_say_of_pythons_functions_is_theirs(self, monkeypatch):
        """They are one object in all of a process."""
        for name in ("PyCapsule_New", "PyCapsule_IsValid", "PyCapsule_GetPointer"):
            monkeypatch.setattr(getattr(ctypes.pythonapi, name), "argtypes", (ctypes.py_object,) * 3)
        self.test_numbers_and_how_long_they_live("float32")

    def test_a_capsule_that_nobody_takes(self):
        array = fastxent.logsumexp(Array(np.zeros((2, 3), np.float32)))
        capsule = array.__dlpack__()
        assert len(dlpack._HELD) == 1
        del capsule
        assert not dlpack._HELD

    def test_the_stream_of_whoever_takes_it_waits(self):
        array, machine = fastxent.logsumexp(Array(np.zeros((2, 3), np.float32))), run.runner().machine
        for stream, asked in ((None, [(0, f"after {STREAM}")]), (9, [(9, f"after {STREAM}")]), (STREAM, []), (-1, [])):
            machine.events.clear()
            array.__dlpack__(stream=stream)
            assert list(machine.events) == asked

    def test_memory_is_given_back_after_who_has_taken_it(self):
        """On the default stream; the handle of another may be none by then, but where only a framework has it."""
        machine = run.runner().machine
        array = fastxent.logsumexp(Array(np.zeros((2, 3), np.float32)))
        for stream in (None, STREAM, -1, 9, 1):
            array.__dlpack__(stream=stream)
        array.is_handed_on = True
        for stream in (6, 8):
            array.__dlpack__(stream=stream)
        address = array.address
        machine.captured.add(8)  # what waits for a captured stream would be captured too
        machine.events.clear()
        del array
        machine.captured.clear()
        assert sorted(machine.events) == [(STREAM, "after 0"), (STREAM, "after 6")]
        assert address not in machine._memory

    def test_memory_is_given_back_whatever_the_driver_says_of_a_stream(self, monkeypatch):
        """Of the default one nothing is said while another is captured."""
        machine = run.runner().machine
        array = fastxent.logsumexp(Array(np.zeros((2, 3), np.float32)))
        array.__dlpack__()

        def implicit(stream):
            raise RuntimeError("the NVIDIA driver says CUDA_ERROR_STREAM_CAPTURE_IMPLICIT")

        monkeypatch.setattr(machine, "is_capturing", implicit)
        address = array.address
        del array
        assert address not in machine._memory

    def test_a_stream_is_there_as_long_as_what_is_written_on_it(self):
        """Of numba's arrays, whose stream is an object; what else goes by that name may hold the array."""
        given = Array(np.zeros((2, 3), np.float32))
        given.stream = SimpleNamespace(handle=STREAM)
        array = fastxent.logsumexp(given)
        assert array.held is given.stream
        assert _Interface(given.machine).empty(array, (1,), np.float32).held is given.stream
        given.stream = given.numpy
        assert fastxent.logsumexp(given).held is None

    def test_what_is_refused(self):
        array = fastxent.logsumexp(Array(np.zeros((2, 3), np.float32)))
        for asked in ({"copy": True}, {"dl_device": (2, 1)}):
            with pytest.raises(BufferError, match="as they are"):
                array.__dlpack__(**asked)
        array.dtype = np.dtype(ml_dtypes.float8_e5m2)
        with pytest.raises(BufferError, match="float8_e5m2"):
            array.__dlpack__()


class Lent:
    """Numbers in the simulated device's memory of which only DLPack tells, as of jax's in bfloat16."""

    def __init__(self, values):
        self.array, self.waiting = Array(values, stream=0), []

    def __dlpack_device__(self):
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream=None):
        self.waiting.append(stream)
        return dlpack.capsule_of(self.array, dlpack.CUDA)

    def __array_namespace__(self):
        return Namespace


class Namespace:
    """Of the library that lends them."""

    @staticmethod
    def from_dlpack(array):
        found = dlpack.Borrowed(array)
        values = run.runner().machine._bytes(found.address, math.prod(found.shape) * found.dtype.itemsize)
        return Lent(values.view(found.dtype).reshape(found.shape))


class TestBorrowed:
    """What the capsules of NumPy say; those of jax in tests/test_jax.py."""

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint8"])
    @pytest.mark.parametrize("cut", [(), (slice(None), slice(1, 3)), (slice(None, None, 2),), (1, 0, slice(0))])
    def test_where_an_array_lies(self, dtype, cut):
        array = np.arange(24, dtype=dtype).reshape(2, 3, 4)[cut]

        class OfADevice:
            def __dlpack__(self, *, stream):
                return array.__dlpack__()

        found = dlpack.Borrowed(OfADevice())
        assert (found.address, found.shape, found.dtype) == (array.ctypes.data, array.shape, array.dtype)
        assert found.steps == array.strides


class TestLent:
    @pytest.fixture(autouse=True)
    def _codes(self, monkeypatch):
        """What our own arrays of whole numbers would be called."""
        monkeypatch.setitem(dlpack._CODES, np.dtype(np.int64), 0)
        monkeypatch.setitem(dlpack._CODES, np.dtype(np.int32), 0)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_a_loss_in_the_callers_kind(self, dtype):
        logits, targets, _ = Case(3, 45, dtype=dtype).build()
        wanted = fastxent.cross_entropy_with_grad(logits, targets, backend="cuda", return_lse=True)
        given = Lent(logits), Lent(targets)
        found = fastxent.cross_entropy_with_grad(*given, return_lse=True)
        assert [type(one) for one in found] == [Lent] * 3
        for one, want in zip(found, wanted, strict=True):
            assert one.array.numpy().tobytes() == np.asarray(want).tobytes()
        alone = fastxent.cross_entropy(*given)
        assert alone.array.numpy() == wanted[0]
        assert given[0].waiting == [1, 1]  # the default stream, which is to wait for their numbers

    def test_options_and_what_is_not_lent(self):
        logits, targets, _ = Case(3, 45).build()
        weight, upstream = np.linspace(0.5, 2, 45, dtype=np.float32), np.float32([1, 2, 3])
        wanted = fastxent.cross_entropy_with_grad(
            logits, targets, weight=weight, reduction="none", grad_output=upstream, backend="cuda"
        )
        out = Array(np.zeros_like(logits))
        loss, gradient = fastxent.cross_entropy_with_grad(
            Lent(logits), Array(targets), weight=Lent(weight), reduction="none", grad_output=Lent(upstream), out=out
        )
        assert loss.array.numpy().tobytes() == wanted[0].tobytes()
        assert gradient is out
        assert out.numpy().tobytes() == wanted[1].tobytes()

    def test_softmaxes_and_scores(self):
        logits, targets, _ = Case(3, 45).build()
        for function in (fastxent.softmax, fastxent.log_softmax, fastxent.logsumexp):
            assert function(Lent(logits)).array.numpy().tobytes() == function(logits, backend="cuda").tobytes()
        found, wanted = fastxent.score(Lent(logits), targets), fastxent.score(logits, targets, backend="cuda")
        assert found.log_prob.tobytes() == wanted.log_prob.tobytes()

    def test_they_are_held_until_the_device_is_done(self):
        logits, targets, _ = Case(3, 45).build()
        machine = run.runner().machine
        machine.busy = True
        try:
            given = Lent(logits), Lent(targets)
            address = given[0].array.address
            fastxent.cross_entropy(*given)
            del given
            gc.collect()
            assert address in machine._memory
        finally:
            machine.busy = False
        fastxent.logsumexp(Lent(logits))
        gc.collect()
        assert address not in machine._memory

    def test_calls_before_the_last_few_are_waited_for(self):
        logits, targets, _ = Case(3, 45).build()
        machine = run.runner().machine
        fastxent.logsumexp(Lent(logits))
        given = Lent(logits), Lent(targets)
        for _ in range(lent._MOST):
            machine.busy = True
            fastxent.cross_entropy(*given)
            assert machine.busy
        fastxent.cross_entropy(*given)
        assert not machine.busy

    def test_what_is_given_to_write_to_is_what_comes_back(self):
        logits, targets, _ = Case(3, 45).build()
        out = fastxent.softmax(Array(logits))
        _, gradient = fastxent.cross_entropy_with_grad(Lent(logits), Lent(targets), out=out)
        assert gradient is out
        assert fastxent.log_softmax(Lent(logits), out=out) is out

    def test_what_is_refused(self, monkeypatch):
        logits, targets, _ = Case(3, 45).build()
        for given in ((Lent(logits), targets), (Lent(logits), Lent(logits))):
            with pytest.raises(NotImplementedError, match="hidden states on a device must be torch's or cupy's"):
                fastxent.linear_cross_entropy(given[0], given[0], given[1])
        with pytest.raises(TypeError, match="targets must be on the device too"):
            fastxent.cross_entropy(Lent(logits), targets)
        given = Lent(logits)
        with pytest.raises(TypeError, match="out must be on the device too"):
            fastxent.cross_entropy_with_grad(given, Lent(targets), out=given)
        with pytest.raises(IndexError, match="1 of 3 do not, the first in row 1 with value 45"):
            fastxent.cross_entropy(Lent(logits), Lent(np.array([0, 45, 1])), check=True)
        monkeypatch.setitem(dlpack._CODES, np.dtype(np.float32), 5)
        with pytest.raises(TypeError, match="type 5 with 32 bits"):
            fastxent.cross_entropy(Lent(logits), Lent(targets))


def test_any_thread_may_call():
    """On a new one no GPU is current."""
    logits, targets, _ = Case(3, 45).build()
    given, want = (Array(logits), Array(targets)), fastxent.cross_entropy(logits, targets, backend="cuda")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: fetched(fastxent.cross_entropy(*given))).result() == want
    with ThreadPoolExecutor(2) as pool:  # of the host's arrays, which share two streams
        calls_at_once = pool.map(lambda _: fastxent.cross_entropy(logits, targets, backend="cuda"), range(4))
        assert list(calls_at_once) == [want] * 4


def test_no_graph_is_captured_with_arrays_whose_results_are_ours():
    logits, targets, _ = Case(3, 45).build()
    given, machine = (Array(logits), Array(targets)), run.runner().machine
    fastxent.cross_entropy(*given)
    machine.captured |= {STREAM, 11}
    try:
        for stream in (STREAM, 11):
            with pytest.raises(RuntimeError, match="a CUDA graph cannot take memory"):
                fastxent.cross_entropy(Array(logits, stream=stream), given[1])
    finally:
        machine.captured.clear()


def test_a_row_without_weight_is_not_read():
    logits, targets, _ = Case(3, 45).build()
    logits[1] = np.nan
    weight = Array(np.float32([1, 0, 2]))
    loss, gradient = fastxent.cross_entropy_with_grad(Array(logits), Array(targets), sample_weight=weight)
    want = fastxent.cross_entropy(logits[[0, 2]], targets[[0, 2]], sample_weight=[1.0, 2.0])
    np.testing.assert_allclose(fetched(loss), want, rtol=1e-6)
    assert not fetched(gradient)[1].any()


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_scores_of_logits_that_stay(name):
    logits, targets, _ = Case(6, 45, "wide", name).build()
    targets[2], told = -100, []
    options = {"top_k": 3, "ids": [0, 7], "temperature": 0.7}
    want = fastxent.score(logits.reshape(2, 3, 45), targets.reshape(2, 3), backend="cuda", **options)
    machine = run.runner().machine
    given = Array(logits.reshape(2, 3, 45), gap=3)
    machine.events.clear()
    got = fastxent.score(given, targets.reshape(2, 3), progress=lambda *done: told.append(done), **options)
    assert machine.events[0] == (STREAM, "wait")  # for whoever writes the logits
    assert told == [(6, 6)]
    for field, figures in want.as_dict().items():
        np.testing.assert_array_equal(got.as_dict()[field], figures, err_msg=field)
    with pytest.raises(ValueError, match="axis must be the last"):
        fastxent.score(given, targets.reshape(2, 3), axis=0)
    with pytest.raises(TypeError, match="arrays on a device are the cuda backend's"):
        fastxent.score(given, targets.reshape(2, 3), backend="reference")


def test_no_rows():
    loss = fastxent.cross_entropy(Array(np.zeros((0, 4), np.float32)), Array(np.zeros(0, np.int64)), reduction="sum")
    assert fetched(loss) == 0.0


def test_what_is_only_for_the_host_says_so():
    logits, targets, _ = Case(3, 45).build()
    with pytest.raises(TypeError, match="must be in memory of the host, not on a GPU"):
        fastxent.entropy_from_logits(Array(logits))
    with pytest.raises(TypeError, match="targets must be in memory of the host, as scores are"):
        fastxent.score(Array(logits), Array(targets))


class TestErrors:
    def refused(self, error, message, targets=None, logits=None, **options):
        logits = Array(np.zeros((2, 4), np.float32)) if logits is None else logits
        targets = Array(np.zeros(2, np.int64)) if targets is None else targets
        with pytest.raises(error, match=message):
            fastxent.cross_entropy_with_grad(logits, targets, **options)

    def test_arrays_of_the_host_beside_those_of_the_device(self):
        self.refused(TypeError, "targets must be on the device too, like logits; got ndarray", np.zeros(2, int))
        self.refused(TypeError, "weight must be on the device too", weight=np.ones(4))
        self.refused(TypeError, "grad_output must be on the device too", grad_output=np.ones(2), reduction="none")
        self.refused(TypeError, "grad_output must hold real numbers, not bool", grad_output=True)

    def test_what_no_kernel_takes(self):
        self.refused(NotImplementedError, "int64 or int32 class indices, not uint8", Array(np.zeros(2, np.uint8)))
        self.refused(NotImplementedError, "targets on a device must be class indices", (1, 2))
        dense = Array(np.full((2, 4), 0.25, np.float16))
        self.refused(NotImplementedError, "probabilities on a device must be float32, not float16", dense)
        dense = Array(np.full((2, 4), 0.25, np.float32))
        self.refused(ValueError, "ignore_index must be negative or None", dense, ignore_index=1)
        self.refused(ValueError, "targets must have the logits' shape", Array(np.zeros((2, 3), np.float32)))
        self.refused(TypeError, "targets must be integer class indices", Array(np.zeros(2, np.float32)))
        self.refused(ValueError, "weight on the device must be float32", weight=Array(np.ones(4)))
        self.refused(ValueError, "axis must be the last", axis=0)
        self.refused(ValueError, "out on a device must be", out=Array(np.zeros((2, 5), np.float32)))
        self.refused(ValueError, "side by side", logits=_transposed())
        self.refused(TypeError, "arrays on a device are the cuda backend's", backend="cpu")
        self.refused(ValueError, "label_smoothing must lie in", label_smoothing=2.0)

    def test_rows_that_begin_between_numbers(self):
        view = View(4100, (2, 3), (24, 8), np.dtype(np.float64))
        with pytest.raises(ValueError, match="begin at a multiple of 8 bytes; got address 4100"):
            as_rows(view)
        assert as_rows(view._replace(address=4104)).address == 4104

    def test_of_softmax(self):
        logits = Array(np.zeros((2, 4), np.float32))
        for error, message, options in (
            (NotImplementedError, "where must be None for logits on a device", {"where": np.ones((2, 4), bool)}),
            (NotImplementedError, "axis must be one for logits on a device; got None", {"axis": None}),
            (ValueError, "axis must be the last", {"axis": 0}),
            (ValueError, "out on a device must be", {"out": Array(np.zeros((2, 5), np.float32))}),
            (TypeError, "arrays on a device are the cuda backend's", {"backend": "cpu"}),
            (ValueError, "scale must be positive", {"scale": 0.0}),
        ):
            with pytest.raises(error, match=message):
                fastxent.log_softmax(logits, **options)

    def test_out_over_what_is_read(self):
        """Also where a call like it, with its arrays apart, has been made before."""
        options = {"targets": np.zeros(2, np.int64), "weight": np.ones(4, np.float32)}
        logits, apart = Array(np.zeros((2, 4), np.float32)), Array(np.zeros((2, 4), np.float32))
        for name, values in options.items():
            given = {"targets": Array(options["targets"]), name: Array(np.resize(values, 16))}
            given[name].shape, given[name].strides = values.shape, values.strides
            targets, others = given.pop("targets"), given
            fastxent.cross_entropy_with_grad(logits, targets, out=apart, **others)
            array = targets if name == "targets" else others[name]
            over = Array(np.zeros((2, 4), np.float32))
            other, over.address = over.address, array.address
            try:
                with pytest.raises(ValueError, match=f"out must not overlap {name}"):
                    fastxent.cross_entropy_with_grad(logits, targets, out=over, **others)
            finally:
                over.address = other

    def test_out_that_is_read_only(self):
        logits, out = (Array(np.zeros((2, 4), np.float32)) for _ in range(2))
        given = logits, Array(np.zeros(2, np.int64))
        fastxent.cross_entropy_with_grad(*given, out=out)
        out.read_only = True
        with pytest.raises(ValueError, match="out must not be read-only"):
            fastxent.cross_entropy_with_grad(*given, out=out)

    def test_out_that_overlaps(self):
        logits = Array(np.zeros((3, 4), np.float32))
        part = Array(np.zeros((2, 4), np.float32))
        other, part.address, logits.shape = part.address, logits.address + 16, (2, 4)
        try:
            self.refused(ValueError, "out must be the logits themselves or not overlap them", logits=logits, out=part)
        finally:
            part.address = other


def _transposed():
    array = Array(np.zeros((4, 2), np.float32))
    array.shape, array.strides = (2, 4), (4, 8)
    return array
