"""The loss of logits whose classes are spread over the processes of a torch process group."""

from typing import Any

import numpy as np
import torch
from torch import distributed

from fastxent import shards
from fastxent.state import FIELDS, LseState
from fastxent.torch.arrays import as_array, as_tensor, new_gradient
from fastxent.torch.operators import check_inputs, refuse_gradients


def class_parallel_cross_entropy(
    input: torch.Tensor,  # noqa: A002
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    group: distributed.ProcessGroup | None = None,
    **options: Any,
) -> torch.Tensor:
    """`cross_entropy` where every process of a group holds the logits of all rows for some of the classes.

    The classes of the first process are the first, and so on. What a process knows of its classes, 72 bytes a row
    (`fastxent.LseState`), is gathered once in the forward pass; the backward pass needs no message. All processes call
    it together, with the same targets and options, and get the same loss to the last bit; each gets the gradient of its
    own logits, with the digits that the whole row would have given it.

    Parameters
    ----------
    input : Tensor of bfloat16, float16, float8, float32 or float64, shape (..., C of this process)
        On the CPU; the classes are the last axis.
    target : Tensor of integers, shape (...)
        Class indices among all classes, or ``ignore_index``.
    weight : Tensor, shape (C of all processes,), optional
    group : ProcessGroup, optional
        By default the one of all processes; a backend that takes tensors of the CPU, such as gloo.
    **options
        ignore_index, label_smoothing, z_loss, softcap, temperature, sample_weight, reduction, denominator and backend,
        as for `cross_entropy`.

    Returns
    -------
    loss : Tensor of float64

    Raises
    ------
    IndexError, TypeError, ValueError
        As `fastxent.shards.accumulate`; a TypeError for ``return_lse``, which is not among the options. One process's
        error is a RuntimeError of the others, but for those of arguments that all have alike: options, what is no
        tensor.
    NotImplementedError
        If a tensor is not on the CPU, ``weight`` or ``sample_weight`` requires grad, or for a second derivative.

    Examples
    --------
    One process is a group too; of several each would pass its own ``rank`` and a store that they share:

    >>> import torch, fastxent.torch
    >>> from torch import distributed
    >>> distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    >>> logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    >>> loss = fastxent.torch.class_parallel_cross_entropy(logits, torch.tensor([0]))
    >>> loss.backward()
    >>> logits.grad.tolist()
    [[-2.06115369216775e-09, 2.06115369216775e-09]]
    >>> distributed.destroy_process_group()
    """
    if "return_lse" in options:
        raise TypeError("return_lse goes with cross_entropy, not with class_parallel_cross_entropy")
    check_inputs(input=input, target=target)
    refuse_gradients(weight=weight, sample_weight=options.get("sample_weight"))
    options = {name: as_array(value) if torch.is_tensor(value) else value for name, value in options.items()}
    options["weight"] = as_array(weight)
    backend = {"backend": options.pop("backend", None)}
    rows, counts = _gathered(np.array([target.numel(), input.shape[-1]]), group).T
    if (rows != rows[0]).any():
        raise ValueError(f"every process must have the same rows; they have {', '.join(map(str, rows))}")
    before = int(counts[: distributed.get_rank(group)].sum())
    place: dict[str, Any] = {"vocab_start": before, "classes": int(counts.sum())}
    mine, error = _state(input, target, place | options | backend)
    # the last row says whether a process has one: all wait for the states of all
    columns = np.vstack([mine.columns, np.full(len(FIELDS), error is not None)])
    found = _gathered(columns, group)
    if error is not None:
        raise error
    failed = np.flatnonzero(found[:, -1].any(axis=1))
    if failed.size:
        raise RuntimeError(f"another process of the group raised an error, which says why: rank {failed[0]}")
    state = LseState.empty(len(mine), mine.softcap, mine.temperature)
    for columns in found[:, :-1]:
        state = state.merge(LseState.unpack(columns, mine.softcap, mine.temperature))
    return _Loss.apply(input, target, state, place, options, backend)


def _state(logits, target, read):
    """What this process knows, and None; or an empty state and the error it met."""
    try:
        return shards.accumulate(as_array(logits), as_array(target), **read), None
    except Exception as error:
        return LseState.empty(target.numel()), error


def _gathered(array, group):
    """The arrays of all processes, of one shape, in their order."""
    mine = torch.from_numpy(array)
    found = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, mine, group)
    return torch.stack(found).numpy()


class _Loss(torch.autograd.Function):
    """From the state of all classes to the loss, and back to the gradient of some."""

    @staticmethod
    def forward(ctx, logits, target, state, place, options, backend):
        ctx.save_for_backward(logits, target)
        ctx.problem = state, place, options, backend
        loss = shards.finalize(state, as_array(target), classes=place["classes"], **options)
        return as_tensor(np.asarray(loss))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (logits, target), (state, place, options, backend) = ctx.saved_tensors, ctx.problem
        dlogits, read = new_gradient(logits), place | options | backend
        read |= {"grad_output": as_array(grad_output), "out": as_array(dlogits)}
        shards.gradient(as_array(logits), as_array(target), state, **read)
        return dlogits, *[None] * 5
