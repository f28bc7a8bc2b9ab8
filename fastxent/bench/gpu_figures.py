"""Whether what is timed on a GPU is right: some rows, at the very shape, against the reference in float64.

Of a few rows of small shapes there would be no groups of rows to sum, no second round of blocks, no logit beyond 2^31.
"""

import contextlib
from typing import Any

import numpy as np

import fastxent
from fastxent import backends
from fastxent.bench import exact
from fastxent.bench.gpu_bars import GRADIENT, IN_PLACE, LOSS
from fastxent.state import IGNORED

_LOOKED_AT = 1 << 20  # logits, at most, where rows are looked at


def figures(problem, scorings=()):
    """Of a check of a `fastxent.bench.gpu_problem.Problem` and its `Scoring`s: a name, what was got, what is wanted,
    what is promised, and of what. The logits are gone afterwards.
    """
    with checked(problem.machine):
        rows = _Rows(problem)
        for scoring in scorings:
            yield from rows.of_scores(scoring)
        losses = yield from rows.one_by_one()
        yield from rows.of_the_mean(losses)


@contextlib.contextmanager
def checked(machine):
    """Within it what kernels are to fill holds nonsense before."""
    before, machine.checked = machine.checked, True
    try:
        yield
    finally:
        machine.checked = before


class _Rows:
    """Some rows, what the reference makes of each, and what may be off."""

    def __init__(self, problem):
        self._problem, self._some = problem, _some(problem)
        self._logits, self._targets = self._rows_of(problem.logits), problem.indices[self._some]
        options: dict[str, Any] = {
            name: value.astype(float) if isinstance(value, np.ndarray) else value
            for name, value in problem.given.items()
        }
        self._loss, self._gradient = fastxent.cross_entropy_with_grad(
            self._logits.astype(float), problem.given_targets()[self._some], reduction="none", backend="reference",
            **options,
        )  # fmt: skip
        # options add and subtract
        self._scale = np.abs(self._gradient).max(axis=1, keepdims=True) if options else None
        self._more = exact.SOFTCAP if "softcap" in options else 0.0

    def one_by_one(self):
        """Each row's own loss and gradient; returns the losses of all rows."""
        problem, named = self._problem, {"reduction": "none", **self._problem.options}
        self._spoil(problem.out)
        losses, _ = fastxent.cross_entropy_with_grad(problem.logits, problem.targets, out=problem.out, **named)
        alone = fastxent.cross_entropy(problem.logits, problem.targets, **named)
        all_losses, all_alone = self._numbers_of(losses), self._numbers_of(alone)
        found, wanted = (all_losses[self._some], self._rows_of(problem.out)), (self._loss, self._gradient)
        yield from exact.loss_and_gradient(found, wanted, problem.dtype, scale=self._scale, more=self._more)
        promised, _ = exact.promised(problem.dtype)
        yield "loss alone", all_alone[self._some], self._loss, promised + self._more
        yield "losses of all rows", all_alone, all_losses.astype(float), 2 * (promised + self._more)
        yield "all of them numbers", np.isfinite(all_losses).all(), np.bool_(True), 0.0
        return all_losses

    def of_the_mean(self, losses):
        """The calls that are timed: the mean of the losses of all rows, and its gradient, apart and in place."""
        problem, calls = self._problem, self._problem.calls()
        counted, weight = problem.indices != IGNORED, problem.given.get("weight")
        divisor = counted.sum() if weight is None else weight[problem.indices[counted]].sum(dtype=np.float64)
        mean, scale = losses.sum(dtype=np.float64) / divisor, None if self._scale is None else self._scale / divisor
        of_loss, of_entry = exact.promised(problem.dtype)
        yield "mean", self._numbers_of(calls[LOSS]()), mean, 2 * of_loss + self._more
        self._spoil(problem.out)
        with_gradient, _ = calls[GRADIENT]()
        yield "mean with its gradient", self._numbers_of(with_gradient), mean, 2 * of_loss + self._more
        apart = self._rows_of(problem.out)
        yield "gradient of the mean", apart, self._gradient / divisor, of_entry + self._more, scale
        calls[IN_PLACE]()
        bits = f"u{problem.dtype.itemsize}"
        yield "bits in place", self._rows_of(problem.logits).view(bits), apart.view(bits), 0.0

    def of_scores(self, scoring):
        """Every column of them, as `fastxent.score` would have them."""
        scoring.forget()
        scoring.ask()
        found = scoring.found(self._some)
        named = {"ids": np.empty((len(self._some), 0), np.int64), "top_k": found.top_ids.shape[1]}
        wanted = backends.get("reference").score(self._logits.astype(float), self._targets, **named)
        promised, _ = exact.promised(self._problem.dtype)
        for name, want in wanted._asdict().items():
            scale = np.abs(self._logits).astype(float).max(axis=1) + np.abs(want) if name == "lse" else None
            yield f"{name} of scores", getattr(found, name), want, 2 * promised, scale

    def _spoil(self, array):
        poison = self._problem.placed(np.full(self._problem.classes, np.nan, array.dtype))
        size = self._problem.classes * array.dtype.itemsize
        for i in self._some:
            self._problem.machine.copy(self._problem.stream, poison.address, array.address + i * size, size)

    def _rows_of(self, array):
        size, classes = self._problem.classes * array.dtype.itemsize, self._problem.classes
        return np.stack([self._problem.fetched(array.address + i * size, classes, array.dtype) for i in self._some])

    def _numbers_of(self, array):
        return self._problem.fetched(array.address, array.shape, array.dtype)


def _some(problem):
    """Rows to look at, in order: the first two, the last two, those about logit 2^31, and as many others as do not take
    long.
    """
    rows, classes = problem.rows, problem.classes
    count, middle = max(6, min(32, _LOOKED_AT // classes)), min(2**31 // classes, rows - 1)
    edges = {0, 1, middle, middle + 1, rows - 2, rows - 1}
    others = np.random.default_rng().integers(0, rows, max(0, count - len(edges)))
    return [i for i in sorted(edges | set(others.tolist())) if 0 <= i < rows]
