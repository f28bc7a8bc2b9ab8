"""The loss of hidden states under an output matrix, for tensors: `fastxent.linear_cross_entropy`."""

from typing import Any

import torch

import fastxent
from fastxent.torch import operators
from fastxent.torch.arrays import as_given, as_tensor, loss_dtype, unwatched


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

    The gradients of those of the three that require grad are computed with the loss, so that no logit is made twice,
    and multiplied by the upstream gradient; for reduction "none" and float16 they are computed in the backward pass
    instead, from that. A frozen output matrix saves a product and an array of its size.

    Parameters
    ----------
    input : Tensor of bfloat16, float16, float8, float32 or float64, shape (..., K)
        Hidden states, on the CPU; or with the other tensors, class indices or probabilities among them, on a CUDA
        device, where this has not been run yet: of two bytes or more, multiplied by torch's own products, and nothing
        waits for the device.
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
    targets, probabilities = operators.read_target(target)
    layer = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    operators.check_inputs(target=targets, **{name: tensor for name, tensor in layer.items() if tensor is not None})
    operators.refuse_gradients(weight=weight, sample_weight=sample_weight, target=targets, probabilities=probabilities)
    with_gradients = torch.is_grad_enabled() and reduction != "none" and input.dtype != torch.float16
    wanted = [with_gradients and tensor is not None and tensor.requires_grad for tensor in layer.values()]
    options = (
        probabilities,
        weight,
        sample_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        temperature,
        reduction,
        denominator,
        -1,
        backend,
    )
    loss, lse, *_ = operators.run(_forward, *layer.values(), targets, memory, *wanted, return_lse, *options)
    return (loss, lse) if return_lse else loss


_INPUTS = "Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor targets, int? memory"
_GRADIENTS = "bool of_hidden, bool of_weight, bool of_bias"  # which are asked for


def _read(linear_bias, targets, memory, options):
    targets, read = operators.read_problem(targets, options)
    del read["axis"]
    return targets, read | {"linear_bias": as_given(linear_bias), "memory": memory}


@operators.operator(
    "linear_cross_entropy",
    f"{_INPUTS}, {_GRADIENTS}, bool return_lse",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(hidden, linear_weight, linear_bias, targets, memory, of_hidden, of_weight, of_bias, return_lse, *options):
    """Loss, lse and the gradients of hidden, linear_weight and linear_bias; what is not asked for is empty."""
    wanted, read = _read(linear_bias, targets, memory, options)
    arguments, read["return_lse"] = (as_given(hidden), as_given(linear_weight), wanted), return_lse
    if of_hidden or of_weight or of_bias:
        read["wanted"] = of_hidden, of_weight, of_bias
        *found, dhidden, dweight, dbias = fastxent.linear_cross_entropy_with_grad(*arguments, **read)
    else:
        found, (dhidden, dweight, dbias) = fastxent.linear_cross_entropy(*arguments, **read), (None, None, None)
        found = found if return_lse else (found,)
    lse = found[1] if return_lse else None
    return as_tensor(found[0]), *(
        hidden.new_empty(0) if values is None else as_tensor(values) for values in (lse, dhidden, dweight, dbias)
    )


@_forward.register_fake
def _(hidden, linear_weight, linear_bias, targets, memory, of_hidden, of_weight, of_bias, return_lse, *options):
    layer = [hidden, linear_weight, linear_bias]
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in layer)
    real, batch = torch.float64 if wide else loss_dtype(hidden.dtype), hidden.shape[:-1]
    reduction = operators.named(options)["reduction"]
    loss = hidden.new_empty(batch if reduction == "none" else (), dtype=real)
    lse = hidden.new_empty(batch, dtype=real) if return_lse else hidden.new_empty(0)
    wanted = of_hidden, of_weight, of_bias
    return loss, lse, *(_like(*each, hidden) for each in zip(layer, wanted, strict=True))


@operators.operator(
    "linear_cross_entropy_gradients", f"{_INPUTS}, {_GRADIENTS}, Tensor grad_output", "(Tensor, Tensor, Tensor)"
)
def _gradients(
    hidden, linear_weight, linear_bias, targets, memory, of_hidden, of_weight, of_bias, grad_output, *options
):
    """The gradients of hidden, linear_weight and linear_bias; what is not asked for is empty."""
    wanted, read = _read(linear_bias, targets, memory, options)
    read |= {"grad_output": as_given(grad_output.contiguous()), "wanted": (of_hidden, of_weight, of_bias)}
    _, *found = fastxent.linear_cross_entropy_with_grad(as_given(hidden), as_given(linear_weight), wanted, **read)
    return tuple(hidden.new_empty(0) if values is None else as_tensor(values) for values in found)


@_gradients.register_fake
def _(hidden, linear_weight, linear_bias, targets, memory, of_hidden, of_weight, of_bias, *_):
    layer, wanted = (hidden, linear_weight, linear_bias), (of_hidden, of_weight, of_bias)
    return tuple(_like(*each, hidden) for each in zip(layer, wanted, strict=True))


def _like(tensor, wanted, hidden):
    """An empty gradient of a tensor or None."""
    if tensor is None or not wanted:
        return hidden.new_empty(0)
    dtype = torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    # torch would else make zeros of their size
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    (ctx.memory, *ctx.computed), options = inputs[4:8], inputs[9:]
    ctx.options = tuple(options[operators.TENSORS :])
    ctx.save_for_backward(*inputs[:4], *options[: operators.TENSORS], *(output[2:] if any(ctx.computed) else ()))


def _backward(ctx, grad_output, *_):
    others = 6 + len(operators.OPTIONS)
    if grad_output is None:
        return (None,) * (3 + others)
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_cross_entropy has no second derivative: take cross_entropy of torch.nn.functional.linear"
        )
    saved = ctx.saved_tensors  # once: a checkpoint unpacks them no second time
    inputs, tensors, kept = saved[:4], saved[4 : 4 + operators.TENSORS], saved[4 + operators.TENSORS :]
    asked = ctx.needs_input_grad[:3]
    if not all(computed or not one for computed, one in zip(ctx.computed, asked, strict=True)):
        found = operators.run(_gradients, *inputs, ctx.memory, *asked, grad_output, *tensors, *ctx.options)
    elif unwatched(grad_output, *kept):
        # from now on the caller's, who may write to them; no write to what was saved, which nobody reads again
        ctx.computed, found = [False] * 3, [gradient.data for gradient in kept]
        if not grad_output.is_cpu or grad_output.item() != 1.0:
            found = [gradient.mul_(grad_output) for gradient in found]
    else:
        found = [gradient * grad_output for gradient in kept]
    return *(gradient if one else None for gradient, one in zip(found, asked, strict=True)), *[None] * others


_forward.register_autograd(_backward, setup_context=_keep)
