"""The demonstration: a softmax classifier of handwritten digits, trained with the package's own gradient.

The digits are the 1,797 8 x 8 images of the test half of UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin
and C. Kaynak, 1998, doi 10.24432/C50P49, CC BY 4.0), the set scikit-learn ships too.
"""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np

import fastxent
from fastxent.bench import limits, naive, timing
from fastxent.bench.cases import speed_case

HELD_OUT = 360
STEPS = 200


@dataclass(frozen=True)
class Step:
    """One step of training: losses in nats, accuracy as a share."""

    step: int
    train_loss: float
    held_out_loss: float
    held_out_accuracy: float


def load_digits():
    """Images (1797, 64) float32 in [0, 1] and labels (1797,) int64."""
    with (files("fastxent") / "data" / "optdigits.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
        return data["pixels"].astype(np.float32) / 16, data["labels"].astype(np.int64)


def train(steps=STEPS, learning_rate=2.0, every=20):
    """Train by gradient descent; yields a `Step` now and then, and last the held-out ``(logits, targets)``."""
    images, labels = load_digits()
    images = np.concatenate([images, np.ones((len(images), 1), np.float32)], axis=1)
    held_out, targets = images[-HELD_OUT:], labels[-HELD_OUT:]
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    parameters = np.zeros((images.shape[1], 10), np.float32)
    for step in range(1, steps + 1):
        loss, dlogits = fastxent.cross_entropy_with_grad(images @ parameters, labels)
        parameters -= learning_rate * (images.T @ dlogits)
        if step == 1 or step % every == 0:
            logits = held_out @ parameters
            accuracy = float((logits.argmax(axis=1) == targets).mean())
            yield Step(step, float(loss), float(fastxent.cross_entropy(logits, targets)), accuracy)
    yield held_out @ parameters, targets


def save(folder, logits, targets):
    """Write logits.npy and targets.npy to ``folder``; returns their paths and that of the scores to come."""
    folder.mkdir(exist_ok=True)
    paths = folder / "logits.npy", folder / "targets.npy", folder / "scores.npy"
    np.save(paths[0], logits)
    np.save(paths[1], targets)
    return paths


@dataclass(frozen=True)
class Speed:
    """A measured pass: its limit is reading the logits once, and writing them too for a gradient."""

    label: str
    seconds: float
    of_limit: float
    against_numpy: float


def measure_speed():
    """Time the loss, and the loss with its gradient, beside their limits and plain NumPy, in interleaved rounds."""
    logits, targets, _ = speed_case(2000, 32_000).build()
    out = np.empty_like(logits)
    seconds = timing.interleaved(
        {
            "read": lambda: limits.read(logits),
            "copy": lambda: limits.copy(logits, out),
            "loss": lambda: fastxent.cross_entropy(logits, targets),
            "loss and gradient": lambda: fastxent.cross_entropy_with_grad(logits, targets, out=out),
            "numpy": lambda: naive.numpy_cross_entropy(logits, targets),
            "numpy with gradient": lambda: naive.numpy_cross_entropy_with_grad(logits, targets),
        },
        rounds=5,
    )
    return [
        Speed(label, seconds[label], seconds[limit] / seconds[label], seconds[peer] / seconds[label])
        for label, limit, peer in (
            ("loss", "read", "numpy"),
            ("loss and gradient", "copy", "numpy with gradient"),
        )
    ]


def confident_row():
    """The loss of a confident row by the plain float32 formula and by fastxent."""
    logits = np.array([[20, 0]], "float32")
    return {
        "plain float32 formula": naive.numpy_cross_entropy(logits, np.array([0]))[0],
        "fastxent": fastxent.cross_entropy(logits, [0]),
    }
