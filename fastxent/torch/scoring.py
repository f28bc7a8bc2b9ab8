"""`fastxent.score` of tensors."""

from typing import Any, NamedTuple

import numpy as np
import torch

import fastxent
from fastxent.torch.arrays import as_array, as_given, as_tensor
from fastxent.torch.operators import check_inputs


class Scores(NamedTuple):
    """The figures of `fastxent.Scores` as tensors; `numpy` gives those back, with their metrics."""

    log_prob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    sum_p2: torch.Tensor
    rank: torch.Tensor
    rank_hi: torch.Tensor
    argmax: torch.Tensor
    is_greedy: torch.Tensor
    valid: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor
    id_log_probs: torch.Tensor

    def numpy(self) -> fastxent.Scores:
        """The same as `fastxent.Scores`."""
        return fastxent.Scores(*map(as_array, self))


def score(logits: torch.Tensor, targets: torch.Tensor, **options: Any) -> Scores:
    """What a scorer wants of each target in one read of the logits; no gradient.

    Parameters
    ----------
    logits : Tensor of bfloat16, float16, float8, float32 or float64, shape (..., V)
        On the CPU, or on a CUDA device, where this has not been run yet and the classes must be the last axis.
    targets : Tensor of integers, shape (...)
    **options
        As for `fastxent.score`; ``ids`` a tensor. Classes are the last axis unless ``axis`` says otherwise.

    Returns
    -------
    Scores
        A named tuple of tensors, on the CPU.

    Raises
    ------
    IndexError, TypeError, ValueError, fastxent.backends.BackendUnavailableError
        As `fastxent.score`.
    NotImplementedError
        If the logits are on another device.

    Examples
    --------
    >>> import torch, fastxent.torch
    >>> scores = fastxent.torch.score(torch.tensor([[20.0, 0.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]))
    >>> scores.rank.tolist(), scores.numpy().metrics().accuracy.tolist()
    ([1, 2], [0.5])
    """
    check_inputs(logits=logits, targets=targets)
    read = {
        name: as_array(value.cpu()) if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    found = fastxent.score(as_given(logits), as_array(targets.cpu()), **read)
    return Scores(**{name: as_tensor(np.asarray(values, order="C")) for name, values in found.as_dict().items()})
