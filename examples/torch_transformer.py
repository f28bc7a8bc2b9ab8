"""
A small transformer in torch, with either loss
==============================================

A transformer of bytes learns the sources of Python's standard library, with the cross entropy of torch and with that of
:mod:`fastxent.torch`, in float32, beside the same training in float64. It needs torch, so the pages show it without
running it; in a clone of the repository::

    python -m pip install -e ".[torch]" && python examples/torch_transformer.py

prints how far each loss curve is from that of float64, step by step.
"""

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastxent.torch

CONTEXT, BATCH, STEPS = 32, 12, 200


def text(megabytes=1):
    """The beginning of the standard library, as bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(path.read_bytes() for path in sources)[: megabytes << 20], np.uint8)


class Transformer(nn.Module):
    """Two blocks of causal attention over bytes."""

    def __init__(self, width=32, heads=2, layers=2):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        block = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **block) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens):
        """Logits of the next byte at every place."""
        states = self.bytes(tokens) + self.places.weight
        for block in self.blocks:
            states = block(states, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(states))


def train(loss_of, dtype=torch.float32, steps=STEPS, order=1):
    """The losses of ``steps`` steps, float64; ``order`` -1 turns each batch upside down, which changes nothing but how
    sums are rounded.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)  # such small matrices are faster so
    model, tokens = Transformer().to(dtype), torch.from_numpy(text().astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    starts = np.random.default_rng(0).integers(0, len(tokens) - CONTEXT - 1, (steps, BATCH))[:, ::order]
    losses = []
    for batch in starts:
        window = torch.stack([tokens[start : start + CONTEXT + 1] for start in batch])
        logits = model(window[:, :-1])
        loss = loss_of(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def distances(steps=STEPS):
    """The loss in float64, and by name how far from it each training in float32 is: twice each, as sums are rounded in
    more than one order.
    """
    exact = train(nn.functional.cross_entropy, torch.float64, steps)
    losses = {"torch": nn.functional.cross_entropy, "fastxent": fastxent.torch.cross_entropy}
    return exact, {
        name: np.abs([train(loss_of, steps=steps, order=order) - exact for order in (1, -1)])
        for name, loss_of in losses.items()
    }


if __name__ == "__main__":
    exact, apart = distances()
    print(
        f"float64: {exact[0]:.4f} nats a byte at first, {exact[-20:].mean():.4f} over the last 20 of {len(exact)} steps"
    )
    for name, far in apart.items():
        rms = np.sqrt((far**2).mean(axis=1))
        print(f"{name:>10}: off by {rms.mean():.1e} (root mean square), {far.max():.1e} at most")
