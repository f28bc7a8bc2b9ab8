"""
Distillation from a few classes of each row
===========================================

A teacher's probabilities say more than a label: which other digits this one resembles. Storing the three largest of a
row, ``(ids, probabilities)``, is enough; `fastxent.cross_entropy` takes them as they are, without ever spreading them
over all classes. With a vocabulary of 100,000 that is the difference between gigabytes and kilobytes.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastxent
from fastxent.demo import load_digits

images, labels = load_digits()
labelled, transfer, held_out = slice(0, 1000), slice(1000, 1150), slice(1150, None)


def fit(x, targets, steps, width=None, rate=1.0):
    """A function from images to logits: linear, or with one hidden layer of ``width``."""
    generator = np.random.default_rng(0)
    first = np.eye(64, dtype=np.float32) if width is None else generator.standard_normal((64, width), np.float32) / 8
    second = np.zeros((first.shape[1], 10), np.float32)
    for _ in range(steps):
        hidden = x @ first if width is None else np.tanh(x @ first)
        dlogits = fastxent.cross_entropy_grad(hidden @ second, targets)
        if width is not None:
            first -= rate * x.T @ (dlogits @ second.T * (1 - hidden**2))
        second -= rate * hidden.T @ dlogits
    return lambda y: (y @ first if width is None else np.tanh(y @ first)) @ second


# %%
# The teacher has seen a thousand labels. What it says of 150 other images is kept as three classes each.

teacher = fit(images[labelled], labels[labelled], 800, width=64)
said = fastxent.score(teacher(images[transfer]), labels[transfer], top_k=3, temperature=2.0)
targets = said.top_ids, np.exp(said.top_log_probs)

# %%
# Two students see these 150 images alone, one with their labels, one with the teacher's three probabilities. A row's
# probabilities need not sum to 1; what is missing is what the other seven classes had.

from_labels = fit(images[transfer], labels[transfer], 400, width=16)
from_teacher = fit(images[transfer], targets, 400, width=16)
results = {
    name: fastxent.score(model(images[held_out]), labels[held_out]).metrics()
    for name, model in (("teacher", teacher), ("student of labels", from_labels), ("student of teacher", from_teacher))
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
for axis, figure_of in zip(axes, ("mean_nll", "accuracy"), strict=True):
    axis.bar(list(results), [getattr(metrics, figure_of)[0] for metrics in results.values()], color=["C2", "C0", "C1"])
    axis.set_ylabel({"mean_nll": "held-out cross entropy, nats", "accuracy": "held-out accuracy"}[figure_of])
figure.tight_layout()
plt.show()
