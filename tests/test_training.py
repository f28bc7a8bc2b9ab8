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
    """Over 200 steps about as far from float64 as with torch's own float32 loss.

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
    """torch's float32 loss is exactly 0 and so is the gradient of right classes; ours go on, to a smaller true loss."""
    module = example("torch_confident")
    torchs, ours = module.tune(module.LOSSES["torch"]), module.tune(module.LOSSES["fastxent"])
    assert (torchs.loss == 0).any()
    assert (torchs.exact > 0).all()
    assert torchs.without_gradient.max() > 0.9
    assert ours.without_gradient.max() == 0
    assert ours.loss.min() > 0
    np.testing.assert_allclose(ours.loss, ours.exact, rtol=5e-7)
    assert ours.exact[-1] < 1e-3 * torchs.exact[-50:].min()
    assert ours.margin[-1] > torchs.margin[-1] + 5


def test_a_step_is_timed_and_learns_with_either_loss():
    for name, (step, loss, last) in (found := example("torch_step_time").compare(batch=1, steps=4)).items():
        assert 0 < loss < step, name
        assert last == pytest.approx(found["torch"][-1], rel=1e-5)
