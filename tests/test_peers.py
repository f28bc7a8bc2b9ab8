"""The same numbers as other libraries; each test needs its library, all of them in the ``peers`` extra."""

import itertools

import numpy as np
import pytest

import fastxent
from fastxent.bench.cases import Case

OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
    for reduction, smoothing, weight in itertools.product(("none", "sum", "mean"), (0.0, 0.1, 1.0), (False, True))
]


def problem(ignored=0.0):
    logits, targets, options = Case(40, 300, "typical", "float64", ignored, weights=True).build()
    return logits, targets, options["weight"]


@pytest.mark.parametrize("backend", fastxent.backends.available())
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch(backend, options, ignored):
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    logits, targets, weight = problem(ignored)
    options = options | {"weight": weight if options["weight"] else None}
    leaf = torch.from_numpy(logits.copy()).requires_grad_(True)
    theirs = torch.nn.functional.cross_entropy(
        leaf,
        torch.from_numpy(targets),
        weight=None if options["weight"] is None else torch.from_numpy(weight),
        label_smoothing=options["label_smoothing"],
        reduction=options["reduction"],
    )
    theirs.backward(torch.ones_like(theirs))
    loss, gradient = fastxent.cross_entropy_with_grad(logits, targets, backend=backend, **options)
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-12)
    if ignored < 1:
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-12, atol=1e-15)


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
