"""What others make of the same problem on a GPU: every library that is installed, with its own tensors.

Each is checked on some rows before it is timed, like a candidate on a CPU.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastxent.backends.cuda.layout import GPU
from fastxent.bench import checking, exact
from fastxent.bench.gpu_problem import AHEAD, READ
from fastxent.bench.gpu_record import Time, failed
from fastxent.bench.record import Seconds

_ROUNDS, _WARM = 10, 3
_CHECKED = 1 << 20  # logits
_TIMES_AHEAD = 4  # what is written ahead of a call is written so often: autograd takes the host longer than ours


class _AbsentError(Exception):
    """Not installed, or no such thing in it; the message says what to do."""


class Peer(NamedTuple):
    """Functions of logits and targets: the mean loss, and the gradient, of the mean or ``of_sum``."""

    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    of_sum: bool = False


def _by_autograd(cross_entropy):
    def gradient(logits, targets):
        given = logits.detach().requires_grad_()
        cross_entropy(given, targets).backward()
        return given.grad

    return Peer(cross_entropy, gradient)


def _eager(torch):
    return _by_autograd(torch.nn.functional.cross_entropy)


def _compiled(torch):
    torch._dynamo.reset()  # else what it compiled for other shapes counts, and it gives up after some
    return _by_autograd(torch.compile(torch.nn.functional.cross_entropy, dynamic=False))


def _liger(torch):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _by_autograd(liger_cross_entropy)


def _quack(torch):
    from quack.cross_entropy import cross_entropy

    return _by_autograd(cross_entropy)


def _quack_in_one_read(torch):
    """Its forward, asked for the gradient too."""
    from quack.cross_entropy import cross_entropy_fwd

    def gradient(logits, targets):
        _, dlogits = cross_entropy_fwd(logits, targets, return_dx=True)
        return dlogits

    return Peer(lambda logits, targets: cross_entropy_fwd(logits, targets).mean(), gradient, of_sum=True)


def _flash_attention(torch):
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return _by_autograd(CrossEntropyLoss())


PEERS = {
    "torch": _eager,
    "torch.compile": _compiled,
    "Liger": _liger,
    "quack": _quack,
    "quack, one read": _quack_in_one_read,
    "flash-attention": _flash_attention,
}
NAMES = (*PEERS, "cupy")
_INSTALLS = {
    "torch": "pip install fastxent[torch]",
    "torch.compile": "pip install fastxent[torch]",
    "Liger": "pip install liger-kernel",
    "quack": "pip install quack-kernels",
    "quack, one read": "pip install quack-kernels",
    "flash-attention": "pip install flash-attn --no-build-isolation",
    "cupy": "pip install cupy-cuda13x, or cupy-cuda12x",
}
_OVERWRITES = ("Liger",)  # the gradient takes the place of the logits


def time_peer(name, shape, dtype, copied):
    """A `Time` of the loss, and of the loss with its gradient, beside a copy that took ``copied`` seconds."""
    found = _seconds_or_note(name, shape, dtype)
    _give_back(name)
    if isinstance(found, str):
        return [Time("", shape, dtype, name, note=found)]
    return [
        Time.of(operation, (shape, dtype, name), seconds, copied if operation == "loss and gradient" else copied / 2)
        for operation, seconds in found.items()
    ]


def _seconds_or_note(name, shape, dtype):
    """`Seconds` of each operation; or why there are none."""
    try:
        return _with_cupy(shape, dtype) if name == "cupy" else _with_torch(name, shape, dtype)
    except ModuleNotFoundError as missing:
        return f"absent: needs {missing.name}: {_INSTALLS[name]}"
    except _AbsentError as reason:
        return f"absent: {reason}"
    except Exception as failure:  # a peer may fail in any way of its own; the suite goes on
        return failed(failure)


def _give_back(name):
    """What its library keeps of the device's memory are gigabytes that the next problem wants; those of a failure too,
    which nothing holds any more.
    """
    library = sys.modules.get("cupy" if name == "cupy" else "torch")
    if library is None:
        return
    if name == "cupy":
        library.get_default_memory_pool().free_all_blocks()
    elif library.cuda.is_available():
        library.cuda.empty_cache()


def _with_torch(name, shape, dtype):
    """`Seconds` of each operation, or how wrong it is."""
    import torch

    if not torch.cuda.is_available():
        raise _AbsentError("this torch sees no GPU")
    return _of_tensors(torch, name, shape, dtype, "cuda", _timed_by_torch(torch))


def _of_tensors(torch, name, shape, dtype, device, timed):
    peer = PEERS[name](torch)
    kept = torch.randn(*shape, device=device, dtype=getattr(torch, dtype)).mul_(4)
    logits, targets = kept.clone(), torch.randint(0, shape[1], shape[:1], device=device)

    def restore():
        if name in _OVERWRITES:
            with torch.no_grad():
                logits.copy_(kept)

    def loss():
        with torch.no_grad():
            return peer.loss(logits, targets)

    def gradient():
        return peer.gradient(logits, targets)

    restore()
    some = torch.as_tensor(_some_rows(shape), device=device)
    of_some = peer.loss(kept[some], targets[some])
    of_each = 1 if peer.of_sum else shape[0]
    given, found = (array.double().cpu().numpy() for array in (kept[some], gradient()[some] * of_each))
    wrong = how_wrong(given, found, targets[some].cpu().numpy(), float(of_some), dtype)
    return wrong or {"loss": timed(loss, restore), "loss and gradient": timed(gradient, restore)}


def _some_rows(shape):
    """The last of those that are judged elsewhere, of fewer logits than take seconds."""
    return exact.some_rows(shape[0])[-max(4, _CHECKED // shape[1]) :]


def how_wrong(logits, gradient, targets, mean, dtype):
    """A note where the mean loss of some rows, or the gradient of each row's own loss, is wrong; else nothing."""
    losses, wanted = exact.losses_and_gradient(logits, targets)
    of_loss, _ = checking.errors(np.array([mean]), losses.mean(keepdims=True), 1.0)
    worst = max(of_loss, *checking.errors(gradient, wanted, 1.0))
    return _note(worst, dtype)


def _note(worst, dtype):
    allowed = checking.TOLERANCE[dtype]
    return "" if worst <= allowed else f"wrong: off by {worst:.1e} where {allowed:g} is allowed"


def _timed_by_torch(torch):
    ahead = torch.empty(AHEAD * GPU.launch, dtype=torch.uint8, device="cuda")
    read = torch.zeros(READ, dtype=torch.bfloat16, device="cuda")

    def seconds(body, restore):
        restore()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(_TIMES_AHEAD):
            ahead.zero_()
        read.sum()
        first.record()
        body()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    def timed(body, restore):
        samples = [seconds(body, restore) for _ in range(_WARM + _ROUNDS)]
        return Seconds.of(samples[_WARM:])

    return timed


def _with_cupy(shape, dtype):
    import cupy

    if dtype != "float32":
        raise _AbsentError(f"cupy has no {dtype}")
    logits = 4 * cupy.random.standard_normal(shape, dtype=cupy.float32)
    targets, each = cupy.random.randint(0, shape[1], shape[0]), cupy.arange(shape[0])

    def losses():
        peak = logits.max(axis=1, keepdims=True)
        return cupy.log(cupy.exp(logits - peak).sum(axis=1)) - (logits[each, targets] - peak[:, 0])

    some = _some_rows(shape)
    wanted, _ = exact.losses_and_gradient(logits[some].get(), targets[some].get())
    worst, _ = checking.errors(losses()[some].get(), wanted, 1.0)
    if note := _note(worst, dtype):
        return note
    samples = []
    ahead, read = cupy.empty(AHEAD * GPU.launch, cupy.uint8), cupy.zeros(READ, cupy.float16)
    for _ in range(_WARM + _ROUNDS):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(_TIMES_AHEAD):
            ahead.fill(0)
        read.sum()
        first.record()
        losses()
        last.record()
        last.synchronize()
        samples.append(cupy.cuda.get_elapsed_time(first, last) * 1e-3)
    return {"loss": Seconds.of(samples[_WARM:])}
