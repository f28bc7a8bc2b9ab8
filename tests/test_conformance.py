"""What others test their own with, run from their packages against ours: ONNX's node tests and scipy's.

Needs onnx before 1.19 (later wheels leave the data out) and scipy with its tests.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastxent

PREFIXES = ("test_sce_", "test_nllloss_", "test_logsoftmax_", "test_softmax_", "test_reduce_log_sum_exp_")


def cases():
    try:
        import onnx
    except ImportError:
        return []
    nodes = Path(onnx.__file__).parent / "backend" / "test" / "data" / "node"
    return sorted(case for prefix in PREFIXES for case in nodes.glob(f"{prefix}*") if "_expanded" not in case.name)


def read(case, kind):
    import onnx
    from onnx import numpy_helper

    for file in sorted((case / "test_data_set_0").glob(f"{kind}_*.pb")):
        tensor = onnx.TensorProto()
        tensor.ParseFromString(file.read_bytes())
        yield numpy_helper.to_array(tensor)


def softmax_cross_entropy(scores, labels, weights=None, *, reduction="mean", ignore_index=None):
    loss = fastxent.cross_entropy(
        scores, labels, weight=weights, reduction=reduction, ignore_index=ignore_index, axis=1
    )
    return loss, fastxent.log_softmax(scores, axis=1)


def negative_log_likelihood(scores, labels, weights=None, *, reduction="mean", ignore_index=None):
    return (fastxent.nll_loss(scores, labels, weight=weights, reduction=reduction, ignore_index=ignore_index, axis=1),)


def reduce_log_sum_exp(data, axes=None, *, keepdims=1):
    if 0 in data.shape:
        pytest.skip("no logits: ours refuses what has no class")
    axis = None if axes is None or not axes.size else tuple(map(int, axes))
    return (fastxent.logsumexp(data, axis=axis, keepdims=bool(keepdims)),)


OPERATORS = {
    "SoftmaxCrossEntropyLoss": softmax_cross_entropy,
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
    "LogSoftmax": lambda x, *, axis=-1: (fastxent.log_softmax(x, axis=axis),),
    "Softmax": lambda x, *, axis=-1: (fastxent.softmax(x, axis=axis),),
    "ReduceLogSumExp": reduce_log_sum_exp,
}


def test_there_are_cases():
    pytest.importorskip("onnx")
    assert len(cases()) == 75


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.removeprefix("test_"))
def test_onnx(case):
    onnx = pytest.importorskip("onnx")
    node = onnx.load(str(case / "model.onnx")).graph.node[0]
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    options = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    inputs = [array for array, name in zip(read(case, "input"), filter(None, node.input), strict=True)]
    found, wanted = OPERATORS[node.op_type](*inputs, **options), list(read(case, "output"))
    assert 1 <= len(wanted) <= len(found)  # the log-probabilities beside a loss are there where they are wanted
    for got, want in zip(found, wanted, strict=False):
        assert got.shape == want.shape
        # theirs are float32 by the usual formula: a few of its roundings, of the logits' size where it subtracts
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6 * max(1.0, float(np.abs(want).max(initial=0.0))))


PLUGIN = """
import numpy as np
import pytest
import fastxent


def real(x):
    x = np.asarray(x)
    if np.iscomplexobj(x):
        pytest.skip("complex numbers are no logits")
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False):
    if b is not None or return_sign:
        pytest.skip("weights and signs are no part of a logsumexp of logits")
    a = real(a)
    if not a.size:
        return np.float64(-np.inf)  # ours refuses what has no class
    found = fastxent.logsumexp(np.atleast_1d(a), axis=axis, keepdims=keepdims)
    return np.asarray(found)[()]


def softmax(x, axis=None):
    x = real(x)
    return fastxent.softmax(np.atleast_1d(x), axis=axis).reshape(x.shape)[()]


def log_softmax(x, axis=None):
    x = real(x)
    return fastxent.log_softmax(np.atleast_1d(x), axis=axis).reshape(x.shape)[()]


def pytest_collection_modifyitems(items):
    for item in items:
        item.module.logsumexp, item.module.softmax, item.module.log_softmax = logsumexp, softmax, log_softmax
"""


def has(module):
    """Whether it can be imported; without its package, not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_scipy(tmp_path):
    """scipy's own tests of logsumexp, softmax and log_softmax, with ours in their place."""
    module = "scipy.special.tests.test_logsumexp"
    if not has(module):
        assert not has("onnx"), "scipy is here without its tests, and the peers are to be tested"
        pytest.skip("needs scipy with its tests")
    (tmp_path / "ours.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ours", "--pyargs", module, "-k", "not wrap_radians"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 30, done.stdout[-500:]
