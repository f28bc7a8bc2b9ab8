"""
An autoencoder's cross entropy, pixel by pixel
==============================================

64 pixels through 12 numbers and back. A pixel between 0 and 1 is a target like any other probability, and each has its
own binary cross entropy; the least a pixel of grey y can cost is its own entropy, not 0.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastxent
from fastxent import information
from fastxent.demo import load_digits

images, _ = load_digits()
train, held_out = images[:1400], images[1400:]

rng = np.random.default_rng(0)
encoder = rng.standard_normal((64, 12), np.float32) / 8
decoder = rng.standard_normal((12, 64), np.float32) / 4
bias = np.zeros(64, np.float32)
speeds = [np.zeros_like(array) for array in (encoder, decoder, bias)]


def decode(pixels):
    """The logits of the pixels that come back."""
    return np.tanh(pixels @ encoder) @ decoder + bias


losses = []
for _ in range(600):
    code = np.tanh(train @ encoder)
    loss, slope = fastxent.binary_cross_entropy_with_logits_with_grad(code @ decoder + bias, train)
    losses.append((loss, fastxent.binary_cross_entropy_with_logits(decode(held_out), held_out)))
    dcode = slope @ decoder.T * (1 - code**2)
    gradients = train.T @ dcode, code.T @ slope, slope.sum(axis=0)
    for array, speed, gradient in zip((encoder, decoder, bias), speeds, gradients, strict=True):
        speed *= 0.9
        speed -= 2.5 * gradient
        array += speed

# %%
# What is above the floor, the mean entropy of the pixels themselves, is the Kullback-Leibler divergence.

floor = information.entropy(np.stack([held_out, 1 - held_out], axis=-1).astype(np.float64)).mean()
figure, axis = plt.subplots()
axis.plot(losses, label=["training", "held out"])
axis.axhline(floor, color="grey", linestyle="--", label="entropy of the pixels")
axis.set(xlabel="step", ylabel="binary cross entropy of a pixel, nats")
axis.legend()

# %%
# Held-out digits, and what is left of them after twelve numbers.

back = 1 / (1 + np.exp(-decode(held_out)))
figure, axes = plt.subplots(2, 10, figsize=(10, 2.2))
for column in range(10):
    for row, pixels in enumerate((held_out, back)):
        axes[row, column].imshow(pixels[column].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes[row, column].set(xticks=[], yticks=[])
plt.show()
