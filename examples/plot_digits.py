"""
Softmax regression of handwritten digits
========================================

Ten linear scores of an image, the cross entropy of the right one, its gradient, and gradient descent: all there is to
a linear classifier. The gradient of the loss with respect to the scores is :math:`p - y`, the probabilities minus one
at the target, so the weights move towards images that were taken for something else.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastxent
from fastxent.demo import load_digits

images, labels = load_digits()  # (1797, 64) in [0, 1]
train, held_out = slice(0, 1400), slice(1400, None)

weights, bias = np.zeros((64, 10), np.float32), np.zeros(10, np.float32)
losses = []
for _ in range(200):
    loss, dlogits = fastxent.cross_entropy_with_grad(images[train] @ weights + bias, labels[train])
    weights -= 2.0 * images[train].T @ dlogits
    bias -= 2.0 * dlogits.sum(axis=0)
    losses.append((loss, fastxent.cross_entropy(images[held_out] @ weights + bias, labels[held_out])))

# %%
# A loss of log 10 = 2.3 nats is what guessing costs. Both curves fall; that of images never seen stays a little above.

figure, axis = plt.subplots()
axis.plot(losses, label=["training", "held out"])
axis.axhline(np.log(10), color="grey", linestyle="--", label="guessing")
axis.set(xlabel="step", ylabel="cross entropy, nats", ylim=(0, None))
axis.legend()

# %%
# The weights of a class are an image too: what speaks for it is red, what speaks against it blue.

figure, axes = plt.subplots(1, 10, figsize=(10, 1.4))
for digit, axis in enumerate(axes):
    limit = np.abs(weights).max()
    axis.imshow(weights[:, digit].reshape(8, 8), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(title=str(digit), xticks=[], yticks=[])

# %%
# The same scores, measured: perplexity, accuracy and calibration from one read of the logits.

print(fastxent.score(images[held_out] @ weights + bias, labels[held_out], top_k=3))
plt.show()
