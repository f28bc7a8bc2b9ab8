r"""
Why training in float32 stalls at a loss of 0
=============================================

Once a logit is 17 above 0, its sigmoid rounds to 1 in float32: the loss :math:`-\log p` is 0, so is its gradient
:math:`p - 1`, and the example teaches nothing any more, though its true gradient is merely small. Here nothing is
subtracted from 1: the loss is a log1p, the gradient the other outcome's probability, and both go on falling.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastxent
from fastxent.demo import load_digits

images, labels = load_digits()
some = np.flatnonzero(labels < 2)[:100]
images, ones = images[some], labels[some].astype(np.float32)  # is it a one? A line tells them from the zeros


def usual(logits, targets):
    """The textbook's loss and gradient, float32 throughout."""
    p = 1 / (1 + np.exp(-logits))
    loss = -np.log(np.where(targets == 1, p, 1 - p)).mean()
    return loss, (p - targets) / np.float32(len(targets))


def descend(loss_and_gradient, steps=1500):
    """Loss, share of examples without a gradient, and smallest margin, under steps of one length along the gradient."""
    weights, curve = np.zeros(64, np.float32), []
    for _ in range(steps):
        logits = images @ weights
        loss, dlogits = loss_and_gradient(logits, ones)
        curve.append((loss, (dlogits == 0).mean(), np.where(ones == 1, logits, -logits).min()))
        gradient = images.T @ dlogits
        if gradient.any():
            weights -= np.float32(0.01) * gradient / np.abs(gradient).max()
    return np.array(curve)


curves = {"fastxent": descend(fastxent.binary_cross_entropy_with_logits_with_grad), "-log p and p - 1": descend(usual)}

# %%
# Left: where the usual curve ends, the loss is exactly 0. Middle: the share of examples whose gradient is exactly 0.
# Right: how sure the least sure example has become.

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
for name, curve in curves.items():
    axes[0].semilogy(np.where(curve[:, 0] > 0, curve[:, 0], np.nan), label=name)
    axes[1].plot(curve[:, 1], label=name)
    axes[2].plot(curve[:, 2], label=name)
    print(f"{name}: last loss {curve[-1, 0]:.3g}, without a gradient {curve[-1, 1]:.0%}, margin {curve[-1, 2]:.1f}")
for axis, title in zip(axes, ("loss, nats", "share without a gradient", "smallest margin, nats"), strict=True):
    axis.set(xlabel="step", title=title)
    axis.legend()
plt.show()
