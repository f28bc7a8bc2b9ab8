"""
Scoring text with a byte-level model
====================================

A model that guesses the next byte from the three before it, trained on modules of the standard library for a few
seconds, and what it thinks of a module it has never seen: bits per byte, and which bytes surprise it.
"""

import argparse
import csv
import gzip
import json.decoder
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import fastxent

text = b"".join(Path(module.__file__).read_bytes() for module in (argparse, csv, gzip, json.decoder))
unseen = np.frombuffer(Path(textwrap.__file__).read_bytes(), np.uint8)
text = np.frombuffer(text, np.uint8)
CONTEXT = 3


def contexts(data):
    """The bytes before each byte but the first three, (N, 3)."""
    return np.lib.stride_tricks.sliding_window_view(data[:-1], CONTEXT)


# %%
# Each byte of the context has an embedding; one hidden layer; 256 logits. Plain stochastic gradient descent.

rng = np.random.default_rng(0)
embeddings = rng.standard_normal((256, 16), np.float32) / 4
first = rng.standard_normal((CONTEXT * 16, 128), np.float32) / 7
second = np.zeros((128, 256), np.float32)


def logits_of(context):
    """The 256 logits of the byte after each context, and what the gradient needs again."""
    x = embeddings[context].reshape(len(context), -1)
    hidden = np.tanh(x @ first)
    return hidden @ second, hidden, x


x_all, y_all = contexts(text), text[CONTEXT:]
for step in range(2000):
    rate = np.float32(0.5 if step < 1500 else 0.1)
    batch = rng.integers(0, len(y_all), 256)
    logits, hidden, x = logits_of(x_all[batch])
    dlogits = fastxent.cross_entropy_grad(logits, y_all[batch])
    dhidden = dlogits @ second.T * (1 - hidden**2)
    dx = (dhidden @ first.T).reshape(-1, CONTEXT, 16)
    second -= rate * hidden.T @ dlogits
    first -= rate * x.T @ dhidden
    np.subtract.at(embeddings, x_all[batch], rate * dx)

# %%
# Everything from one read of the logits: the total in bits for each byte of the file, ranks, entropy.

scores = fastxent.score(logits_of(contexts(unseen))[0], unseen[CONTEXT:].astype(np.int64))
metrics = scores.metrics(byte_counts=len(scores))
print(
    f"{metrics.bits_per_byte[0]:.2f} bits per byte; the next byte is the first guess {metrics.accuracy[0]:.0%} of times"
)

# %%
# How surprised it was, byte by byte: dark red is 8 bits or more.

LINES = 14
shown = bytes(unseen).split(b"\n")[5 : 5 + LINES]
start = bytes(unseen).find(shown[0])
bits = np.concatenate([np.zeros(CONTEXT), -scores.log_prob / np.log(2)])
figure, axis = plt.subplots(figsize=(10, 3.6))
place = start
for line, words in enumerate(shown):
    for column, byte in enumerate(words):
        surprise = min(1.0, bits[place] / 8)
        axis.add_patch(plt.Rectangle((column - 0.5, -line - 0.4), 1, 0.8, color=plt.get_cmap("Reds")(surprise)))
        ink = "white" if surprise > 0.6 else "black"
        axis.text(column, -line, chr(byte), family="monospace", size=9, ha="center", va="center", color=ink)
        place += 1
    place += 1
axis.set(xlim=(-1, 76), ylim=(-LINES, 1))
axis.axis("off")
plt.show()
