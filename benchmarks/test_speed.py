"""Side by side with pytest-benchmark: ``pytest benchmarks --benchmark-group-by=group``; checked before it is timed."""

import numpy as np
import pytest

import fastxent
from fastxent.bench import candidates, cases, limits

SHAPES = [f"{rows}x{classes}" for rows, classes in cases.SPEED_SHAPES]
LOSSES = {
    "fastxent": lambda logits, targets: fastxent.cross_entropy(logits, targets, reduction="none"),
    "numpy": candidates.numpy_cross_entropy,
}
GRADIENTS = {
    "fastxent": lambda logits, targets: fastxent.cross_entropy_with_grad(logits, targets, reduction="sum"),
    "numpy": candidates.numpy_cross_entropy_with_grad,
}


def problem(shape):
    return cases.speed_case(*map(int, shape.split("x"))).build()[:2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("candidate", ["read", *LOSSES])
def test_loss(benchmark, candidate, shape):
    benchmark.group = f"loss {shape}"
    logits, targets = problem(shape)
    if candidate == "read":
        benchmark(limits.read, logits)
        return
    want = fastxent.cross_entropy(logits[:16], targets[:16], reduction="none", backend="reference")
    np.testing.assert_allclose(LOSSES[candidate](logits, targets)[:16], want, rtol=1e-4)
    benchmark(LOSSES[candidate], logits, targets)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("candidate", ["copy", *GRADIENTS])
def test_loss_and_gradient(benchmark, candidate, shape):
    benchmark.group = f"loss and gradient {shape}"
    logits, targets = problem(shape)
    if candidate == "copy":
        benchmark(limits.copy, logits, np.empty_like(logits))
        return
    want = fastxent.cross_entropy_grad(logits[:16], targets[:16], backend="reference", reduction="sum")
    np.testing.assert_allclose(GRADIENTS[candidate](logits, targets)[1][:16], want, rtol=1e-4, atol=1e-9)
    benchmark(GRADIENTS[candidate], logits, targets)
