"""The operations on given arrays that a comparison checks and times, and what cannot be beaten."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastxent.bench import exact, limits, linear, plan
from fastxent.bench.cases import speed_case


@dataclass(frozen=True)
class Task:
    """Candidates of an operation on ``arrays``, what is exact of which rows, and the limit.

    ``scale`` is the least of a row, in whose units its error is: 1 nat, or 1 in probability, so that a confident row
    condemns nobody. ``promised`` is what ours may be off by, None where no more is promised than of others.
    """

    operation: str
    setups: dict[str, Callable]
    arrays: tuple[np.ndarray, ...]
    rows: Any
    want: np.ndarray
    limit_name: str
    limit: Callable
    elements: int
    moved: int | None = None  # bytes
    scale: float = 0.0
    promised: float | None = None


def build(shape, dtype):
    """The loss and the loss with its gradient on the typical problem of this shape."""
    return (_of_hidden_states if len(shape) == 3 else _of_logits)(shape, dtype)


def _of_hidden_states(shape, dtype):
    problem = linear.build(shape, dtype)
    each = zip(
        plan.LINEAR.items(),
        linear.expected(*problem),
        linear.limits(*problem[:2]),
        ("product", "products"),
        strict=True,
    )
    return [
        Task(operation, setups, problem, slice(0, len(want)), want, name, limit, shape[0] * shape[2])
        for (operation, setups), want, limit, name in each
    ]


def _of_logits(shape, dtype):
    logits, targets, _ = speed_case(shape[0], shape[1], dtype).build()
    rows = exact.some_rows(len(logits))
    wanted = exact.losses_and_gradient(logits[rows], targets[rows])
    cut = partial(limits.read, logits), partial(limits.copy, logits, np.empty_like(logits))
    return [
        Task(
            operation, setups, (logits, targets), rows, want, name, limit, logits.size, times * logits.nbytes, 1.0, own
        )
        for (operation, setups), want, name, limit, times, own in zip(
            plan.OPERATIONS.items(), wanted, ("read", "copy"), cut, (1, 2), exact.promised(dtype), strict=True
        )
    ]
