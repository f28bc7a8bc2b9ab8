"""The binary cross entropy with logits: an operator torch sees, with its derivative, and the short way round it."""

import torch

import fastxent
from fastxent.torch.arrays import as_array, as_tensor, gradient_like, loss_dtype, new_gradient, plain, unwatched
from fastxent.torch.operators import apply, gradient_comes_with_loss, run, take_gradient


@torch.library.custom_op("fastxent::binary_cross_entropy_with_logits", mutates_args=())
def loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str | None,
) -> torch.Tensor:
    """The loss."""
    read = _read(weight, pos_weight, label_smoothing, reduction, backend)
    return as_tensor(fastxent.binary_cross_entropy_with_logits(as_array(logits), as_array(targets), **read))


@loss.register_fake
def _(logits, targets, weight, pos_weight, label_smoothing, reduction, backend):
    return logits.new_empty(logits.shape if reduction == "none" else (), dtype=loss_dtype(logits.dtype))


@torch.library.custom_op("fastxent::binary_cross_entropy_with_logits_gradient", mutates_args=())
def gradient(
    logits: torch.Tensor,
    grad_output: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str | None,
) -> torch.Tensor:
    """The gradient of the loss for the upstream gradient, which scales before it is rounded."""
    dlogits = new_gradient(logits)
    options = weight, pos_weight, label_smoothing, reduction, backend
    _write_gradient(dlogits, logits, as_array(grad_output), targets, *options)
    return dlogits


@gradient.register_fake
def _(logits, *_):
    return gradient_like(logits)


def _write_gradient(out, logits, grad_output, targets, *options):
    """The loss, whose gradient for an upstream one, an array, is written to ``out``."""
    read = _read(*options) | {"grad_output": grad_output, "out": as_array(out)}
    return fastxent.binary_cross_entropy_with_logits_with_grad(as_array(logits), as_array(targets), **read)[0]


def _read(weight, pos_weight, label_smoothing, reduction, backend):
    weights = {"weight": as_array(weight), "pos_weight": as_array(pos_weight)}
    return weights | {"label_smoothing": label_smoothing, "reduction": reduction, "backend": backend}


def _save(ctx, dlogits, logits, targets, weight, pos_weight, *options):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, weight, pos_weight)
    ctx.dlogits, ctx.options = dlogits, options


def _keep(ctx, inputs, output):
    _save(ctx, None, *inputs)


def _backward(ctx, grad_output):
    return *_gradients(ctx, grad_output), *[None] * 5


def _gradients(ctx, grad_output):
    """Those of logits and targets."""
    dlogits = dtargets = None
    if grad_output is None:
        return dlogits, dtargets
    kept, fits = take_gradient(ctx, grad_output)
    if fits and not ctx.needs_input_grad[1]:
        return kept, dtargets
    saved = logits, targets, weight, pos_weight = ctx.saved_tensors  # once: a checkpoint unpacks them no second time
    if torch.is_grad_enabled() or ctx.needs_input_grad[1]:
        dlogits, dtargets = _differentiable_gradients(ctx, grad_output, *saved)
    if fits:
        dlogits = kept
    elif ctx.needs_input_grad[0] and not torch.is_grad_enabled():
        if kept is None or not plain(grad_output):
            dlogits = run(gradient, logits, grad_output, targets, weight, pos_weight, *ctx.options)
        else:
            dlogits = kept
            _write_gradient(kept, logits, as_array(grad_output), targets, weight, pos_weight, *ctx.options)
    return dlogits, dtargets


def _differentiable_gradients(ctx, grad_output, logits, targets, weight, pos_weight):
    """Those of logits, where it is differentiated again, and of targets, made of what torch differentiates."""
    dlogits, dtargets, real, (smoothing, reduction, _) = None, None, grad_output.dtype, ctx.options
    x, y = logits.to(real), targets.to(real)
    each = grad_output / (logits.numel() if reduction == "mean" else 1) * (1.0 if weight is None else weight.to(real))
    positive = 1.0 if pos_weight is None else pos_weight.to(real)
    if ctx.needs_input_grad[1]:
        log_sigmoid = torch.nn.functional.logsigmoid
        dtargets = (1.0 - smoothing) * each * (log_sigmoid(-x) - positive * log_sigmoid(x))
        dtargets = dtargets.to(targets.dtype)
    if ctx.needs_input_grad[0] and torch.is_grad_enabled():
        y = (1.0 - smoothing) * y + smoothing / 2
        dlogits = each * ((1.0 - y) * torch.sigmoid(x) - positive * y * torch.sigmoid(-x))
        dlogits = dlogits.to(logits.dtype)
    return dlogits, dtargets


loss.register_autograd(_backward, setup_context=_keep)


class _Loss(torch.autograd.Function):
    """`loss` where nothing looks on, as that of `operators`."""

    @staticmethod
    def forward(ctx, logits, targets, options, with_gradient):
        dlogits = new_gradient(logits) if with_gradient else None
        _save(ctx, dlogits, logits, targets, *options)
        if dlogits is None:
            return loss._init_fn(logits, targets, *options)
        return as_tensor(_write_gradient(dlogits, logits, 1.0, targets, *options))

    @staticmethod
    def backward(ctx, grad_output):
        return *_gradients(ctx, grad_output), None, None


def loss_of(logits, targets, weight, pos_weight, label_smoothing, reduction, backend):
    """The loss, the short way where it may be taken."""
    options = weight, pos_weight, label_smoothing, reduction, backend
    asked = torch.is_grad_enabled() and (logits.requires_grad or targets.requires_grad)
    if not (asked and unwatched(logits, targets)):
        return run(loss, logits, targets, *options)
    with_gradient = logits.requires_grad and gradient_comes_with_loss(logits, reduction)
    return apply(_Loss, logits, targets, options, with_gradient)
