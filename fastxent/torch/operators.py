"""The operators torch sees: each opaque to torch.compile and export, with its shapes and its derivative.

`cross_entropy` gives the loss, `cross_entropy_gradient` the gradient for an upstream one, differentiable once more
through `cross_entropy_hvp`. Where nothing of torch's looks on, no operator is called but what it would call, and the
gradient comes with the loss, in the same pass. A row's options travel as one list, in the order of `OPTIONS`.
"""

from operator import itemgetter

import numpy as np
import torch
from torch.autograd import forward_ad

import fastxent
from fastxent import arguments, backends, checks, losses, terms
from fastxent.torch.arrays import (
    as_array,
    as_given,
    as_tensor,
    gradient_like,
    loss_dtype,
    new_gradient,
    plain,
    unwatched,
)

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
REDUCTION = tuple(OPTIONS).index("reduction")
_READ = tuple(OPTIONS)[1:]


def operator(name, inputs, results, mutates=()):
    """A decorator that makes an operator of torch's: its schema ends with the `OPTIONS`."""
    options = ", ".join(f"{kind} {option}" for option, kind in OPTIONS.items())
    schema = f"({inputs}, {options}) -> {results}"
    return torch.library.custom_op(f"fastxent::{name}", mutates_args=mutates, schema=schema)


def named(options):
    """What travels as one list, by name."""
    return dict(zip(OPTIONS, options, strict=True))


def _check_tensor(name, tensor):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}; fastxent itself takes arrays")


def refuse_gradients(**tensors):
    """These take no gradient: a NotImplementedError if one requires it, a TypeError for what is no tensor."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check_tensor(name, tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name} must not require grad: pass {name}.detach()")


def read_target(target):
    """Class indices or ids, and the probabilities of these or None."""
    if not isinstance(target, tuple):
        return target, None
    if len(target) != 2 or not isinstance(target[1], torch.Tensor):
        raise TypeError("target must be a tensor, or a tuple of two, (ids, probabilities)")
    return target


def check_inputs(**tensors):
    """A TypeError for what is no tensor, and a NotImplementedError for a tangent, which would be lost."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    if forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f"{name} must not carry a tangent: no forward-mode derivative (jvp) is known, that of backward() is"
                )


def read_problem(targets, options):
    """Targets and options as `fastxent.cross_entropy` takes them."""
    probabilities, *tensors = map(as_given, options[:TENSORS])
    targets = as_given(targets) if probabilities is None else (as_given(targets), probabilities)
    return targets, dict(zip(_READ, (*tensors, *options[TENSORS:]), strict=True))


@operator("divisor", "Tensor logits, Tensor targets", "Tensor")
def divisor(logits, targets, *options):
    """What the reduced loss is divided by, float64, once all arguments are checked."""
    problem, _ = _problem(logits, targets, options)
    return as_tensor(np.asarray(terms.divisor(problem, terms.row_weight(problem)), np.float64))


@divisor.register_fake
def _(logits, *_):
    return logits.new_empty((), dtype=torch.float64)


def _problem(logits, targets, options, return_lse=False):
    """The `fastxent.arguments.Problem` of tensors of the CPU, and the verbs of its backend: what public functions check
    is checked once.
    """
    probabilities, *weights = map(as_array, options[:TENSORS])
    targets = as_array(targets) if probabilities is None else (as_array(targets), probabilities)
    read = arguments.Options(*_in_order((return_lse, *weights, *options[TENSORS:])))
    return arguments.normalise(as_array(logits), targets, read), backends.choose(options[-1])


# return_lse and the options but the first, as an `Options` has them
_in_order = itemgetter(*map(("return_lse", *_READ).index, arguments.Options._fields))


@operator("cross_entropy", "Tensor logits, Tensor targets, bool inplace_backward, bool return_lse", "(Tensor, Tensor)")
def cross_entropy(logits, targets, inplace_backward, return_lse, *options):
    """Loss and lse, which is empty if it is not asked for."""
    loss, lse = _loss_and_lse(logits, targets, return_lse, options)
    return loss, logits.new_empty(0) if lse is None else lse


@cross_entropy.register_fake
def _(logits, targets, inplace_backward, return_lse, *options):
    read, batch = named(options), list(logits.shape)
    del batch[read["axis"]]
    real = loss_dtype(logits.dtype)
    loss = logits.new_empty(batch if read["reduction"] == "none" else (), dtype=real)
    return loss, logits.new_empty(batch, dtype=real) if return_lse else logits.new_empty(0)


def _loss_and_lse(logits, targets, return_lse, options, dlogits=None):
    """Both, None for an lse that is not asked for; where there is ``dlogits``, the gradient is written to it."""
    if logits.is_cuda:
        wanted, read = read_problem(targets, options)
        found = fastxent.cross_entropy(as_given(logits), wanted, return_lse=return_lse, **read)
    else:
        problem, verbs = _problem(logits, targets, options, return_lse)
        if dlogits is None:
            found = losses.loss_of(problem, verbs)
        else:
            found = losses.loss_and_gradient_of(problem, _ONE, as_array(dlogits), verbs)
    return tuple(map(as_tensor, found)) if return_lse else (as_tensor(found), None)


_ONE = np.ones(1)

_was_scaled = False  # the last loss that was differentiated, by whatever thread
# the hooks on what is saved; torch before 2.8 cannot say, and computes what it will not need
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda of_tracing_too: None)


def gradient_comes_with_loss(logits, reduction):
    """Whether to compute the gradient with the loss: where it will most likely be that very one, of a scalar that is
    not scaled, as the last one was not. A wrong guess costs time alone.

    Loss scaling is what float16 is for. Of a tensor of a device it is not known without waiting. Who has hooks on what
    is saved (checkpoints) computes the loss again, or keeps tensors elsewhere: the gradient would be in the way.
    """
    return (
        not _was_scaled
        and reduction != "none"
        and logits.is_cpu
        and logits.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and _hooks(True) is None
    )


def take_gradient(ctx, grad_output):
    """What was computed with the loss, if there is something, and whether it is the gradient. It leaves the context:
    whoever gets it may write to it.
    """
    global _was_scaled
    kept, ctx.dlogits = ctx.dlogits, None
    if torch.is_grad_enabled() or grad_output.dim() or not plain(grad_output) or not grad_output.is_cpu:
        return kept, False
    _was_scaled = scaled = grad_output.item() != 1.0
    return kept, kept is not None and not scaled


def _save(ctx, dlogits, logits, targets, inplace_backward, options):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, *options[:TENSORS])
    ctx.dlogits, ctx.inplace_backward, ctx.options = dlogits, inplace_backward, options[TENSORS:]


def _keep(ctx, inputs, output):
    logits, targets, inplace_backward, _, *options = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, None, logits, targets, inplace_backward, options)


def _backward(ctx, grad_output, *_):
    return _gradient(ctx, grad_output), *[None] * (3 + len(OPTIONS))


def _gradient(ctx, grad_output):
    if grad_output is None:
        return None
    kept, fits = take_gradient(ctx, grad_output)
    if fits:
        return kept
    logits, targets, *tensors = ctx.saved_tensors
    problem = logits, grad_output, targets, *tensors, *ctx.options
    plainly = not torch.is_grad_enabled() and plain(logits) and plain(grad_output)
    if plainly and ctx.inplace_backward:
        run(cross_entropy_gradient_, *problem)
        return logits.detach()
    if plainly and kept is not None:
        _write_gradient(kept, *problem)
        return kept
    return run(cross_entropy_gradient, *problem)


cross_entropy.register_autograd(_backward, setup_context=_keep)


class _Loss(torch.autograd.Function):
    """`cross_entropy` where nothing looks on, without the dispatcher, whose Python takes longer than a small loss.

    Torch goes over every argument and result: so all but the logits are one, and there is one result, the lse being
    left in the list ``beside``. The gradient is no result and not saved, as torch knows it, but kept by the context.
    """

    @staticmethod
    def forward(ctx, logits, others, with_gradient, beside):
        targets, inplace_backward, return_lse, options = others
        dlogits = new_gradient(logits) if with_gradient else None
        loss, lse = _loss_and_lse(logits, targets, return_lse, options, dlogits)
        beside.append(lse)
        _save(ctx, dlogits, logits, targets, inplace_backward, options)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return _gradient(ctx, grad_output), None, None, None


def loss_of(logits, targets, inplace_backward, return_lse, options):
    """Loss and lse of `cross_entropy`, the short way where it may be taken."""
    if not unwatched(logits, targets):
        return cross_entropy(logits, targets, inplace_backward, return_lse, *options)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _loss_and_lse(logits, targets, return_lse, options)
    beside: list = []
    with_gradient = not inplace_backward and gradient_comes_with_loss(logits, options[REDUCTION])
    loss = apply(_Loss, logits, (targets, inplace_backward, return_lse, options), with_gradient, beside)
    return loss, beside[0]


def apply(function, *arguments):
    """``function.apply`` but for the search for what torch.func has put in place of tensors, 3 us; `unwatched` has
    looked.
    """
    return super(torch.autograd.Function, function).apply(*arguments)


def run(operator, *arguments):
    """What an operator gives, without the dispatcher where nothing looks on and nothing takes a gradient."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    if not unwatched(*tensors) or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return operator(*arguments)
    if operator is cross_entropy_gradient_:
        torch.autograd.graph.increment_version(arguments[0])  # as the dispatcher does for what is written to
    return operator._init_fn(*arguments)


@operator("cross_entropy_gradient", "Tensor logits, Tensor grad_output, Tensor targets", "Tensor")
def cross_entropy_gradient(logits, grad_output, targets, *options):
    """The gradient of the loss for the upstream gradient, which scales before it is rounded."""
    dlogits = new_gradient(logits)
    _write_gradient(dlogits, logits, grad_output, targets, *options)
    return dlogits


@cross_entropy_gradient.register_fake
def _(logits, *_):
    return gradient_like(logits)


@operator("cross_entropy_gradient_", "Tensor(a!) logits, Tensor grad_output, Tensor targets", "()", mutates=("logits",))
def cross_entropy_gradient_(logits, grad_output, targets, *options):
    """The gradient in place of the logits."""
    _write_gradient(logits, logits, grad_output, targets, *options)


@cross_entropy_gradient_.register_fake
def _(*_):
    return None


def _write_gradient(out, logits, grad_output, targets, *options):
    grad_output = grad_output.contiguous()
    if logits.is_cuda:
        wanted, read = read_problem(targets, options)
        read |= {"grad_output": as_given(grad_output), "out": as_given(out)}
        fastxent.cross_entropy_grad(as_given(logits), wanted, **read)
        return
    problem, verbs = _problem(logits, targets, options)
    upstream = checks.read_grad_output(as_array(grad_output), options[REDUCTION], problem.shape).reshape(-1)
    dlogits = as_array(out)
    if out is logits:
        checks.read_out(dlogits, dlogits, "logits")
    losses.loss_and_gradient_of(problem, upstream, dlogits, verbs)


def _keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: 3 + TENSORS])
    ctx.options = tuple(inputs[3 + TENSORS :])


def _backward_of_gradient(ctx, v):
    (logits, grad_output, *others), dlogits, dgrad_output = ctx.saved_tensors, None, None
    if ctx.needs_input_grad[0]:
        dlogits = cross_entropy_hvp(logits, grad_output, v, *others, *ctx.options)
    if ctx.needs_input_grad[1]:
        # of a half mean the gradient is too small for a half
        wide = logits.to(loss_dtype(logits.dtype))
        along = v * cross_entropy_gradient(wide, torch.ones_like(grad_output), *others, *ctx.options)
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
    fastxent.log_softmax(as_given(logits), axis=dim, out=as_given(log_probs), backend=backend)
    return log_probs


@log_softmax.register_fake
def _(logits, dim, backend):
    return gradient_like(logits)


def _keep_log_probs(ctx, inputs, output):
    ctx.dim = inputs[1]
    ctx.save_for_backward(output)


def _backward_of_log_softmax(ctx, v):
    (log_probs,), dim = ctx.saved_tensors, ctx.dim
    gradient = torch.ops.aten._log_softmax_backward_data(v, log_probs, dim, log_probs.dtype)
    # g - p sum g cancels where p is next to 1, so once a row
    largest, where = log_probs.max(dim, keepdim=True)
    own, largest = v.gather(dim, where), largest.to(loss_dtype(v.dtype))
    others = v.sum(dim, keepdim=True, dtype=largest.dtype) - own
    exact = -own * torch.expm1(largest) - torch.exp(largest) * others
    return gradient.scatter(dim, where, exact.to(gradient.dtype)), None, None


log_softmax.register_autograd(_backward_of_log_softmax, setup_context=_keep_log_probs)
