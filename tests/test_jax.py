"""The bridge to JAX: the numbers of the functions on arrays, under every transformation, and JAX's own checks."""

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs jax: pip install fastxent[peers]")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import fastxent  # noqa: E402
import fastxent.jax as ours  # noqa: E402
from fastxent.backends.cuda import dlpack  # noqa: E402
from fastxent.jax import calls  # noqa: E402
from tests import reference  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = (
    {},
    {"weight": np.linspace(0, 2, 9, dtype=np.float32), "label_smoothing": 0.1, "ignore_index": 3},
    {"z_loss": 0.01, "softcap": 4.0, "temperature": 0.7, "sample_weight": np.linspace(0.5, 2, 6, dtype=np.float32)},
)


def problem(dtype="float32"):
    rng = np.random.default_rng(0)
    return jnp.asarray(3 * rng.standard_normal((6, 9)), dtype), jnp.asarray(rng.integers(0, 9, 6))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_the_bits_of_the_functions_on_arrays(kind, dtype, reduction):
    logits, targets = problem(dtype)
    if kind == "dense":
        targets = jax.nn.softmax(problem()[0][::-1])
    for options in OPTIONS:
        options = options | {"reduction": reduction} | ({"ignore_index": -100} if kind == "dense" else {})
        upstream = jnp.linspace(-1, 2, 6) if reduction == "none" else jnp.float32(2.5)
        loss, pull = jax.vjp(jax.jit(lambda x: ours.cross_entropy(x, targets, **options)), logits)  # noqa: B023
        want = fastxent.cross_entropy_with_grad(
            np.asarray(logits), np.asarray(targets), grad_output=np.asarray(upstream), **options
        )
        (gradient,) = pull(upstream)
        assert (loss.dtype, gradient.dtype) == (want[0].dtype, want[1].dtype)
        np.testing.assert_array_equal(loss, want[0])
        np.testing.assert_array_equal(np.asarray(gradient), want[1])


def test_confident_rows_go_on_learning():
    optax = pytest.importorskip("optax", reason="needs optax: pip install fastxent[peers]")
    logits, targets = jnp.array([[30.0, 0.0]]), jnp.array([0])
    loss, gradient = jax.value_and_grad(ours.cross_entropy)(logits, targets)
    assert loss == pytest.approx(np.log1p(np.exp(-30.0)), rel=5e-7)
    assert gradient[0, 0] == pytest.approx(-np.exp(-30.0), rel=1e-6)
    assert optax.softmax_cross_entropy_with_integer_labels(logits, targets)[0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "int32"])
def test_where_an_array_lies_by_its_capsule(dtype):
    """As those on a GPU are read; here one of the host's."""
    array = jnp.arange(12).reshape(3, 4).astype(dtype)

    class OfADevice:
        def __dlpack__(self, *, stream):
            return array.__dlpack__()

    found = dlpack.Borrowed(OfADevice())
    assert (found.address, found.shape, found.dtype) == (array.unsafe_buffer_pointer(), (3, 4), array.dtype)
    assert found.steps == (4 * array.dtype.itemsize, array.dtype.itemsize)


def test_axes_and_shapes():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3, 4)), jnp.float32)
    targets = jnp.zeros((2, 3, 4), int)
    want = fastxent.cross_entropy(np.asarray(logits), np.asarray(targets), axis=1, reduction="none")
    for axis in (1, -3):
        np.testing.assert_array_equal(ours.cross_entropy(logits, targets, axis=axis, reduction="none"), want)
    assert ours.cross_entropy(jnp.zeros((0, 3)), jnp.zeros(0, int), reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap(reduction):
    logits, targets = jnp.stack([problem()[0]] * 3) * jnp.arange(1.0, 4)[:, None, None], problem()[1]

    def loss(x, t):
        return ours.cross_entropy(x, t, reduction=reduction)

    got = jax.jit(jax.vmap(loss, in_axes=(0, None)))(logits, targets)
    np.testing.assert_array_equal(got, np.stack([loss(x, targets) for x in logits]))
    gradients = jax.vmap(jax.grad(lambda x: loss(x, targets).sum()))(logits)
    np.testing.assert_array_equal(gradients, np.stack([jax.grad(lambda x: loss(x, targets).sum())(x) for x in logits]))


def test_log_softmax_and_logsumexp():
    logits, _ = problem()
    array = np.asarray(logits)
    for axis in (0, 1, -1):
        np.testing.assert_array_equal(ours.log_softmax(logits, axis), fastxent.log_softmax(array, axis=axis))
        np.testing.assert_array_equal(ours.logsumexp(logits, axis), fastxent.logsumexp(array, axis=axis))
        for mine, theirs in (
            (ours.log_softmax, jax.nn.log_softmax),
            (ours.logsumexp, jax.scipy.special.logsumexp),
        ):
            got, want = (
                jax.grad(lambda x: jnp.cos(function(x, axis)).sum())(logits)  # noqa: B023
                for function in (mine, theirs)
            )
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("margin", [5, 20, 80])
def test_log_softmax_of_a_confident_row_has_its_gradient(margin):
    logits = jnp.array([0.0, float(margin)])
    got = jax.jit(jax.grad(lambda x: ours.log_softmax(x)[1]))(logits)
    p = math.exp(-margin) / (1 + math.exp(-margin))
    np.testing.assert_allclose(got, [-p, p], rtol=3e-7)


CHECKS = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)  # in this process alone
import fastxent.jax as ours
from jax.test_util import check_grads
rng = np.random.default_rng(0)
logits, indices = rng.standard_normal((3, 5)), np.array([0, 1, 4])
probabilities = rng.random((3, 5))
weight, sample_weight = np.linspace(0, 2, 5), np.linspace(0.5, 1, 3)
for reduction in ("mean", "sum", "none"):
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0, "temperature": 0.7, "reduction": reduction}
    options |= {"weight": weight, "sample_weight": sample_weight}
    check_grads(lambda x: ours.cross_entropy(x, indices, **options), (logits,), order=2, modes=["rev"])
    check_grads(lambda x: ours.cross_entropy(x, probabilities, **options), (logits,), order=2, modes=["rev"])
    check_grads(lambda q: ours.cross_entropy(logits, q, **options), (probabilities,), order=1, modes=["rev"])
    check_grads(lambda q: ours.cross_entropy(logits.T, q.T, axis=0, **options), (probabilities,), 1, modes=["rev"])
check_grads(lambda x: ours.log_softmax(x, 0), (logits,), order=2, modes=["rev"])
check_grads(lambda x: ours.logsumexp(x), (logits,), order=2, modes=["rev"])
assert ours.cross_entropy(jnp.asarray(logits), indices).dtype == jnp.float64
print("checked")
"""


def test_jaxs_own_checks_in_float64():
    done = subprocess.run([sys.executable, "-c", CHECKS], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr


def test_jaxs_own_checks_in_float32():
    logits, targets = problem()
    check_grads(lambda x: ours.cross_entropy(x, targets, label_smoothing=0.1), (logits,), order=2, modes=["rev"])
    assert not jax.config.jax_enable_x64


def test_weights_have_no_gradient_and_say_so():
    logits, targets = problem()
    gradient = jax.grad(lambda w: ours.cross_entropy(logits, targets, weight=w))(jnp.ones(9))
    assert jnp.isnan(gradient).all()


def test_a_half_mean_has_the_derivative_of_its_scale():
    """Which is made of entries that a half would round to 0."""
    logits, targets = problem("float16")
    v = jnp.asarray(np.random.default_rng(1).random((6, 9)), jnp.float16)

    def loss(x, scale):
        return ours.cross_entropy(x, targets, denominator=2.0**26) * scale

    def along(scale):
        return (jax.grad(loss)(logits, scale) * v).astype(jnp.float32).sum()

    each = jax.grad(loss)(logits.astype(jnp.float32), 1.0)
    assert float(jax.grad(along)(2.0**26)) == pytest.approx(float((each * v).sum()), rel=1e-3)


def test_errors_carry_their_message():
    logits, targets = problem()
    with pytest.raises(TypeError, match=r"targets must be an array, not a tuple; fastxent itself takes \(ids"):
        ours.cross_entropy(logits, (targets[:, None], jnp.ones((6, 1))))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"IndexError: targets must lie in \[0, 8\]"):
        jax.block_until_ready(jax.jit(ours.cross_entropy)(logits, targets + 9))
    with pytest.raises(jax.errors.JaxRuntimeError, match="reduction must be one of"):
        jax.block_until_ready(ours.cross_entropy(logits, targets, reduction="avg"))
    assert jnp.isfinite(ours.cross_entropy(logits, targets))


def test_an_axis_out_of_range_is_one_clear_error():
    logits, targets = problem()
    for call in (
        lambda: ours.cross_entropy(logits, targets, axis=2),
        lambda: ours.log_softmax(logits, -3),
        lambda: ours.logsumexp(logits, 2),
    ):
        with pytest.raises(ValueError, match=r"axis must lie in \[-2, 1\] for logits of shape \(6, 9\)"):
            call()


def test_options_may_be_numpys_numbers():
    logits, targets = problem()
    options = {"temperature": 0.5, "label_smoothing": 0.25, "ignore_index": 3, "axis": -1}
    given = {
        name: np.float32(value) if isinstance(value, float) else np.int64(value) for name, value in options.items()
    }
    got, want = (jax.value_and_grad(ours.cross_entropy)(logits, targets, **one) for one in (given, options))
    assert got[0] == want[0]
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(ours.log_softmax(logits, np.int64(0)), ours.log_softmax(logits, 0))
    with pytest.raises(TypeError, match="options must be numbers or names, not builtin_function_or_method"):
        ours.log_softmax(logits, -1, {}.copy)  # hashable, and nothing JSON knows


def test_what_counts_nothing_has_no_gradient():
    """A share of 0 times an infinite gap, and a row that is not read, are 0."""
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [jnp.nan, 0.0, 0.0], [0.0, 1.0, 2.0]])
    targets, rows = jnp.full((3, 3), 1 / 3), jnp.array([1.0, 0.0, 2.0])

    def gradient(**options):
        return jax.grad(lambda q: ours.cross_entropy(logits, q, sample_weight=rows, **options))(targets)

    assert not gradient(label_smoothing=1.0).any()
    found = gradient(weight=jnp.array([1.0, 0.0, 1.0]))
    want = -jax.nn.log_softmax(logits) * rows[:, None] / 3
    np.testing.assert_array_equal(found[1], np.zeros(3))
    np.testing.assert_array_equal(found[:, 1], np.zeros(3))
    np.testing.assert_allclose(found[::2, ::2], want[::2, ::2], rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_gradients_asked_for_are_computed(compiled, monkeypatch):
    logits, _ = problem()
    targets, run = jax.nn.softmax(problem()[0][::-1]), []
    original = calls.call
    monkeypatch.setattr(calls, "call", lambda name, *rest: run.append(name) or original(name, *rest))
    for argnums, wanted in ((0, {"loss", "gradient"}), (1, {"loss", "log_probs"}), ((0, 1), None)):
        run.clear()
        function = jax.grad(lambda x, q: ours.cross_entropy(x, q), argnums)
        jax.block_until_ready((jax.jit(function) if compiled else function)(logits, targets))
        assert set(run) == (wanted or {"loss", "gradient", "log_probs"})


def test_options_are_those_of_the_loss():
    public, mine = (list(inspect.signature(module.cross_entropy).parameters) for module in (fastxent, ours))
    assert set(mine) == set(public) - {"return_lse", "check"}


def test_the_reference_lists_every_function():
    for line in reference.lines(ours):
        assert line in reference.PAGE


def test_training_step_in_one_program():
    """Descent through jit: the loss of a linear model falls as with optax's loss."""
    optax = pytest.importorskip("optax", reason="needs optax: pip install fastxent[peers]")
    rng = np.random.default_rng(0)
    inputs, labels = jnp.asarray(rng.standard_normal((64, 20)), jnp.float32), jnp.asarray(rng.integers(0, 5, 64))

    def run(loss_of):
        step = jax.jit(jax.value_and_grad(lambda w: loss_of(inputs @ w)))
        weights, losses = jnp.zeros((20, 5)), []
        for _ in range(30):
            loss, gradient = step(weights)
            weights, losses = weights - 0.5 * gradient, [*losses, float(loss)]
        return losses

    mine = run(lambda x: ours.cross_entropy(x, labels))
    theirs = run(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels).mean())
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert mine[-1] < 0.7 * mine[0]
