"""Losses with torch's own signatures; what torch takes means what it means there, and our options come after it."""

from typing import Any

import torch
from torch.nn import _reduction

from fastxent import checks
from fastxent.torch import binary, operators
from fastxent.torch.arrays import as_array, loss_dtype, plain


def cross_entropy(
    input: torch.Tensor,  # noqa: A002
    target: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | None = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: torch.Tensor | None = None,
    denominator: float | None = None,
    axis: int | None = None,
    return_lse: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Any:
    r"""`torch.nn.functional.cross_entropy`, with every digit of a confident row and the options of this package.

    The gradient is computed with the loss, in one pass, and kept for the backward pass. Where the upstream gradient
    is not 1, or may well not be (reduction "none", float16, a compiled graph, a checkpoint, or since that of the last
    loss was not), it is computed there from the logits: that scales before it is rounded, so loss scaling saves the
    small gradients of a float16 mean. May be differentiated twice.

    Parameters
    ----------
    input : Tensor of bfloat16, float16, float8, float32 or float64, shape (C,), (N, C) or (N, C, d1, ...)
        Logits; on the CPU read where they lie, whatever their strides. On a CUDA device, where this has not been run
        yet, targets are there too, class indices or probabilities of all classes; nothing waits for the device.
    target : Tensor of integers, shape (), (N,) or (N, d1, ...); of floats, of the input's shape; or a tuple
        Class indices, probabilities, or those of k classes a row, ``(ids, probabilities)``, both (..., k).
        Probabilities of all classes may require grad; those of a tuple may not.
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `torch.nn.functional.cross_entropy`. ``ignore_index`` None switches it off.
    z_loss, softcap, temperature, sample_weight, denominator, backend
        As for `fastxent.cross_entropy`; ``sample_weight`` a tensor of the target's shape.
    axis : int, optional
        Where the classes are; -1 for logits (batch, time, C) of a language model.
    return_lse : bool
        Whether to return each row's logsumexp too. It carries no gradient.
    inplace_backward : bool
        Write the gradient over the logits in the backward pass, so that no second array of their size is needed. What
        else saved them for its backward pass raises torch's error about inplace operations. A parameter or a view of
        one, logits that share memory among themselves and targets that require grad are refused. A graph that is
        compiled plans its own memory, and a second derivative needs the logits: both leave them as they are.

    Returns
    -------
    loss : Tensor of float32, float64 for float64 logits; shape () or, for "none", the target's
        As torch gives under autocast: never rounded to half. With ``return_lse`` a tuple of it and the lse.

    Raises
    ------
    IndexError, TypeError, ValueError, fastxent.backends.BackendUnavailableError
        As `fastxent.cross_entropy`, always before anything is written.
    NotImplementedError
        If a tensor is on another device, or ``weight``, ``sample_weight`` or the probabilities of a tuple require grad.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    >>> loss = fastxent.torch.cross_entropy(logits, torch.tensor([0]))
    >>> loss.backward()
    >>> loss.item(), logits.grad.tolist()
    (2.06115369216775e-09, [[-2.06115369216775e-09, 2.06115369216775e-09]])
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    targets, probabilities = operators.read_target(target)
    operators.check_inputs(input=input, target=targets)
    if axis is None:
        axis = 0 if input.dim() == 1 else 1
    operators.refuse_gradients(weight=weight, sample_weight=sample_weight, probabilities=probabilities)
    learned = torch.is_grad_enabled() and targets.requires_grad
    if inplace_backward:
        _check_written_over(input, targets, probabilities, learned)
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
        axis,
        backend,
    )
    if learned:
        found = _of_learned_probabilities(input, targets, operators.named(options))
    else:
        found = operators.loss_of(input, targets, inplace_backward, return_lse, options)
    return found if return_lse else found[0]


def _check_written_over(logits, targets, probabilities, learned):
    """The gradient may take the logits' memory, or a ValueError says why not."""
    if learned:
        raise ValueError("inplace_backward needs targets that do not require grad: theirs needs the logits too")
    if torch.compiler.is_compiling() or not plain(logits) or not (torch.is_grad_enabled() and logits.requires_grad):
        return
    if any(tensor is not None and tensor.is_leaf and tensor.requires_grad for tensor in (logits, logits._base)):
        raise ValueError(
            "inplace_backward needs logits that were computed: a leaf, or a view of one, would be its own gradient"
        )
    if logits.is_cpu:
        name, array = "logits of inplace_backward", as_array(logits)
        checks.read_out(array, array, name)
        for read in (targets, probabilities):
            checks.refuse_overlap(array, as_array(read), name)


def _of_learned_probabilities(logits, target, options):
    """Loss and lse of probabilities that take a gradient themselves, made of what torch differentiates."""
    divisor = operators.divisor(logits.detach(), target.detach(), *options.values())
    axis, sample_weight, softcap = options["axis"], options["sample_weight"], options["softcap"]
    z, classes, smoothing = logits.to(loss_dtype(logits.dtype)), logits.shape[axis], options["label_smoothing"]
    weight = z.new_ones(1) if options["weight"] is None else options["weight"].to(z.dtype)
    weight = weight.reshape(-1, *[1] * (-1 - (axis if axis < 0 else axis - logits.dim())))
    unread = z.new_zeros((), dtype=torch.bool) if sample_weight is None else sample_weight == 0.0
    z = z.masked_fill(unread.unsqueeze(axis) if unread.dim() else unread, 0.0)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / options["temperature"]
    log_p, lse = log_softmax(z, axis, backend=options["backend"]), torch.logsumexp(z, axis)
    losses = z.new_zeros(())
    for share in ((1.0 - smoothing) * weight * target.to(z.dtype), smoothing / classes * weight):
        nothing = torch.isneginf(log_p) & (share == 0.0)
        losses = losses - (share * log_p.masked_fill(nothing, 0.0)).sum(axis)
    if options["z_loss"]:
        losses = losses + options["z_loss"] * lse**2
    if sample_weight is not None:
        losses = losses * sample_weight.to(z.dtype)
    losses = losses if options["reduction"] == "none" else losses.sum()
    return losses / divisor.to(z.dtype), lse.detach().masked_fill(unread, torch.nan)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with this package's `cross_entropy` behind it, and its options.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `torch.nn.CrossEntropyLoss`. ``ignore_index`` None switches it off.
    **options
        z_loss, softcap, temperature, axis, return_lse, inplace_backward and backend, as for `cross_entropy`. Those of
        one batch, sample_weight and denominator, go with the call.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> loss = fastxent.torch.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    >>> round(loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
    1.3865
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: Any,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        known = ("z_loss", "softcap", "temperature", "axis", "return_lse", "inplace_backward", "backend")
        for name in options:
            if name not in known:
                raise TypeError(f"unknown option {name!r}; the options are {', '.join(known)}")
        self.options = options

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002
        target: Any,
        *,
        sample_weight: torch.Tensor | None = None,
        denominator: float | None = None,
    ) -> Any:
        """The loss of a batch."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            denominator=denominator,
            **self.options,
        )


def binary_cross_entropy_with_logits(
    input: torch.Tensor,  # noqa: A002
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.binary_cross_entropy_with_logits`, with all digits at both ends.

    Parameters
    ----------
    input : Tensor of bfloat16, float16, float8, float32 or float64, any shape
        Logits, on the CPU.
    target : Tensor of real numbers in [0, 1], of the input's shape
        May require grad.
    weight, size_average, reduce, reduction, pos_weight
        As for `torch.nn.functional.binary_cross_entropy_with_logits`; weights are not negative.
    label_smoothing, backend
        As for `fastxent.binary_cross_entropy_with_logits`.

    Returns
    -------
    loss : Tensor of float32, float64 for float64 logits

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `cross_entropy`.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> fastxent.torch.binary_cross_entropy_with_logits(torch.tensor([-20.0]), torch.tensor([0.0])).item()
    2.06115369216775e-09
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    operators.check_inputs(input=input, target=target)
    operators.refuse_gradients(weight=weight, pos_weight=pos_weight)
    return binary.loss_of(input, target, weight, pos_weight, label_smoothing, reduction, backend)


def log_softmax(
    input: torch.Tensor,  # noqa: A002
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.log_softmax`: log-probabilities in nats, none of which rounds to 0 for want of digits.

    Its derivative, g - p sum(g), keeps the digits of a confident row too.

    Parameters
    ----------
    input : Tensor of bfloat16, float16, float8, float32 or float64
        On the CPU, or on a CUDA device, where this has not been run yet.
    dim : int
        Where the classes are. None is torch's choice, with torch's warning.
    dtype : torch.dtype, optional
        What the input becomes first.
    backend : str, optional
        A name from `fastxent.backends`.

    Returns
    -------
    Tensor of the input's shape and dtype, float32 for float8

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `cross_entropy`.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> fastxent.torch.log_softmax(torch.tensor([20.0, 0.0]), 0).tolist()
    [-2.06115369216775e-09, -20.0]
    """
    operators.check_inputs(input=input)
    if not input.dim() or not input.numel():  # no classes
        return torch.nn.functional.log_softmax(input, dim, _stacklevel + 1, dtype)
    if dim is None:
        implicit = torch.nn.functional._get_softmax_dim
        dim = implicit("log_softmax", input.dim(), _stacklevel)
    return operators.run(operators.log_softmax, input if dtype is None else input.to(dtype), dim, backend)
