"""Tensors as NumPy arrays over the same memory, and back: the only place where a tensor's device and dtype matter."""

import ml_dtypes
import numpy as np
import torch

# what NumPy has no name for is taken by its bits
_BITS = {
    torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
_OF_BITS = {np.dtype(dtype): (f"u{bits.itemsize}", kind) for kind, (bits, dtype) in _BITS.items()}

_LARGE = 1 << 22  # bytes from which NumPy asks for huge pages


def as_array(tensor):
    """A tensor as an array over its memory, whatever its strides; None stays None.

    Raises
    ------
    NotImplementedError
        If it is not on the CPU.
    """
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise NotImplementedError(
            f"tensors must be on the CPU, not on {tensor.device}: cross_entropy, linear_cross_entropy, "
            "log_softmax and score alone take those of a device, of CUDA; move them with .cpu()"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        tensor = tensor.detach()
    if tensor.dtype not in _BITS:
        return tensor.numpy()
    bits, dtype = _BITS[tensor.dtype]
    return tensor.view(bits).numpy().view(dtype)


def as_given(tensor):
    """What takes arrays of a device is given: a tensor of a CUDA device itself, any other as `as_array`."""
    return tensor.detach() if tensor is not None and tensor.is_cuda else as_array(tensor)


def as_tensor(values):
    """A NumPy array, or a scalar, as a tensor over its memory; a tensor as it is."""
    if isinstance(values, torch.Tensor):
        return values
    array = np.asarray(values)
    if array.dtype not in _OF_BITS:
        return torch.from_numpy(array)
    bits, kind = _OF_BITS[array.dtype]
    return torch.from_numpy(array.view(bits)).view(kind)


def loss_dtype(dtype):
    """What losses of logits of this torch dtype have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_like(logits, device=None):
    """An empty tensor for the gradient of ``logits``: their shape, strides and dtype, float32 for float8."""
    dtype = torch.float32 if logits.dtype.itemsize == 1 else logits.dtype
    return torch.empty_like(logits, dtype=dtype, device=device)


def new_gradient(logits):
    """`gradient_like` with memory behind it, where it is large that of the last gradient like it that nobody holds.

    Else it is from NumPy, which asks for huge pages as torch does not. New memory costs more than the loss: the system
    clears its pages one by one, at every step of a training.
    """
    if logits.nbytes < _LARGE or not logits.is_cpu:
        return gradient_like(logits)
    like = gradient_like(logits, "meta")
    memory = torch.from_numpy(np.asarray(_Room(like.nbytes))).untyped_storage()
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(memory, 0, like.shape, like.stride())


_rooms: list[np.ndarray] = []  # at most one, that of the last gradient given back


class _Room:
    """Memory of a tensor, kept for the next of its size, or of half of it and more, once the tensor and all that shares
    its memory are gone.
    """

    def __init__(self, size):
        try:
            kept = _rooms.pop()
        except IndexError:
            kept = None
        if kept is None or not size <= kept.nbytes <= 2 * size:
            del kept  # before there is more
            kept = np.empty(size, np.uint8)
        self._memory = kept
        self.__array_interface__ = kept[:size].__array_interface__

    def __del__(self):
        _rooms[:] = [self._memory]


def release_memory() -> None:
    """Give the memory of the last large gradient back to the system; else the next of its size takes it.

    Examples
    --------
    >>> import fastxent.torch
    >>> fastxent.torch.release_memory()
    """
    _rooms.clear()


_PLAIN = torch.Tensor, torch.nn.Parameter


def plain(tensor):
    """Whether this is a tensor with numbers in it, and not what a transform or a tracer puts in its place."""
    known = type(tensor) in _PLAIN and (tensor.is_cpu or tensor.is_cuda)
    if not known or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not torch._C._functorch.is_legacy_batchedtensor(tensor)  # of torch.autograd.grad with is_grads_batched


def unwatched(*tensors):
    """Whether all are `plain`, and nothing of torch's wants to see what is done with them: no compiler, no tracer, no
    transform, no mode.
    """
    return (
        not torch.compiler.is_compiling()
        and all(map(plain, tensors))
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
    )
