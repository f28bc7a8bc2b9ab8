r"""
A small network with a sigmoid output
=====================================

One output instead of ten: is this digit odd? The probability is the sigmoid of a logit, and the loss its binary cross
entropy, :math:`-y \log \sigma(z) - (1 - y) \log (1 - \sigma(z))`. Given the logit rather than the probability,
nothing is clipped: both ends keep their digits.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastxent
from fastxent.demo import load_digits

images, labels = load_digits()
odd = (labels % 2).astype(np.float32)
train, held_out = slice(0, 1400), slice(1400, None)

rng = np.random.default_rng(0)
first = rng.standard_normal((64, 16), np.float32) / 8
second = rng.standard_normal(16, np.float32) / 4
offset = np.float32(0)

losses = []
for _ in range(400):
    hidden = np.tanh(images @ first)
    logits = hidden @ second + offset
    loss, slope = fastxent.binary_cross_entropy_with_logits_with_grad(logits[train], odd[train])
    losses.append((loss, fastxent.binary_cross_entropy_with_logits(logits[held_out], odd[held_out])))
    dhidden = np.outer(slope, second) * (1 - hidden[train] ** 2)
    second -= hidden[train].T @ slope
    offset -= slope.sum()
    first -= images[train].T @ dhidden

# %%
# log 2 = 0.69 nats is what a coin costs.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.plot(losses, label=["training", "held out"])
left.axhline(np.log(2), color="grey", linestyle="--", label="a coin")
left.set(xlabel="step", ylabel="binary cross entropy, nats", ylim=(0, None))
left.legend()
for value, name in ((0, "even"), (1, "odd")):
    right.hist(logits[held_out][odd[held_out] == value], bins=30, alpha=0.6, label=name)
right.set(xlabel="logit of a held-out digit: odd above 0", ylabel="digits")
right.legend()

# %%
# Were the network four times as sure of its surest digit, this would cost 60 nats if it were wrong and 1e-26 if right:
# both are the numbers they are, where a probability rounded to float32 would be 0 or 1, and its complement lost.

surest = np.abs(logits).argmax()
for y in (0.0, 1.0):
    print(y, fastxent.binary_cross_entropy_with_logits(4 * logits[surest], np.float32(y)))
plt.show()
