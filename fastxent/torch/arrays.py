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
            f"tensors must be on the CPU, not on {tensor.device}: fastxent's public functions take no arrays of a "
            "device yet; move them with .cpu()"
        )
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype not in _BITS:
        return tensor.numpy()
    bits, dtype = _BITS[tensor.dtype]
    return tensor.view(bits).numpy().view(dtype)


def as_tensor(values):
    """A NumPy array, or a scalar, as a tensor over its memory."""
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
    """`gradient_like` with memory behind it, from NumPy where it is large: that asks for huge pages, torch does not,
    and the first touch of so many small ones takes longer than the loss.
    """
    if logits.nbytes < _LARGE:
        return gradient_like(logits)
    like = gradient_like(logits, "meta")
    memory = torch.from_numpy(np.empty(like.nbytes, np.uint8)).untyped_storage()
    return torch.empty(0, dtype=like.dtype).set_(memory, 0, like.shape, like.stride())


def plain(tensor):
    """Whether this is a tensor with numbers in it, and not what a transform or a tracer puts in its place."""
    return type(tensor) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
