r"""
Attention weights with a mask
=============================

Attention is a softmax over positions, of scores scaled by :math:`1 / \sqrt d`, where later positions and padding count
for nothing. `fastxent.softmax` takes scale and mask in the same pass: ``where`` leaves a position out as if it were not
there, and scaling costs no digit.
"""

import re
import textwrap

import matplotlib.pyplot as plt
import numpy as np

import fastxent

# %%
# Real words and what stands near them: embeddings from the documentation of a module of the standard library.

words = re.findall(r"[a-z]+", textwrap.wrap.__doc__.lower() + textwrap.TextWrapper.__doc__.lower())
vocabulary = sorted(set(words))
ids = np.array([vocabulary.index(word) for word in words])
together = np.zeros((len(vocabulary), len(vocabulary)))
for distance in range(1, 4):
    np.add.at(together, (ids[:-distance], ids[distance:]), 1 / distance)
left, strength, _ = np.linalg.svd(np.log1p(together + together.T))
d = 16
embeddings = (left[:, :d] * np.sqrt(strength[:d])).astype(np.float32)

# %%
# A sentence attends to itself, each word to those before it. The last three places are padding.

sentence, padding = words[:12], 3
x = np.concatenate([embeddings[ids[:12]], np.zeros((padding, d), np.float32)])
scores = 8 * x @ x.T
causal = np.tri(len(x), dtype=bool)
real = np.arange(len(x)) < len(sentence)
weights = fastxent.softmax(scores, scale=d**-0.5, where=causal & real)

figure, axis = plt.subplots(figsize=(6, 6))
picture = axis.imshow(weights[: len(sentence)], cmap="viridis", vmin=0, vmax=1)
names = [*sentence, *["(pad)"] * padding]
axis.set_xticks(range(len(names)), names, rotation=90)
axis.set_yticks(range(len(sentence)), sentence)
figure.colorbar(picture, label="attention")

# %%
# Every row sums to 1, what is masked is exactly 0, and a row of nothing but masked places is NaN, not a guess.

print(weights.sum(axis=1), weights[~(causal & real)].max())
print(fastxent.softmax(scores[:1], where=np.zeros(len(x), bool)))
plt.show()
