"""
Fine-tuning a confident classifier in torch
===========================================

A classifier of handwritten digits that is already sure is trained on, in float32. Once the right class is 17 nats
above the others, torch's loss of an example rounds to 0, and so does the gradient of its right class: the others are
still pushed down, but nothing pulls the right one up, and the gradient no longer sums to 0. The loss it reports is 0
while the true one is not, and jumps about. With :func:`fastxent.torch.cross_entropy` loss and gradient are as small as
they are, and learning goes on. It needs torch, so the pages show it without running it; in a clone of the repository::

    python -m pip install -e ".[torch,report]" && python examples/torch_confident.py confident.svg

draws the picture.
"""

# sphinx_gallery_thumbnail_path = "pictures/confident.svg"

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import fastxent.torch
from fastxent.demo import load_digits

LOSSES = {"torch": nn.functional.cross_entropy, "fastxent": fastxent.torch.cross_entropy}
BEFORE, STEPS = 200, 400


class Curves(NamedTuple):
    """Of each step: the loss as trained with, the same in float64, the share of examples whose right class has a
    gradient of exactly 0, and the smallest margin of the right class in nats.
    """

    loss: np.ndarray
    exact: np.ndarray
    without_gradient: np.ndarray
    margin: np.ndarray


def tune(loss_of):
    """Train with torch's loss until the classifier is right, then go on with ``loss_of``."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # such small matrices are faster so
    images, labels = (torch.from_numpy(array[:300]) for array in load_digits())
    images, labels = images.float(), labels.long()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    # an epsilon beside which a gradient of 1e-15 still counts
    optimizer, curves = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.9), eps=1e-30), []
    for step in range(BEFORE + STEPS):
        logits = model(images)
        logits.retain_grad()
        loss = (nn.functional.cross_entropy if step < BEFORE else loss_of)(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = logits.detach().double().gather(1, labels[:, None])
        others = logits.detach().double().scatter(1, labels[:, None], -torch.inf)
        exact = torch.log1p(torch.exp(others - right).sum(1)).mean()
        idle = (logits.grad.gather(1, labels[:, None]) == 0).double().mean()
        curves.append((loss.item(), exact.item(), idle.item(), (right[:, 0] - others.amax(1)).min().item()))
    return Curves(*np.array(curves[BEFORE:]).T)


def draw(path):
    """The picture of both."""
    from matplotlib import pyplot as plt

    figure, (losses, idle, margins) = plt.subplots(3, 1, figsize=(6.4, 6.4), sharex=True, layout="constrained")
    for (name, loss_of), colour in zip(LOSSES.items(), ("tab:orange", "tab:blue"), strict=True):
        curves = tune(loss_of)
        losses.semilogy(curves.exact, color=colour, linewidth=1, label=f"{name}: the true loss")
        nothing = np.flatnonzero(curves.loss == 0)
        if nothing.size:
            losses.plot(nothing, curves.exact[nothing], "x", color=colour, label=f"{name} says exactly 0")
        idle.plot(100 * curves.without_gradient, color=colour)
        margins.plot(curves.margin, color=colour)
    losses.set(ylabel="mean loss, nats")
    losses.legend(frameon=False)
    idle.set(ylabel="examples without gradient\nof their own class, %")
    margins.set(ylabel="smallest margin, nats", xlabel="step of fine-tuning")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


if __name__ == "__main__":
    draw(sys.argv[1])
