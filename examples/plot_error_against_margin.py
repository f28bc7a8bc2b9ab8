"""
The error of a loss against its margin
======================================

One logit at m, the other at 0: the more certain the row, the smaller the loss, and the more of its digits the usual
formula loses, until it returns 0. What is right is known from arithmetic with 50 digits.
"""

import matplotlib.pyplot as plt
import mpmath
import numpy as np
import scipy.special

import fastxent

margins = np.arange(0.0, 60.0, 0.5, dtype=np.float32)
logits = np.stack([margins, np.zeros_like(margins)], axis=1)
targets = np.zeros(len(margins), np.int64)

with mpmath.workdps(50):
    exact = np.array([float(mpmath.log1p(mpmath.exp(-float(m)))) for m in margins])

found = {
    "fastxent": fastxent.cross_entropy(logits, targets, reduction="none"),
    "scipy.special.log_softmax": -scipy.special.log_softmax(logits, axis=1)[:, 0],
    "lse - z_t in float32": np.log(np.exp(logits - logits[:, :1]).sum(axis=1)),
    "lse - z_t in float64": np.log(np.exp((logits - logits[:, :1]).astype(np.float64)).sum(axis=1)),
}

# %%
# 100% is a loss of exactly 0. In float64 the same happens at twice the margin.

figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
for (name, losses), style in zip(found.items(), ("-", "-", "--", "-"), strict=True):
    axis.semilogy(margins, np.maximum(np.abs(losses - exact) / exact, 1e-9), style, label=name)
axis.axhline(2.0**-24, color="grey", linestyle=":", label="half a unit of float32's last place")
axis.set(xlabel="margin of the target's logit, nats", ylabel="relative error of the loss", ylim=(1e-9, 2))
figure.legend(loc="outside upper center", ncols=3)
plt.show()
