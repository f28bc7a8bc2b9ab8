"""torch's tensors as arrays of a device, on a simulated GPU: tensors of the CPU, taken for its own, so that all but
torch's CUDA is what a GPU would be asked for.
"""

import ctypes

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peers extra brings torch")

import fastxent  # noqa: E402
from fastxent import checks  # noqa: E402
from fastxent.backends.cuda import arrays, run  # noqa: E402
from fastxent.bench import gpu_checks, gpu_tensors  # noqa: E402

STREAM = 3


@pytest.fixture(autouse=True)
def _tensors_are_on_the_device(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    memory, registered_here = run.runner().machine._memory, set()

    def register(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes():  # torch allocates whole words of 64 bytes
            registered_here.add(storage.data_ptr())
            size = -(-storage.nbytes() // 16) * 16
            memory[storage.data_ptr()] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(storage.data_ptr()))

    def registering(look):
        def registered(library, tensor):
            register(tensor)
            return look(library, tensor)

        return registered

    for name in ("view", "glance", "address"):
        monkeypatch.setattr(arrays._Torch, name, registering(getattr(arrays._Torch, name)))
    monkeypatch.setattr(arrays._Torch, "device", lambda library, tensor: 0)
    monkeypatch.setattr(arrays._Torch, "stream", lambda library, tensor: STREAM)
    monkeypatch.setattr(checks, "is_on_device", lambda array: isinstance(array, torch.Tensor))
    yield
    for address in registered_here:
        del memory[address]


def tensors(*arrays_of_numpy):
    return tuple(torch.from_numpy(array.copy()) for array in arrays_of_numpy)


@pytest.mark.parametrize(
    ("verb", "dtype"),
    [("tensors of torch", "float32"), ("tensors of torch", "bfloat16"), ("hidden states of torch", "float32")],
)
def test_what_a_gpu_is_checked_with(monkeypatch, verb, dtype):
    """And that a loss which is off is seen."""
    monkeypatch.setattr(gpu_tensors, "torch_of_the_device", lambda: torch)
    monkeypatch.setattr(gpu_tensors, "_DEVICE", "cpu")
    asked = np.dtype(getattr(ml_dtypes, dtype, dtype)), 45, verb
    check = gpu_checks.of_verb(*asked, np.random.default_rng(0))
    assert check.right, check.errors
    from_torch = gpu_tensors._from_torch
    monkeypatch.setattr(gpu_tensors, "_from_torch", lambda *given: from_torch(*given) * (1 + 5e-6))
    assert not gpu_checks.of_verb(*asked, np.random.default_rng(0)).right


@pytest.mark.parametrize("memory", [None, 3 * 45 * 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hidden_states_and_an_output_matrix(dtype, memory):
    rng = np.random.default_rng(0)
    hidden, weight = rng.integers(-2, 3, (2, 4, 5)).astype(dtype), rng.integers(-2, 3, (45, 5)).astype(dtype)
    bias, targets = rng.integers(-2, 3, 45).astype(dtype), rng.integers(0, 45, (2, 4))
    want = fastxent.linear_cross_entropy_with_grad(hidden, weight, targets, linear_bias=bias, label_smoothing=0.1)
    there = tensors(hidden, weight, targets, bias)
    got = fastxent.linear_cross_entropy_with_grad(*there[:3], linear_bias=there[3], label_smoothing=0.1, memory=memory)
    for found, figures in zip(got, want, strict=True):
        assert found.shape == figures.shape
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(found.numpy(), figures, rtol=8 * eps, atol=8 * eps)
    alone = fastxent.linear_cross_entropy(*there[:3], linear_bias=there[3], label_smoothing=0.1, memory=memory)
    assert torch.equal(alone, got[0])


def test_logits():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((5, 45), np.float32), rng.integers(0, 45, 5)
    loss, dlogits = fastxent.cross_entropy_with_grad(*tensors(logits, targets))
    want, gradient = fastxent.cross_entropy_with_grad(logits, targets)
    np.testing.assert_allclose(loss.numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(dlogits.numpy(), gradient, rtol=1e-6)


def test_half_logits_are_products_in_float32():
    """What torch is asked for; its CPU has no such product."""
    asked = []
    library = arrays._Torch(torch)
    words = {"float32": torch.float32, "autocast": torch.autocast, "__version__": "2.7.1"}
    library._torch = type("Torch", (), words | {"mm": lambda a, b, **how: asked.append(how)})
    factors = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bfloat16)
    library.product(*factors, np.dtype("f4"))
    assert asked == [{"out_dtype": torch.float32}]
    library._sums_wider = False
    with pytest.raises(NotImplementedError, match=r"need torch 2\.8 or newer; got 2\.7\.1"):
        library.product(*factors, np.dtype("f4"))


def test_autocast_rounds_no_product():
    """Else kernels would take half as many bytes as there are for float32."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((6, 5), np.float32), rng.standard_normal((45, 5), np.float32)
    given = tensors(hidden, weight, rng.integers(0, 45, 6))
    want = fastxent.linear_cross_entropy_with_grad(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastxent.linear_cross_entropy_with_grad(*given)
    for got, figures in zip(found[:3], want[:3], strict=True):
        assert torch.equal(got, figures)


def test_a_graph_takes_in_a_call_that_has_been_made_before():
    logits, targets = tensors(np.zeros((4, 45), np.float32), np.zeros(4, np.int64))
    machine = run.runner().machine
    fastxent.cross_entropy_with_grad(logits, targets)
    machine.captured.add(STREAM)
    try:
        fastxent.cross_entropy_with_grad(logits, targets)
        with pytest.raises(RuntimeError, match="a CUDA graph cannot take memory: before it is captured, make one call"):
            fastxent.cross_entropy(*tensors(np.zeros((4000, 6), np.float32), np.zeros(4000, np.int64)))
    finally:
        machine.captured.clear()


def test_scores():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((5, 45), np.float32), rng.integers(0, 45, 5)
    found = fastxent.score(torch.from_numpy(logits.copy()), targets, top_k=3)
    want = fastxent.score(logits, targets, top_k=3, backend="cuda")
    for name, figures in want.as_dict().items():
        np.testing.assert_array_equal(found.as_dict()[name], figures, err_msg=name)


def there(array):
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_classes_along_any_axis(last, dense):
    """(N, C, d1), and the same with its classes last in memory, which are not copied."""
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((3, 45, 4), np.float32), rng.integers(0, 45, (3, 4))
    if dense:
        targets = fastxent.softmax(rng.standard_normal((3, 45, 4), np.float32), axis=1)
    options = {"axis": 1, "reduction": "none", "label_smoothing": 0.1}
    want, gradient = fastxent.cross_entropy_with_grad(logits, targets, **options)
    given = there(logits)
    if last:
        given = there(np.moveaxis(logits, 1, -1)).movedim(-1, 1)
    loss, dlogits = fastxent.cross_entropy_with_grad(given, there(targets), **options)
    assert dlogits.shape == given.shape
    np.testing.assert_allclose(loss.numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(dlogits.numpy(), gradient, rtol=1e-6, atol=2e-7)  # of terms up to 1
    apart = torch.full_like(given, torch.nan)
    for out in (apart, given):
        _, written = fastxent.cross_entropy_with_grad(given, there(targets), out=out, **options)
        assert written is out
        assert torch.equal(out, dlogits)


def test_rows_anyhow():
    """Transposed, reversed along a batch, one row seen often: copies, where no kernel takes them."""
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((45, 5), np.float32), there(rng.integers(0, 45, 5))
    want = fastxent.cross_entropy(logits.T, targets.numpy(), reduction="none")
    got = fastxent.cross_entropy(there(logits).T, targets, reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
    row = there(logits[:, 0]).expand(5, 45)
    want = fastxent.cross_entropy(np.broadcast_to(logits[:, 0], (5, 45)), targets.numpy(), reduction="none")
    got = fastxent.cross_entropy(row, targets, reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


def test_half_probabilities():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((5, 45), np.float32)).bfloat16()
    targets = torch.softmax(torch.from_numpy(rng.standard_normal((5, 45), np.float32)), 1).bfloat16()
    loss = fastxent.cross_entropy(logits, targets)
    want = fastxent.cross_entropy(logits.float().numpy(), targets.float().numpy())
    np.testing.assert_allclose(loss.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_along_any_axis(dim):
    logits = np.random.default_rng(0).standard_normal((2, 45, 3), np.float32)
    for function in (fastxent.log_softmax, fastxent.softmax):
        want, given = function(logits, axis=dim, scale=0.5), there(logits)
        np.testing.assert_allclose(function(given, axis=dim, scale=0.5).numpy(), want, rtol=1e-6, atol=1e-9)
        apart = torch.full_like(given, torch.nan)
        for out in (apart, given):
            assert function(given, axis=dim, scale=0.5, out=out) is out
            np.testing.assert_allclose(out.numpy(), want, rtol=1e-6, atol=1e-9)
    kept = fastxent.logsumexp(there(logits), axis=dim, keepdims=True)
    want = fastxent.logsumexp(logits, axis=dim, keepdims=True)
    np.testing.assert_allclose(kept.numpy(), want, rtol=1e-6, atol=5e-7)  # of a largest logit up to 3


def test_what_out_may_be_wherever_it_lies():
    """Strided like contiguous: the same dtypes and shapes, and what was there is written whole."""
    logits = there(np.random.default_rng(0).standard_normal((5, 45), np.float32))
    targets = torch.zeros(5, dtype=torch.int64)
    want = fastxent.softmax(logits)
    out = torch.full((45, 5), torch.nan).T
    assert fastxent.softmax(logits, out=out) is out
    assert torch.equal(out, want)
    _, dlogits = fastxent.cross_entropy_with_grad(logits, targets)
    fastxent.cross_entropy_with_grad(logits, targets, out=out)
    assert torch.equal(out, dlogits)
    for bad in (
        torch.zeros(45, 5, dtype=torch.int64).T,
        torch.zeros(45, 5, dtype=torch.float64).T,
        torch.zeros(2, 5, 45),
    ):
        with pytest.raises(ValueError, match="out on a device must be float32 or float32 of shape"):
            fastxent.softmax(logits, out=bad)
        with pytest.raises(ValueError, match="out on a device must be"):
            fastxent.cross_entropy_with_grad(logits, targets, out=bad)


def test_targets_that_are_a_slice_of_a_batch_and_an_empty_batch():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 4, 45), np.float32), rng.integers(0, 45, (2, 5))
    want = fastxent.cross_entropy(logits[:, :-1], targets[:, 2:], reduction="none")
    got = fastxent.cross_entropy(there(logits)[:, :-1], there(targets)[:, 2:], reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
    empty = torch.zeros(3, 45, 0), torch.zeros(3, 0, dtype=torch.int64)
    assert fastxent.cross_entropy(*empty, axis=1, reduction="sum") == 0.0


def test_tensors_of_the_host_and_of_another_gpu(monkeypatch):
    logits, targets, weight = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.ones(4)
    monkeypatch.setattr(arrays._Torch, "device", lambda library, tensor: -1 if tensor is weight else 0)
    with pytest.raises(TypeError, match="weight must be on the device too; got one of the host"):
        fastxent.cross_entropy(logits, targets, weight=weight)
    monkeypatch.setattr(arrays._Torch, "device", lambda library, tensor: 1)
    functions = fastxent.cross_entropy, lambda logits, targets: fastxent.score(logits, targets.numpy())
    for function in (fastxent.softmax, *(lambda logits, call=call: call(logits, targets) for call in functions)):
        with pytest.raises(NotImplementedError, match="logits must be on the first GPU, not on GPU 1"):
            function(logits)
