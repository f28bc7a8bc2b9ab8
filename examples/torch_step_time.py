"""
What the loss takes of a training step
======================================

The words of Python's standard library, the 32,000 most frequent of them, learned by a transformer whose last layer has
one logit for each: how long a step takes, and how much of it the loss and the gradient of its logits, with torch's
cross entropy and with that of :mod:`fastxent.torch`, taking turns. It needs torch, so the pages show it without running
it; in a clone of the repository::

    python -m pip install -e ".[torch]" && python examples/torch_step_time.py
"""

import re
import sysconfig
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastxent.torch

VOCABULARY, CONTEXT, WIDTH = 32_000, 64, 128
LOSSES = {
    "torch": nn.functional.cross_entropy,
    "fastxent": fastxent.torch.cross_entropy,
    "in place": partial(fastxent.torch.cross_entropy, inplace_backward=True),
}


def words(most=2_000_000):
    """The first words, spaces and signs of the standard library as ranks of their frequency; 0 for the rare."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = (re.findall(r"\w+|\s+|.", path.read_text("utf-8", errors="replace")) for path in sources)
    pieces = [piece for pieces in text for piece in pieces][:most]
    frequent = [piece for piece, _ in Counter(pieces).most_common(VOCABULARY - 1)]
    rank = {piece: place for place, piece in enumerate(frequent, 1)}
    return torch.tensor([rank.get(piece, 0) for piece in pieces])


class Transformer(nn.Module):
    """Two blocks of causal attention over words."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = {"dim_feedforward": 4 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, **block) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens):
        """Logits of the next word at every place."""
        states = self.words(tokens) + self.places.weight
        for block in self.blocks:
            states = block(states, src_mask=self.mask, is_causal=True)
        return self.head(states).flatten(0, 1)


def timed_step(model, optimizer, window, loss_of):
    """The loss of a step, the seconds of the step, and those of the loss and the gradient of its logits."""
    begin = time.perf_counter()
    logits, targets = model(window[:, :-1]), window[:, 1:].flatten()
    start = time.perf_counter()
    loss = loss_of(logits, targets)
    forward, reached = time.perf_counter() - start, []
    logits.register_hook(lambda _: reached.append(time.perf_counter()))
    optimizer.zero_grad()
    start = time.perf_counter()
    loss.backward()
    backward = reached[0] - start
    optimizer.step()
    return loss.item(), time.perf_counter() - begin, forward + backward


def compare(batch, steps):
    """By name the median seconds of a step and of its loss, and the last loss."""
    tokens, found = words(), {name: [] for name in LOSSES}
    models = {}
    for name in LOSSES:
        torch.manual_seed(0)
        model = Transformer()
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    for starts in np.random.default_rng(0).integers(0, len(tokens) - CONTEXT - 1, (steps, batch)):
        window = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts])
        for name, loss_of in LOSSES.items():
            found[name].append(timed_step(*models[name], window, loss_of))
    return {name: (*np.median(times[2:], axis=0)[1:], times[-1][0]) for name, times in found.items()}


if __name__ == "__main__":
    for batch, steps in ((8, 12), (64, 8)):
        print(f"{batch * CONTEXT} words, {VOCABULARY:,} classes:")
        for name, (step, loss, last) in compare(batch, steps).items():
            print(f"{name:>10}: {1e3 * step:7.0f} ms a step, of them the loss {loss / step:.0%}; loss {last:.4f}")
