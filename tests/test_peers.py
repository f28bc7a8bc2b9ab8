"""The same numbers as other libraries; each test needs its library, all of them in the ``peers`` extra."""

import itertools

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import Case

OPTIONS = [
    {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "weight": weight,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
        "sample_weight": sample_weight,
    }
    for (reduction, smoothing, weight), z_loss, (softcap, temperature, sample_weight) in itertools.product(
        itertools.product(("none", "sum", "mean"), (0.0, 0.1, 1.0), (False, True)),
        (0.0, 1e-3),
        ((None, 1.0, False), (3.0, 0.7, True)),
    )
]


def problem(ignored=0.0, targets="index"):
    logits, targets, options = Case(40, 300, "typical", "float64", ignored, weights=True, targets=targets).build()
    return logits, targets, options["weight"]


def torchs_losses(torch, x, targets, kind, weight, options):
    """What torch gives for each row, and what the row counts in a mean, from its own functions."""
    softcap, rows = options["softcap"], len(x)
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / options["temperature"]
    sample_weight = torch.linspace(0, 2, rows, dtype=x.dtype) if options["sample_weight"] else torch.ones(rows)
    if kind == "index":
        targets = torch.from_numpy(targets)
        counted = (targets >= 0).to(x.dtype)
        whole = torch.ones(x.shape[1], dtype=x.dtype) if weight is None else weight
        counts = counted * whole[targets.clamp(min=0)]
    else:
        if kind == "sparse":
            ids, probabilities = (torch.from_numpy(part) for part in targets)
            used = ids >= 0
            dense = torch.zeros_like(x.detach())
            targets = dense.scatter_add_(1, ids.clamp(min=0), torch.where(used, probabilities, 0.0))
        else:
            targets = torch.from_numpy(targets)
        counted = counts = torch.ones(rows, dtype=x.dtype)
    losses = torch.nn.functional.cross_entropy(
        z, targets, weight=weight, label_smoothing=options["label_smoothing"], reduction="none"
    )
    losses = losses + options["z_loss"] * counted * torch.logsumexp(z, 1) ** 2
    return losses * sample_weight, counts * sample_weight


@pytest.mark.parametrize("backend", fastxent.backends.available())
@pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch_over_the_product_of_options(backend, options, kind):
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    for ignored in (0.0, 0.3, 1.0) if kind == "index" else (0.0,):
        logits, targets, weight = problem(ignored, kind)
        leaf = torch.from_numpy(logits.copy()).requires_grad_(True)
        theirs, counts = torchs_losses(
            torch, leaf, targets, kind, torch.from_numpy(weight) if options["weight"] else None, options
        )
        if options["reduction"] != "none":
            theirs = theirs.sum()
        if options["reduction"] == "mean":
            theirs = theirs / counts.sum()
        theirs.backward(torch.ones_like(theirs))
        ours = options | {
            "weight": weight if options["weight"] else None,
            "sample_weight": np.linspace(0, 2, 40) if options["sample_weight"] else None,
        }
        loss, gradient = fastxent.cross_entropy_with_grad(logits, targets, backend=backend, **ours)
        np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-12)
        if ignored < 1:
            size = leaf.grad.abs().max().item()
            np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-12, atol=1e-13 * size)


@pytest.mark.parametrize("backend", fastxent.backends.available())
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.02}, {"softcap": 3.0}, {"label_smoothing": 0.1}], ids=str)
def test_torchs_hessian(backend, options):
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    logits, targets, _ = problem()
    logits, targets = logits[:4, :30].copy(), targets[:4] % 30
    plain = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "temperature": 1.0, "sample_weight": False}

    def mean(x):
        losses, _ = torchs_losses(torch, x, targets, "index", None, plain | options)
        return losses.mean()

    hessian = torch.autograd.functional.hessian(mean, torch.from_numpy(logits)).reshape(120, 120).numpy()
    v = np.cos(np.arange(120.0))
    got = fastxent.cross_entropy_hvp(logits, targets, v.reshape(4, 30), backend=backend, **options)
    np.testing.assert_allclose(got.reshape(-1), hessian @ v, rtol=1e-10, atol=1e-13)
    diagonal = fastxent.cross_entropy_hessian_diag(logits, targets, backend=backend, **options)
    np.testing.assert_allclose(diagonal.reshape(-1), np.diag(hessian), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torchs_binary_and_nll_losses(reduction):
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    functional = torch.nn.functional
    logits, targets, weight = problem(0.3)
    outcomes = np.random.default_rng(0).random(logits.shape)
    leaf = torch.from_numpy(logits.copy()).requires_grad_(True)
    theirs = functional.binary_cross_entropy_with_logits(
        leaf, torch.from_numpy(outcomes), torch.from_numpy(weight), reduction=reduction, pos_weight=torch.tensor(3.0)
    )
    theirs.backward(torch.ones_like(theirs))
    loss, gradient = fastxent.binary_cross_entropy_with_logits_with_grad(
        logits, outcomes, weight=weight, pos_weight=3.0, reduction=reduction
    )
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-11, atol=1e-16)
    log_probs = fastxent.log_softmax(logits)
    leaf = torch.from_numpy(log_probs.copy()).requires_grad_(True)
    theirs = functional.nll_loss(leaf, torch.from_numpy(targets), torch.from_numpy(weight), reduction=reduction)
    theirs.backward(torch.ones_like(theirs))
    options = {"weight": weight, "reduction": reduction}
    np.testing.assert_allclose(fastxent.nll_loss(log_probs, targets, **options), theirs.detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(fastxent.nll_loss_grad(log_probs, targets, **options), leaf.grad.numpy(), rtol=1e-14)


def test_torch_loses_what_is_kept_here():
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    logits = np.float32([[20, 0]])
    assert torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor([0])) == 0
    assert fastxent.cross_entropy(logits, [0]) == np.float32(2.0611537e-09)


def test_jax():
    jax = pytest.importorskip("jax", reason="needs jax: pip install fastxent[peers]")
    optax = pytest.importorskip("optax", reason="needs optax: pip install fastxent[peers]")
    logits, targets, _ = problem()
    logits = logits.astype(np.float32)

    def mean(x):
        return optax.softmax_cross_entropy_with_integer_labels(x, targets).mean()

    loss, gradient = jax.value_and_grad(mean)(logits)
    ours = fastxent.cross_entropy_with_grad(logits, targets)
    np.testing.assert_allclose(ours[0], loss, rtol=1e-6)
    np.testing.assert_allclose(ours[1], gradient, rtol=1e-4, atol=1e-8)


def test_scikit_learn():
    module = pytest.importorskip("sklearn._loss.loss", reason="needs scikit-learn: pip install fastxent[peers]")
    logits, targets, _ = problem()
    losses, gradient = module.HalfMultinomialLoss(n_classes=300).loss_gradient(targets.astype(float), logits)
    ours = fastxent.cross_entropy_with_grad(logits, targets, reduction="none")
    np.testing.assert_allclose(ours[0], losses, rtol=1e-12)
    np.testing.assert_allclose(ours[1], gradient, rtol=1e-10, atol=1e-15)


def test_onnxruntime():
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install fastxent[peers]")
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install fastxent[peers]")
    logits, targets, weight = problem(0.3)
    logits, weight = logits.astype(np.float32), weight.astype(np.float32)
    kinds = (("x", onnx.TensorProto.FLOAT), ("t", onnx.TensorProto.INT64), ("w", onnx.TensorProto.FLOAT))
    node = onnx.helper.make_node(
        "SoftmaxCrossEntropyLoss", ["x", "t", "w"], ["loss"], reduction="mean", ignore_index=-100
    )
    graph = onnx.helper.make_graph(
        [node],
        "loss",
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds],
        [onnx.helper.make_tensor_value_info("loss", onnx.TensorProto.FLOAT, [])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (loss,) = session.run(None, {"x": logits, "t": targets, "w": weight})
    np.testing.assert_allclose(fastxent.cross_entropy(logits, targets, weight=weight), loss, rtol=1e-5)
