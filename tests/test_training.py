"""Drop-in in real training: the examples with torch, small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")


def example(name):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_transformer_learns_the_same_curve():
    """Over 200 steps no further from float64 than torch's own float32 loss.

    What separates the curves is the rounding of the whole model, which training amplifies: two roundings of torch's own
    differ by as much. So each loss is run twice, with sums in two orders, and its smaller distance must stay below
    twice torch's larger one: runs that differ by rounding alone do, a gradient that is off does not.
    """
    exact, apart = example("torch_transformer").distances()
    assert len(exact) == 200
    assert exact[-20:].mean() < 0.5 * exact[0]
    rms = {name: np.sqrt((far**2).mean(axis=1)) for name, far in apart.items()}
    assert rms["fastxent"].min() <= 2 * rms["torch"].max()
    assert apart["fastxent"][:, 0].max() <= apart["torch"][:, 0].max() + 5e-7 * exact[0]


def test_a_confident_classifier_goes_on_learning():
    """torch's float32 loss and gradient become exactly 0 and its weights stay; ours go on."""
    module = example("torch_confident")
    torchs, ours = module.tune(module.LOSSES["torch"]), module.tune(module.LOSSES["fastxent"])
    assert torchs.loss[-1] == 0
    assert torchs.without_gradient[-1] == 1
    assert 0 < ours.loss[-1] < 1e-3 * ours.loss[0]
    assert ours.without_gradient.max() == 0
    assert ours.margin[-1] > torchs.margin[-1] + 5
    np.testing.assert_allclose(ours.loss[-1], ours.exact[-1], rtol=1e-5)
