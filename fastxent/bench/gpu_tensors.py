"""torch's tensors on a GPU, against the reference, where torch sees one: losses, a CUDA graph, hidden states."""

import functools
from typing import Any

import numpy as np

import fastxent
from fastxent import checks
from fastxent.bench import exact

_DEVICE = "cuda"


def torch_of_the_device():
    """torch, where it has a GPU."""
    try:
        import torch
    except Exception:  # whatever keeps it, or a library that it loads, from being there
        return None
    return torch if torch.cuda.is_available() else None


def _hidden_states(logits, targets):
    """torch's tensors, whole numbers whose products are exact."""
    torch: Any = torch_of_the_device()
    rng, classes = np.random.default_rng(logits.shape[1]), logits.shape[1]
    hidden, weight = rng.integers(-2, 3, (len(logits), 8)), rng.integers(-2, 3, (classes, 8))
    function = functools.partial(fastxent.linear_cross_entropy_with_grad, reduction="none")
    loss, *exactly, _ = function(hidden.astype(float), weight.astype(float), targets, backend="reference")
    dtype = getattr(torch, logits.dtype.name)
    h, w, t = (torch.from_numpy(array).to(_DEVICE) for array in (hidden, weight, targets))
    for memory in (None, 2 * 8 * classes):
        found = function(h.to(dtype), w.to(dtype), t, memory=memory)
        got, *gradients = (_from_torch(torch, array) for array in found[:3])
        yield "loss", got, loss, exact.promised(logits.dtype)[0]
        promised = 64 * float(torch.finfo(dtype).eps)  # dlogits are rounded to the matrices' dtype, and so are sums
        for name, gradient, want in zip(("dhidden", "dlinear_weight"), gradients, exactly, strict=True):
            yield name, gradient, want, promised, np.full(want.shape, 4.0)


def _tensors(logits, targets):
    """torch's, with classes last and first."""
    torch, (given, indices) = _in_torch(logits, targets)
    wanted = fastxent.cross_entropy_with_grad(logits.astype(float), targets, reduction="none", backend="reference")
    for axis, name in ((-1, "gradient"), (0, "gradient along the first axis")):
        turned = given if axis else given.T
        out = torch.full_like(turned, float("nan"))
        loss, gradient = fastxent.cross_entropy_with_grad(turned, indices, axis=axis, reduction="none", out=out)
        yield from _figures(torch, logits.dtype, loss, gradient if axis else gradient.T, wanted, name)


def _captured(logits, targets):
    """A CUDA graph of a call, run on other numbers than it was captured with."""
    torch, (given, indices) = _in_torch(logits, targets)
    wanted = fastxent.cross_entropy_with_grad(logits.astype(float), targets, reduction="none", backend="reference")
    held, out, stream = torch.zeros_like(given), torch.full_like(given, float("nan")), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def call():
        return fastxent.cross_entropy_with_grad(held, indices, reduction="none", out=out)

    with torch.cuda.stream(stream):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss, _ = call()
    held.copy_(given)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    yield from _figures(torch, logits.dtype, loss, out, wanted)


def _figures(torch, dtype, loss, gradient, wanted, *name):
    found = _from_torch(torch, loss), _from_torch(torch, gradient).astype(checks.gradient_dtype(dtype))
    return exact.loss_and_gradient(found, wanted, dtype, *name)


def _in_torch(logits, targets):
    """torch, and both as its tensors on the device."""
    torch: Any = torch_of_the_device()
    wide = torch.from_numpy(logits.astype(checks.loss_dtype(logits.dtype)))
    return torch, (wide.to(_DEVICE, getattr(torch, logits.dtype.name)), torch.from_numpy(targets).to(_DEVICE))


def _from_torch(torch, tensor):
    return tensor.to("cpu", torch.float64).numpy()


VERBS = {"tensors of torch": _tensors, "a CUDA graph": _captured, "hidden states of torch": _hidden_states}
