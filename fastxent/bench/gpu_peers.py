"""What others make of the same problem on a GPU: every library that is installed, with its own tensors."""

import statistics

from fastxent.bench import gpu

_ROUNDS, _WARM = 10, 3


def _eager(torch):
    return torch.nn.functional.cross_entropy


def _compiled(torch):
    return torch.compile(torch.nn.functional.cross_entropy)


def _liger(torch):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy


def _quack(torch):
    from quack.cross_entropy import cross_entropy

    return lambda logits, targets: cross_entropy(logits, targets).mean()


def _flash_attention(torch):
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()


PEERS = {
    "torch": _eager,
    "torch.compile": _compiled,
    "Liger": _liger,
    "quack": _quack,
    "flash-attention": _flash_attention,
}
NAMES = (*PEERS, "cupy")


def time_peer(name, rows, classes, dtype, copy):
    """A `Time` of the loss, and of the loss with its gradient, beside a copy that took ``copy`` seconds."""
    about = (rows, classes), dtype, name
    try:
        loss, gradient = _with_cupy(rows, classes, dtype) if name == "cupy" else _with_torch(name, rows, classes, dtype)
    except ImportError as missing:
        return [gpu.Time("loss and gradient", *about, note=f"absent: {missing}")]
    except Exception as failure:  # a peer may fail in any way of its own; the suite goes on
        return [gpu.Time("loss and gradient", *about, note=f"failed: {type(failure).__name__}: {failure}"[:200])]
    times = [gpu.Time("loss", *about, loss, copy / 2 / loss)]
    return times if gradient is None else [*times, gpu.Time("loss and gradient", *about, gradient, copy / gradient)]


def _with_torch(name, rows, classes, dtype):
    import torch

    if not torch.cuda.is_available():
        raise ImportError("this torch sees no GPU")
    cross_entropy = PEERS[name](torch)
    logits = torch.randn(rows, classes, device="cuda", dtype=getattr(torch, dtype)).mul_(4)
    targets = torch.randint(0, classes, (rows,), device="cuda")

    def loss():
        with torch.no_grad():
            cross_entropy(logits, targets)

    def gradient():
        given = logits.detach().requires_grad_()
        cross_entropy(given, targets).backward()

    return _median(torch, loss), _median(torch, gradient)


def _median(torch, body):
    for _ in range(_WARM):
        body()
    seconds = []
    for _ in range(_ROUNDS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        body()
        last.record()
        last.synchronize()
        seconds.append(first.elapsed_time(last) * 1e-3)
    return statistics.median(seconds)


def _with_cupy(rows, classes, dtype):
    import cupy

    if dtype != "float32":
        raise ImportError("cupy has no such dtype in its softmax")
    logits = 4 * cupy.random.standard_normal((rows, classes), dtype=cupy.float32)
    targets, each = cupy.random.randint(0, classes, rows), cupy.arange(rows)

    def loss():
        peak = logits.max(axis=1, keepdims=True)
        return cupy.log(cupy.exp(logits - peak).sum(axis=1)) - (logits[each, targets] - peak[:, 0])

    for _ in range(_WARM):
        loss()
    seconds = []
    for _ in range(_ROUNDS):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record()
        loss()
        last.record()
        last.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(first, last) * 1e-3)
    return statistics.median(seconds), None
