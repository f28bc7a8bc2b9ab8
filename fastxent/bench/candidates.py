"""Candidates: our backends and other libraries' cross entropy, each a setup that returns a zero-argument callable.

A loss candidate returns per-row losses (N,); a gradient candidate the gradient (N, V) of their sum: that of a mean over
many rows is 0 in float16. A setup that needs what is not installed raises ImportError, one that cannot do what is asked
UnsupportedError.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

import fastxent
from fastxent import backends
from fastxent.bench import naive

_REFERENCE_ROWS = 50_000  # at some 60 us


class UnsupportedError(Exception):
    """The candidate cannot take these logits, this number of threads, or this machine; the message says which."""


def _ours(logits, targets, backend="cpu"):
    _refuse_absent(backend, len(logits))
    return lambda: fastxent.cross_entropy(logits, targets, reduction="none", backend=backend)


def _ours_with_grad(logits, targets, backend="cpu"):
    _refuse_absent(backend, len(logits))
    out = np.empty_like(logits)
    return lambda: fastxent.cross_entropy_with_grad(logits, targets, reduction="sum", out=out, backend=backend)[1]


def _ours_with_grad_in_new_memory(logits, targets):
    return lambda: fastxent.cross_entropy_with_grad(logits, targets, reduction="sum", backend="cpu")[1]


def _tensor(array):
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor):
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _torch(logits, targets, compiled=False):
    import torch

    x, t = _tensor(logits), _tensor(targets)
    function = _compiled(torch.nn.functional.cross_entropy, compiled)

    def run():
        with torch.no_grad():
            return _array(function(x, t, reduction="none"))

    return run


def _torch_with_grad(logits, targets, compiled=False):
    import torch

    x, t = _tensor(logits.copy()).requires_grad_(True), _tensor(targets)
    function = _compiled(torch.nn.functional.cross_entropy, compiled)
    return lambda: _array(torch.autograd.grad(function(x, t, reduction="sum"), x)[0])


def _through_torch(logits, targets):
    import torch

    import fastxent.torch as bridge

    x, t = _tensor(logits.copy()).requires_grad_(True), _tensor(targets)
    return lambda: _array(torch.autograd.grad(bridge.cross_entropy(x, t, reduction="sum"), x)[0])


def _through_jax(logits, targets):
    import jax

    import fastxent.jax as bridge

    compiled = jax.jit(jax.value_and_grad(lambda x, t: bridge.cross_entropy(x, t, reduction="sum")))
    with _jax_in(logits.dtype):
        x, t = jax.device_put(logits), jax.device_put(targets)

    def run():
        with _jax_in(logits.dtype):
            return np.asarray(jax.block_until_ready(compiled(x, t))[1])

    return run


def _compiled(function, wanted):
    """``function`` through torch.compile, for these shapes alone."""
    import torch

    if not wanted:
        return function
    if not shutil.which("c++"):
        raise UnsupportedError("needs a C++ compiler: apt-get install g++, or clang")
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _jax(logits, targets):
    import jax
    import optax

    _refuse_fewer_threads("jax")
    compiled = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    with _jax_in(logits.dtype):
        x, t = jax.device_put(logits), jax.device_put(targets)

    def run():
        with _jax_in(logits.dtype):
            return np.asarray(compiled(x, t).block_until_ready())

    return run


def _jax_with_grad(logits, targets):
    import jax
    import optax

    _refuse_fewer_threads("jax")
    compiled = jax.jit(jax.value_and_grad(lambda x, t: optax.softmax_cross_entropy_with_integer_labels(x, t).sum()))
    with _jax_in(logits.dtype):
        x, t = jax.device_put(logits), jax.device_put(targets)

    def run():
        with _jax_in(logits.dtype):
            return np.asarray(jax.block_until_ready(compiled(x, t))[1])

    return run


def _jax_in(dtype):
    """JAX with float64, which it otherwise takes for float32, where logits are that."""
    import jax

    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def _scipy(logits, targets):
    import scipy.special

    _refuse_half("scipy", logits)
    each = np.arange(len(logits))
    return lambda: -scipy.special.log_softmax(logits, axis=1)[each, targets]


def _scikit_learn(logits, targets):
    from sklearn._loss.loss import HalfMultinomialLoss

    _refuse_half("scikit-learn", logits)
    loss, classes, threads = HalfMultinomialLoss(n_classes=logits.shape[1]), targets.astype(logits.dtype), _threads()
    return lambda: loss.loss(classes, logits, n_threads=threads)


def _scikit_learn_with_grad(logits, targets):
    from sklearn._loss.loss import HalfMultinomialLoss

    _refuse_half("scikit-learn", logits)
    loss, classes, threads = HalfMultinomialLoss(n_classes=logits.shape[1]), targets.astype(logits.dtype), _threads()
    return lambda: loss.loss_gradient(classes, logits, n_threads=threads)[1]


def _onnxruntime(logits, targets):
    import onnx
    import onnxruntime

    _refuse_half("onnxruntime's CPU provider", logits)
    kind = {"float32": onnx.TensorProto.FLOAT, "float64": onnx.TensorProto.DOUBLE}[logits.dtype.name]
    helper = onnx.helper
    nodes = [
        helper.make_node("LogSoftmax", ["x"], ["log_p"], axis=-1),
        helper.make_node("GatherElements", ["log_p", "t"], ["y"], axis=1),
    ]
    inputs = [
        helper.make_tensor_value_info("x", kind, [None, None]),
        helper.make_tensor_value_info("t", onnx.TensorProto.INT64, [None, 1]),
    ]
    graph = helper.make_graph(nodes, "loss", inputs, [helper.make_tensor_value_info("y", kind, [None, 1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": logits, "t": targets[:, None]}
    return lambda: -session.run(None, feeds)[0][:, 0]


def _numba_loop(logits, targets):
    _refuse_half("Numba on a CPU", logits, "no arithmetic")
    loop, losses = naive.numba_loops()[0], np.empty(len(logits), logits.dtype)

    def run():
        loop(logits, targets, losses)
        return losses

    return run


def _numba_loop_with_grad(logits, targets):
    _refuse_half("Numba on a CPU", logits, "no arithmetic")
    loop, losses, out = naive.numba_loops()[1], np.empty(len(logits), logits.dtype), np.empty_like(logits)

    def run():
        loop(logits, targets, losses, out)
        return out

    return run


def _threads():
    return fastxent.get_num_threads()


def _refuse_absent(backend, rows):
    if backend == "reference" and rows > _REFERENCE_ROWS:
        raise UnsupportedError(f"the reference goes row by row, and more than {_REFERENCE_ROWS:,} take minutes")
    if backend == "cuda" and os.environ.get("FASTXENT_CUDA_SIMULATED"):
        raise UnsupportedError("a simulated GPU has no speed")
    if (reason := backends.why_unavailable(backend)) is not None:
        raise UnsupportedError(reason)


def _refuse_half(name, logits, lack="no LogSoftmax"):
    if logits.dtype.itemsize == 2:
        raise UnsupportedError(f"{name} has {lack} of {logits.dtype}")


def _refuse_fewer_threads(name):
    import numba

    if _threads() != numba.config.NUMBA_NUM_THREADS:
        raise UnsupportedError(f"{name} takes no number of threads once it runs")


Setup = Callable[[np.ndarray, np.ndarray], Callable[[], np.ndarray]]
# what our backends are called among the candidates
BACKENDS = {"cpu": "fastxent", "cuda": "fastxent cuda", "reference": "fastxent reference"}
# the first without memory that is there for its gradient: peers take new pages for each of theirs too
NEW_MEMORY = "fastxent, new memory"
LOSS: dict[str, Setup] = {
    **{name: partial(_ours, backend=backend) for backend, name in BACKENDS.items()},
    "torch": _torch,
    "torch.compile": partial(_torch, compiled=True),
    "jax.jit": _jax,
    "onnxruntime": _onnxruntime,
    "scipy": _scipy,
    "scikit-learn": _scikit_learn,
    "numba loop": _numba_loop,
    "numpy": lambda logits, targets: lambda: naive.numpy_cross_entropy(logits, targets),
}
LOSS_AND_GRADIENT: dict[str, Setup] = {
    **{name: partial(_ours_with_grad, backend=backend) for backend, name in BACKENDS.items()},
    NEW_MEMORY: _ours_with_grad_in_new_memory,
    "fastxent.torch": _through_torch,
    "fastxent.jax": _through_jax,
    "torch": _torch_with_grad,
    "torch.compile": partial(_torch_with_grad, compiled=True),
    "jax.jit": _jax_with_grad,
    "scikit-learn": _scikit_learn_with_grad,
    "numba loop": _numba_loop_with_grad,
    "numpy": lambda logits, targets: lambda: naive.numpy_cross_entropy_with_grad(logits, targets)[1],
}
# these allocate from a pool that keeps what it has had, so that a second call shows nothing
POOLED = ("onnxruntime",)
# and these are compiled anew for another number of threads, in seconds
SLOW_SETUP = ("torch.compile",)
