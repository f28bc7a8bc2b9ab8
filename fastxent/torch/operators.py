"""The operators torch sees: each opaque to torch.compile and export, with its shapes and its derivative.

`cross_entropy` gives the loss and, where it will be needed, the gradient in the same pass; `cross_entropy_gradient`
the gradient for an upstream one, differentiable once more through `cross_entropy_hvp`. A row's options travel as one
list, in the order of `OPTIONS`.
"""

import numpy as np
import torch

import fastxent
from fastxent import arguments, terms
from fastxent.torch.arrays import as_array, as_tensor, gradient_like, loss_dtype, new_gradient, plain

# by name, as torch's schemas spell their types
OPTIONS = {
    "probabilities": "Tensor?",  # of sparse targets, whose ids are the targets
    "weight": "Tensor?",
    "sample_weight": "Tensor?",
    "ignore_index": "int?",
    "label_smoothing": "float",
    "z_loss": "float",
    "softcap": "float?",
    "temperature": "float",
    "reduction": "str",
    "denominator": "float?",
    "axis": "int",
    "backend": "str?",
}
TENSORS = 3  # the first of them
_READ = tuple(OPTIONS)[1:]


def operator(name, inputs, results, mutates=()):
    """A decorator that makes an operator of torch's: its schema ends with the `OPTIONS`."""
    options = ", ".join(f"{kind} {option}" for option, kind in OPTIONS.items())
    schema = f"({inputs}, {options}) -> {results}"
    return torch.library.custom_op(f"fastxent::{name}", mutates_args=mutates, schema=schema)


def named(options):
    """What travels as one list, by name."""
    return dict(zip(OPTIONS, options, strict=True))


def refuse_gradients(**tensors):
    """These take no gradient: a NotImplementedError if one requires it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} must not require grad: pass {name}.detach()")


def read_problem(targets, options):
    """Targets and options as `fastxent.cross_entropy` takes them."""
    probabilities, *tensors = map(as_array, options[:TENSORS])
    targets = as_array(targets) if probabilities is None else (as_array(targets), probabilities)
    return targets, dict(zip(_READ, (*tensors, *options[TENSORS:]), strict=True))


@operator("divisor", "Tensor logits, Tensor targets", "Tensor")
def divisor(logits, targets, *options):
    """What the reduced loss is divided by, float64, once all arguments are checked."""
    wanted, read = read_problem(targets, options)
    del read["backend"]
    problem = arguments.normalise(as_array(logits), wanted, read)
    return as_tensor(np.asarray(terms.divisor(problem, terms.row_weight(problem)), np.float64))


@divisor.register_fake
def _(logits, *_):
    return logits.new_empty((), dtype=torch.float64)


@operator(
    "cross_entropy",
    "Tensor logits, Tensor targets, bool with_gradient, bool inplace_backward, bool return_lse",
    "(Tensor, Tensor, Tensor)",
)
def cross_entropy(logits, targets, with_gradient, inplace_backward, return_lse, *options):
    """Loss, lse and gradient; what is not asked for is empty."""
    nothing, (wanted, read) = logits.new_empty(0), read_problem(targets, options)
    read["return_lse"] = return_lse
    if with_gradient:
        dlogits = new_gradient(logits)
        found = fastxent.cross_entropy_with_grad(as_array(logits), wanted, out=as_array(dlogits), **read)[:-1]
    else:
        dlogits, found = nothing, fastxent.cross_entropy(as_array(logits), wanted, **read)
        found = found if return_lse else (found,)
    return as_tensor(found[0]), as_tensor(found[1]) if return_lse else torch.empty_like(nothing), dlogits


@cross_entropy.register_fake
def _(logits, targets, with_gradient, inplace_backward, return_lse, *options):
    read, batch = named(options), list(logits.shape)
    del batch[read["axis"]]
    real = loss_dtype(logits.dtype)
    loss = logits.new_empty(batch if read["reduction"] == "none" else (), dtype=real)
    lse = logits.new_empty(batch, dtype=real) if return_lse else logits.new_empty(0)
    return loss, lse, gradient_like(logits) if with_gradient else logits.new_empty(0)


def end_here(ctx, *outputs):
    """No gradient comes back through these; torch would else make zeros of their size, which takes longer than ours."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)
    ctx.given_away = False


def give_away(ctx, *gradients):
    """Gradients that were computed with the loss, once: from then on they are the caller's, who may write to them."""
    ctx.given_away = True
    return [gradient.data for gradient in gradients]  # a write is not one to what was saved, which no one reads again


def is_one(grad_output):
    """Whether what was computed with the loss is the gradient: nothing to scale, nothing to differentiate again."""
    return not torch.is_grad_enabled() and plain(grad_output) and grad_output.item() == 1.0


def _keep(ctx, inputs, output):
    logits, targets, with_gradient, ctx.inplace_backward, _, *options = inputs
    _, lse, dlogits = output
    end_here(ctx, lse, dlogits)
    ctx.options = tuple(options[TENSORS:])
    ctx.save_for_backward(logits, targets, *options[:TENSORS], dlogits if with_gradient else None)


def _backward(ctx, grad_output, *_):
    logits, targets, *tensors, dlogits = ctx.saved_tensors
    problem = logits, grad_output, targets, *tensors, *ctx.options
    if grad_output is None:
        gradient = None
    elif dlogits is not None and not ctx.given_away and is_one(grad_output):
        (gradient,) = give_away(ctx, dlogits)
    elif ctx.inplace_backward and not torch.is_grad_enabled() and plain(logits) and plain(grad_output):
        cross_entropy_gradient_(*problem)
        gradient = logits.detach()
    else:
        gradient = cross_entropy_gradient(*problem)
    return gradient, *[None] * (4 + len(OPTIONS))


cross_entropy.register_autograd(_backward, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """`cross_entropy` where no tracer looks on, without the dispatcher: some 200 us less of Python a call. Torch goes
    over every argument and result, so all but the logits are one, and the gradient is none.
    """

    @staticmethod
    def forward(ctx, logits, others):
        loss, lse, dlogits = cross_entropy._init_fn(logits, *others)
        _keep(ctx, (logits, *others), (loss, lse, dlogits))
        return loss, lse

    @staticmethod
    def backward(ctx, *grad_outputs):
        return _backward(ctx, *grad_outputs)[0], None


def loss_of(logits, *others):
    """Loss and lse of `cross_entropy`, the short way where it may be taken."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not plain(logits):
        return cross_entropy(logits, *others)[:2]
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Eager.apply(logits, others)
    return cross_entropy._init_fn(logits, *others)[:2]


@operator("cross_entropy_gradient", "Tensor logits, Tensor grad_output, Tensor targets", "Tensor")
def cross_entropy_gradient(logits, grad_output, targets, *options):
    """The gradient of the loss for the upstream gradient, which scales before it is rounded."""
    dlogits = new_gradient(logits)
    _write_gradient(as_array(dlogits), logits, grad_output, targets, options)
    return dlogits


@cross_entropy_gradient.register_fake
def _(logits, *_):
    return gradient_like(logits)


@operator("cross_entropy_gradient_", "Tensor(a!) logits, Tensor grad_output, Tensor targets", "()", mutates=("logits",))
def cross_entropy_gradient_(logits, grad_output, targets, *options):
    """The gradient in place of the logits."""
    _write_gradient(as_array(logits), logits, grad_output, targets, options)


@cross_entropy_gradient_.register_fake
def _(*_):
    return None


def _write_gradient(out, logits, grad_output, targets, options):
    wanted, read = read_problem(targets, options)
    fastxent.cross_entropy_grad(as_array(logits), wanted, grad_output=as_array(grad_output), out=out, **read)


def _keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: 3 + TENSORS])
    ctx.options = tuple(inputs[3 + TENSORS :])


def _backward_of_gradient(ctx, v):
    (logits, grad_output, *others), dlogits, dgrad_output = ctx.saved_tensors, None, None
    if ctx.needs_input_grad[0]:
        dlogits = cross_entropy_hvp(logits, grad_output, v, *others, *ctx.options)
    if ctx.needs_input_grad[1]:
        along = v * cross_entropy_gradient(logits, torch.ones_like(grad_output), *others, *ctx.options)
        axis = ctx.options[list(OPTIONS).index("axis") - TENSORS]
        dgrad_output = along.sum(axis, dtype=grad_output.dtype)
        dgrad_output = dgrad_output.sum() if grad_output.dim() == 0 else dgrad_output
    return dlogits, dgrad_output, *[None] * (1 + len(OPTIONS))


cross_entropy_gradient.register_autograd(_backward_of_gradient, setup_context=_keep_gradients)


@operator("cross_entropy_hvp", "Tensor logits, Tensor grad_output, Tensor v, Tensor targets", "Tensor")
def cross_entropy_hvp(logits, grad_output, v, targets, *options):
    """The Hessian of the loss times v; its own derivative is not known."""
    product, (wanted, read) = new_gradient(logits), read_problem(targets, options)
    read |= {"grad_output": as_array(grad_output), "out": as_array(product)}
    fastxent.cross_entropy_hvp(as_array(logits), wanted, as_array(v), **read)
    return product


@cross_entropy_hvp.register_fake
def _(logits, *_):
    return gradient_like(logits)


@torch.library.custom_op("fastxent::log_softmax", mutates_args=())
def log_softmax(logits: torch.Tensor, dim: int, backend: str | None) -> torch.Tensor:
    """Log-probabilities along ``dim``."""
    log_probs = new_gradient(logits)
    fastxent.log_softmax(as_array(logits), axis=dim, out=as_array(log_probs), backend=backend)
    return log_probs


@log_softmax.register_fake
def _(logits, dim, backend):
    return gradient_like(logits)


def _keep_log_probs(ctx, inputs, output):
    ctx.dim = inputs[1]
    ctx.save_for_backward(output)


def _backward_of_log_softmax(ctx, v):
    (log_probs,) = ctx.saved_tensors
    return torch.ops.aten._log_softmax_backward_data(v, log_probs, ctx.dim, log_probs.dtype), None, None


log_softmax.register_autograd(_backward_of_log_softmax, setup_context=_keep_log_probs)


@torch.library.custom_op("fastxent::binary_cross_entropy_with_logits", mutates_args=())
def binary(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient; empty if that is not asked for."""
    read = _read_binary(weight, pos_weight, label_smoothing, reduction, backend)
    if not with_gradient:
        loss = fastxent.binary_cross_entropy_with_logits(as_array(logits), as_array(targets), **read)
        return as_tensor(loss), logits.new_empty(0)
    dlogits = new_gradient(logits)
    read["out"] = as_array(dlogits)
    loss, _ = fastxent.binary_cross_entropy_with_logits_with_grad(as_array(logits), as_array(targets), **read)
    return as_tensor(loss), dlogits


@binary.register_fake
def _(logits, targets, weight, pos_weight, label_smoothing, reduction, backend, with_gradient):
    loss = logits.new_empty(logits.shape if reduction == "none" else (), dtype=loss_dtype(logits.dtype))
    return loss, gradient_like(logits) if with_gradient else logits.new_empty(0)


@torch.library.custom_op("fastxent::binary_cross_entropy_with_logits_gradient", mutates_args=())
def binary_gradient(
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
    dlogits, read = new_gradient(logits), _read_binary(weight, pos_weight, label_smoothing, reduction, backend)
    read |= {"grad_output": as_array(grad_output), "out": as_array(dlogits)}
    fastxent.binary_cross_entropy_with_logits_grad(as_array(logits), as_array(targets), **read)
    return dlogits


@binary_gradient.register_fake
def _(logits, *_):
    return gradient_like(logits)


def _read_binary(weight, pos_weight, label_smoothing, reduction, backend):
    weights = {"weight": as_array(weight), "pos_weight": as_array(pos_weight)}
    return weights | {"label_smoothing": label_smoothing, "reduction": reduction, "backend": backend}


def _keep_binary(ctx, inputs, output):
    end_here(ctx, output[1])
    ctx.options, with_gradient = inputs[4:7], inputs[7]
    ctx.save_for_backward(*inputs[:4], output[1] if with_gradient else None)


def _backward_of_binary(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 8
    logits, targets, weight, pos_weight, saved = ctx.saved_tensors
    dlogits, dtargets, (smoothing, reduction, _) = None, None, ctx.options
    real = grad_output.dtype
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
    elif ctx.needs_input_grad[0] and saved is not None and not ctx.given_away and is_one(grad_output):
        (dlogits,) = give_away(ctx, saved)
    elif ctx.needs_input_grad[0]:
        dlogits = binary_gradient(logits, grad_output, targets, weight, pos_weight, *ctx.options)
    return dlogits, dtargets, *[None] * 6


binary.register_autograd(_backward_of_binary, setup_context=_keep_binary)
