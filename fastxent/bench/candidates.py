"""Candidates: our backends and other libraries' cross entropy, each a setup that returns a zero-argument callable.

A loss candidate returns per-row losses (N,); a gradient candidate the gradient (N, V) of their sum: that of a mean over
many rows is 0 in float16. A setup that needs what is not installed raises ImportError, one that cannot do what is asked
UnsupportedError.
"""

import shutil
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

import fastxent


class UnsupportedError(Exception):
    """The candidate cannot take these logits, this number of threads, or this machine; the message says which."""


def numpy_cross_entropy(logits, targets):
    """Per-row losses in plain NumPy the way scipy.special.log_softmax goes about it, in the logits' dtype."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(logits)), targets]


def numpy_cross_entropy_with_grad(logits, targets):
    """The sum of the losses and its gradient in plain NumPy."""
    each = np.arange(len(logits))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[each, targets]).sum()
    p[each, targets] -= 1
    return loss, p


def _ours(logits, targets):
    return lambda: fastxent.cross_entropy(logits, targets, reduction="none")


def _ours_with_grad(logits, targets):
    out = np.empty_like(logits)
    return lambda: fastxent.cross_entropy_with_grad(logits, targets, reduction="sum", out=out)[1]


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

    x, t = jax.device_put(logits), jax.device_put(targets)
    compiled = jax.jit(jax.value_and_grad(lambda x, t: bridge.cross_entropy(x, t, reduction="sum")))
    return lambda: np.asarray(jax.block_until_ready(compiled(x, t))[1])


def _compiled(function, wanted):
    """``function`` through torch.compile, for these shapes alone."""
    import torch

    if not wanted:
        return function
    if not shutil.which("c++"):
        raise UnsupportedError("torch.compile needs a C++ compiler: install g++ or clang")
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _jax(logits, targets):
    import jax
    import optax

    _refuse_fewer_threads("jax")
    x, t = jax.device_put(logits), jax.device_put(targets)
    compiled = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    return lambda: np.asarray(compiled(x, t).block_until_ready())


def _jax_with_grad(logits, targets):
    import jax
    import optax

    _refuse_fewer_threads("jax")
    x, t = jax.device_put(logits), jax.device_put(targets)
    compiled = jax.jit(jax.value_and_grad(lambda x, t: optax.softmax_cross_entropy_with_integer_labels(x, t).sum()))
    return lambda: np.asarray(jax.block_until_ready(compiled(x, t))[1])


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


def _threads():
    return fastxent.get_num_threads()


def _refuse_half(name, logits):
    if logits.dtype.itemsize == 2:
        raise UnsupportedError(f"{name} has no LogSoftmax of {logits.dtype}")


def _refuse_fewer_threads(name):
    import numba

    if _threads() != numba.config.NUMBA_NUM_THREADS:
        raise UnsupportedError(f"{name} takes no number of threads once it runs")


Setup = Callable[[np.ndarray, np.ndarray], Callable[[], np.ndarray]]
LOSS: dict[str, Setup] = {
    "fastxent": _ours,
    "torch": _torch,
    "torch.compile": partial(_torch, compiled=True),
    "jax.jit": _jax,
    "onnxruntime": _onnxruntime,
    "scipy": _scipy,
    "scikit-learn": _scikit_learn,
    "numpy": lambda logits, targets: lambda: numpy_cross_entropy(logits, targets),
}
LOSS_AND_GRADIENT: dict[str, Setup] = {
    "fastxent": _ours_with_grad,
    "fastxent.torch": _through_torch,
    "fastxent.jax": _through_jax,
    "torch": _torch_with_grad,
    "torch.compile": partial(_torch_with_grad, compiled=True),
    "jax.jit": _jax_with_grad,
    "scikit-learn": _scikit_learn_with_grad,
    "numpy": lambda logits, targets: lambda: numpy_cross_entropy_with_grad(logits, targets)[1],
}
