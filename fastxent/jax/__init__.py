"""fastxent for JAX on the CPU: losses that jit, grad and vmap take, with every digit of a confident row.

Imported by nobody inside; needs `pip install fastxent[jax]`. Float64 is JAX's own choice (``jax_enable_x64``).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import fastxent
from fastxent import checks
from fastxent.jax import calls

__all__ = ["cross_entropy", "log_softmax", "logsumexp"]


def cross_entropy(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    sample_weight: Any = None,
    reduction: str = "mean",
    denominator: float | None = None,
    axis: int = -1,
    backend: str | None = None,
) -> jax.Array:
    """`fastxent.cross_entropy` for JAX: under jit, grad, of grad too, and vmap.

    The backward pass computes the gradient from the logits and the upstream gradient, which scales before anything is
    rounded, in one read and one write.

    Parameters
    ----------
    logits : array of bfloat16, float16, float8, float32 or float64, shape (..., V)
    targets : array of integers, shape (...), or of floats, shape (..., V)
        Class indices, or ``ignore_index``; or probabilities, which have a gradient too, but for second derivatives.
    weight, sample_weight : array, optional
        Of classes and of rows. Asked for their gradient, NaN: there is none here.
    ignore_index, label_smoothing, z_loss, softcap, temperature, reduction, denominator, axis, backend
        As for `fastxent.cross_entropy`; numbers of Python or NumPy, fixed when a function is traced.

    Returns
    -------
    loss : Array of float32, float64 for float64 logits; scalar, or for "none" of shape (...)

    Raises
    ------
    TypeError, ValueError
        If the logits' dtype or shape or the axis is wrong, or an option is not a number or a name.
    jax.errors.JaxRuntimeError
        With the message of `fastxent.cross_entropy`, for bad targets or arguments: they are seen when the program runs.

    Examples
    --------
    >>> import jax, fastxent.jax
    >>> loss = jax.jit(jax.value_and_grad(fastxent.jax.cross_entropy))
    >>> loss(jax.numpy.array([[20.0, 0.0]]), jax.numpy.array([0]))
    (Array(2.0611537e-09, dtype=float32), Array([[-2.0611537e-09,  2.0611537e-09]], dtype=float32))
    """
    if isinstance(targets, tuple):
        raise TypeError("targets must be an array, not a tuple; fastxent itself takes (ids, probabilities)")
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    checks.check_logits(logits.shape, logits.dtype, axis)
    options = _Options(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        axis=axis if axis < 0 else axis - logits.ndim,
        backend=backend,
    )
    return _loss(options, logits, targets, {"weight": weight, "sample_weight": sample_weight})


class _Options(dict):
    """Options that JAX may take as fixed: they hash by what they hold."""

    def __hash__(self):  # type: ignore[override]
        return hash(tuple(self.items()))


def _real(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _gradient_of(logits):
    dtype = jnp.float32 if logits.dtype.itemsize == 1 else logits.dtype
    return jax.ShapeDtypeStruct(logits.shape, dtype)


def _call(name, result, arrays, weights, options):
    given = {name: jnp.asarray(values) for name, values in weights.items() if values is not None}
    options = options | {"arrays": list(given)}
    return calls.call(name, result, (*arrays, *given.values()), options)


def _given(inputs, count, options):
    """Positional arrays, and the weights among the options."""
    names = options.pop("arrays")
    return inputs[:count], options | dict(zip(names, inputs[count:], strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options, logits, targets, weights):
    batch = list(logits.shape)
    del batch[options["axis"]]
    shape = tuple(batch) if options["reduction"] == "none" else ()
    return _call("loss", jax.ShapeDtypeStruct(shape, _real(logits.dtype)), (logits, targets), weights, options)


@calls.verb
def loss(inputs, outputs, options):
    """logits, targets -> losses."""
    arrays, read = _given(inputs, 2, options)
    outputs[0][...] = fastxent.cross_entropy(*arrays, **read)


def _loss_forward(options, *inputs):
    values, asked = ([getattr(leaf, name) for leaf in jax.tree.leaves(inputs)] for name in ("value", "perturbed"))
    logits, targets, weights = jax.tree.unflatten(jax.tree.structure(inputs), values)
    # whose gradient is asked for is known when a function is traced, so it travels in the structure of what is kept
    kept = (logits, targets, weights, *(() if one else None for one in asked[:2]))
    return _loss(options, logits, targets, weights), kept


def _loss_backward(options, kept, g):
    logits, targets, weights, of_logits, of_targets = kept
    dlogits = dtargets = None
    if of_logits is not None:
        dlogits = _gradient(options, logits, targets, weights, g).astype(logits.dtype)
    if of_targets is not None and _dense(targets):
        dtargets = _gradient_of_targets(options, logits, targets, weights, g)
    return dlogits, dtargets, _unknown(weights)


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _dense(targets):
    return jnp.issubdtype(targets.dtype, jnp.floating)


def _unknown(tree):
    """NaN for what has no gradient here, so that nobody takes a zero for one."""
    return jax.tree.map(lambda values: jnp.full_like(values, jnp.nan), tree)


def _gradient_of_targets(options, logits, targets, weights, g):
    """(1 - e) w_k (lse - z_k) of each row, times its upstream gradient; 0 for what counts nothing."""
    axis, softcap, smoothing = options["axis"], options["softcap"], options["label_smoothing"]
    weight, sample_weight = weights["weight"], weights["sample_weight"]
    z = logits.astype(_real(logits.dtype))
    z = (z if softcap is None else softcap * jnp.tanh(z / softcap)) / options["temperature"]
    each = jnp.ones(z.sum(axis).shape) if sample_weight is None else jnp.asarray(sample_weight)
    upstream = g * each
    if options["reduction"] == "mean":
        upstream = upstream / (each.sum() if options["denominator"] is None else options["denominator"])
    weight = 1.0 if weight is None else jnp.expand_dims(jnp.asarray(weight), tuple(range(1, -axis)))
    share = (1.0 - smoothing) * weight * jnp.expand_dims(upstream, axis)
    counts = (smoothing < 1.0) & (weight > 0.0) & jnp.expand_dims(each > 0.0, axis)
    return jnp.where(counts, -share * log_softmax(z, axis, options["backend"]), 0.0).astype(targets.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(options, logits, targets, weights, g):
    return _call("gradient", _gradient_of(logits), (logits, targets, g), weights, options)


@calls.verb
def gradient(inputs, outputs, options):
    """logits, targets, upstream gradient -> gradient."""
    (logits, targets, g), read = _given(inputs, 3, options)
    fastxent.cross_entropy_grad(logits, targets, grad_output=g, out=outputs[0], **read)


def _gradient_forward(options, logits, targets, weights, g):
    return _gradient(options, logits, targets, weights, g), (logits, targets, weights, g)


def _gradient_backward(options, kept, v):
    logits, targets, weights, g = kept
    product = _call("hvp", _gradient_of(logits), (logits, targets, g, v), weights, options).astype(logits.dtype)
    wide = logits.astype(_real(logits.dtype))  # of a half mean the gradient is too small for a half
    along = (v * _gradient(options, wide, targets, weights, jnp.ones_like(g))).sum(options["axis"], dtype=g.dtype)
    dg = along if g.ndim else along.sum()
    return product, _unknown(targets) if _dense(targets) else None, _unknown(weights), dg


@calls.verb
def hvp(inputs, outputs, options):
    """logits, targets, upstream gradient, v -> the Hessian times v."""
    (logits, targets, g, v), read = _given(inputs, 4, options)
    fastxent.cross_entropy_hvp(logits, targets, v, grad_output=g, out=outputs[0], **read)


_gradient.defvjp(_gradient_forward, _gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def log_softmax(logits: Any, axis: int = -1, backend: str | None = None) -> jax.Array:
    """`fastxent.log_softmax` for JAX: log-probabilities along ``axis``, none of which rounds to 0 for want of digits.

    Its derivative, g - p sum(g), keeps the digits of a confident row too.

    Parameters
    ----------
    logits : array of bfloat16, float16, float8, float32 or float64
    axis : int
        Where the classes are.
    backend : str, optional
        As for `fastxent.cross_entropy`.

    Returns
    -------
    Array of the logits' shape and dtype, float32 for float8

    Raises
    ------
    TypeError, ValueError
        If the logits' dtype or shape or the axis is wrong.
    jax.errors.JaxRuntimeError
        When the program runs, if the backend is unknown or cannot run here.

    Examples
    --------
    >>> import jax, fastxent.jax
    >>> fastxent.jax.log_softmax(jax.numpy.array([20.0, 0.0]))
    Array([-2.0611537e-09, -2.0000000e+01], dtype=float32)
    """
    logits = jnp.asarray(logits)
    checks.check_logits(logits.shape, logits.dtype, axis)
    options = {"axis": axis if axis < 0 else axis - logits.ndim, "backend": backend}
    return calls.call("log_probs", _gradient_of(logits), (logits,), options)


@calls.verb
def log_probs(inputs, outputs, options):
    """logits -> log-probabilities."""
    fastxent.log_softmax(inputs[0], out=outputs[0], **options)


def _log_softmax_forward(logits, axis, backend):
    found = log_softmax(logits, axis, backend)
    return found, (found, logits)


def _log_softmax_backward(axis, _, kept, g):
    found, logits = kept
    log_p, g = found.astype(_real(found.dtype)), g.astype(_real(g.dtype))
    others = g.sum(axis, keepdims=True) - g
    return ((-g * jnp.expm1(log_p) - jnp.exp(log_p) * others).astype(logits.dtype),)


log_softmax.defvjp(_log_softmax_forward, _log_softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def logsumexp(logits: Any, axis: int = -1, backend: str | None = None) -> jax.Array:
    """`fastxent.logsumexp` for JAX, along one axis: its gradient is the softmax.

    Parameters
    ----------
    logits, axis, backend
        As for `log_softmax`.

    Returns
    -------
    Array of float32, float64 for float64 logits

    Raises
    ------
    TypeError, ValueError, jax.errors.JaxRuntimeError
        As `log_softmax`.

    Examples
    --------
    >>> import jax, fastxent.jax
    >>> fastxent.jax.logsumexp(jax.numpy.zeros((2, 4)))
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    logits = jnp.asarray(logits)
    checks.check_logits(logits.shape, logits.dtype, axis)
    shape = list(logits.shape)
    del shape[axis]
    options = {"axis": axis if axis < 0 else axis - logits.ndim, "backend": backend}
    return calls.call("lse", jax.ShapeDtypeStruct(tuple(shape), _real(logits.dtype)), (logits,), options)


@calls.verb
def lse(inputs, outputs, options):
    """logits -> logsumexp."""
    outputs[0][...] = fastxent.logsumexp(inputs[0], **options)


def _logsumexp_forward(logits, axis, backend):
    return logsumexp(logits, axis, backend), logits


def _logsumexp_backward(axis, backend, logits, g):
    p = jnp.exp(log_softmax(logits.astype(g.dtype), axis, backend))
    return ((p * jnp.expand_dims(g, axis)).astype(logits.dtype),)


logsumexp.defvjp(_logsumexp_forward, _logsumexp_backward)
