"""
Label smoothing and calibration, before and after
=================================================

A network that has learned its training set by heart is too sure of the rest. Label smoothing holds it back while it
learns; a temperature, one number fitted on data it has not seen, corrects it afterwards.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastxent
from fastxent.demo import load_digits

images, labels = load_digits()
rng = np.random.default_rng(0)
noisy = np.where(rng.random(len(labels)) < 0.15, rng.integers(0, 10, len(labels)), labels)  # as real labels are
train, tune, test = slice(0, 500), slice(500, 1100), slice(1100, None)


def fit(label_smoothing):
    """Logits of all images after training a network of one hidden layer on the first 500."""
    generator = np.random.default_rng(1)
    first = generator.standard_normal((64, 64), np.float32) / 8
    second = np.zeros((64, 10), np.float32)
    for _ in range(2000):
        hidden = np.tanh(images[train] @ first)
        dlogits = fastxent.cross_entropy_grad(hidden @ second, noisy[train], label_smoothing=label_smoothing)
        dhidden = dlogits @ second.T * (1 - hidden**2)
        second -= 0.4 * hidden.T @ dlogits
        first -= 0.4 * images[train].T @ dhidden
    return np.tanh(images @ first) @ second


plain, smoothed = fit(0.0), fit(0.1)

# %%
# The temperature that costs the least on the second part: no digit is lost to it, however sharp.

temperatures = np.geomspace(0.5, 8, 60)
costs = [fastxent.cross_entropy(plain[tune], noisy[tune], temperature=t) for t in temperatures]
best = temperatures[np.argmin(costs)]

# %%
# On the third part: how often the largest class is right, against its probability.

candidates = {
    "as trained": (plain, 1.0),
    "label smoothing 0.1": (smoothed, 1.0),
    f"temperature {best:.1f}": (plain, best),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
for axis, (name, (logits, temperature)) in zip(axes, candidates.items(), strict=True):
    scores = fastxent.score(logits[test], noisy[test], top_k=1, temperature=temperature)
    calibration = scores.calibration(bins=10)
    axis.bar(calibration.edges[:-1], calibration.accuracy, width=0.1, align="edge", edgecolor="white")
    axis.plot([0, 1], [0, 1], color="grey", linestyle="--")
    nll = scores.metrics().mean_nll[0]
    axis.set(
        title=f"{name}\nloss {nll:.2f}, calibration error {calibration.expected_error:.3f}",
        xlabel="probability of the largest class",
    )
axes[0].set_ylabel("share that is right")
figure.tight_layout()
plt.show()
