"""The loss of hidden states under an output matrix, for tensors: `fastxent.linear_cross_entropy`."""

from typing import Any

import torch

import fastxent
from fastxent.torch import operators
from fastxent.torch.arrays import as_array, as_tensor, loss_dtype


def linear_cross_entropy(
    input: torch.Tensor,  # noqa: A002
    linear_weight: torch.Tensor,
    target: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    denominator: float | None = None,
    return_lse: bool = False,
    memory: int | None = None,
    backend: str | None = None,
) -> Any:
    """`torch.nn.functional.linear_cross_entropy`: the `cross_entropy` of ``linear(input, linear_weight, linear_bias)``,
    whose logits are never whole in memory.

    The gradients of all three are computed with the loss, so that no logit is made twice, and multiplied by the
    upstream gradient; for reduction "none" and float16 they are computed in the backward pass instead, from that.

    Parameters
    ----------
    input : Tensor of bfloat16, float16, float8, float32 or float64, shape (..., K)
        Hidden states, on the CPU.
    linear_weight : Tensor of the same kinds, shape (C, K)
    target : as for `cross_entropy`, with the classes last
    linear_bias : Tensor, shape (C,), optional
    weight, reduction, ignore_index, label_smoothing
        As for `torch.nn.functional.linear_cross_entropy`.
    z_loss, softcap, temperature, sample_weight, denominator, return_lse
        As for `cross_entropy`.
    memory, backend
        As for `fastxent.linear_cross_entropy`.

    Returns
    -------
    loss : as `cross_entropy`

    Raises
    ------
    IndexError, TypeError, ValueError
        As `fastxent.linear_cross_entropy`.
    NotImplementedError
        As `cross_entropy`, for probabilities that require grad, and for a second derivative.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> hidden, output = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 8.0], [0.0, 0.0]], requires_grad=True)
    >>> fastxent.torch.linear_cross_entropy(hidden, output, torch.tensor([0])).backward()
    >>> output.grad
    tensor([[-2.0612e-09, -4.1223e-09],
            [ 2.0612e-09,  4.1223e-09]])
    """
    targets, probabilities = target if isinstance(target, tuple) else (target, None)
    operators.refuse_gradients(weight=weight, sample_weight=sample_weight, target=targets, probabilities=probabilities)
    inputs = [input, linear_weight, *([] if linear_bias is None else [linear_bias])]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with_gradients = differentiable and reduction != "none" and input.dtype != torch.float16
    options = {
        "probabilities": probabilities,
        "weight": weight,
        "sample_weight": sample_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "reduction": reduction,
        "denominator": denominator,
        "axis": -1,
        "backend": backend,
    }
    loss, lse, *_ = _forward(
        input, linear_weight, linear_bias, targets, memory, with_gradients, return_lse, *options.values()
    )
    return (loss, lse) if return_lse else loss


_INPUTS = "Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor targets, int? memory"


def _read(linear_bias, targets, memory, options):
    targets, read = operators.read_problem(targets, options)
    del read["axis"]
    return targets, read | {"linear_bias": as_array(linear_bias), "memory": memory}


@operators.operator(
    "linear_cross_entropy",
    f"{_INPUTS}, bool with_gradients, bool return_lse",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(hidden, linear_weight, linear_bias, targets, memory, with_gradients, return_lse, *options):
    """Loss, lse and the gradients of hidden, linear_weight and linear_bias; what is not there is empty."""
    wanted, read = _read(linear_bias, targets, memory, options)
    arguments, read["return_lse"] = (as_array(hidden), as_array(linear_weight), wanted), return_lse
    if with_gradients:
        *found, dhidden, dweight, dbias = fastxent.linear_cross_entropy_with_grad(*arguments, **read)
    else:
        found, (dhidden, dweight, dbias) = fastxent.linear_cross_entropy(*arguments, **read), (None, None, None)
        found = found if return_lse else (found,)
    lse = found[1] if return_lse else None
    return as_tensor(found[0]), *(
        hidden.new_empty(0) if values is None else as_tensor(values) for values in (lse, dhidden, dweight, dbias)
    )


@_forward.register_fake
def _(hidden, linear_weight, linear_bias, targets, memory, with_gradients, return_lse, *options):
    layer = [hidden, linear_weight, linear_bias]
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in layer)
    real, batch = torch.float64 if wide else loss_dtype(hidden.dtype), hidden.shape[:-1]
    reduction = operators.named(options)["reduction"]
    loss = hidden.new_empty(batch if reduction == "none" else (), dtype=real)
    lse = hidden.new_empty(batch, dtype=real) if return_lse else hidden.new_empty(0)
    return loss, lse, *(_like(tensor) if with_gradients else hidden.new_empty(0) for tensor in layer)


@operators.operator("linear_cross_entropy_gradients", f"{_INPUTS}, Tensor grad_output", "(Tensor, Tensor, Tensor)")
def _gradients(hidden, linear_weight, linear_bias, targets, memory, grad_output, *options):
    """The gradients of hidden, linear_weight and linear_bias, empty for a bias not there."""
    wanted, read = _read(linear_bias, targets, memory, options)
    read["grad_output"] = as_array(grad_output)
    _, *found = fastxent.linear_cross_entropy_with_grad(as_array(hidden), as_array(linear_weight), wanted, **read)
    return tuple(hidden.new_empty(0) if values is None else as_tensor(values) for values in found)


@_gradients.register_fake
def _(hidden, linear_weight, linear_bias, *_):
    return _like(hidden), _like(linear_weight), hidden.new_empty(0) if linear_bias is None else _like(linear_bias)


def _like(tensor):
    if tensor is None:
        return torch.empty(0)
    dtype = torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    operators.end_here(ctx, *output[1:])
    ctx.memory, with_gradients, _, *options = inputs[4:]
    ctx.options = tuple(options[operators.TENSORS :])
    ctx.save_for_backward(*inputs[:4], *options[: operators.TENSORS], *(output[2:] if with_gradients else ()))


def _backward(ctx, grad_output, *_):
    others = 4 + len(operators.OPTIONS)
    if grad_output is None:
        return (None,) * (3 + others)
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_cross_entropy has no second derivative: take cross_entropy of torch.nn.functional.linear"
        )
    inputs, tensors = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    tensors, kept = tensors[: operators.TENSORS], tensors[operators.TENSORS :]
    if not kept or ctx.given_away:
        found = _gradients(*inputs, ctx.memory, grad_output, *tensors, *ctx.options)
    elif operators.is_one(grad_output):
        found = operators.give_away(ctx, *kept)
    else:
        found = [gradient * grad_output for gradient in kept]
    return *found[:2], None if inputs[2] is None else found[2], *[None] * others


_forward.register_autograd(_backward, setup_context=_keep)
