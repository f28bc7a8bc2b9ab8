"""The accuracy battery: hostile, typical and confident rows, each with its exact loss and gradient.

A case is a row with its target. `Block` is a recipe for some of one kind, width and dtype; `outcome` says how far the
cpu backend is from exact arithmetic on all of a kind. ``python -m tests.battery`` prints the tables of
docs/reliability.md.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import fastxent
from fastxent.bench.exact import worst_ulps
from tests import exact

DTYPES = ("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
# one class, few, a vector and one more, the most and least classes of either kind of kernel, blocks, strips of 4,096
WIDTHS = (1, 2, 3, 16, 17, 100, 128, 129, 257, 1000, 4097, 9001)
LARGE = (65_537, 262_144)
# where a row's target is; a block takes them in turn
ROLES: dict[str, Callable[[Any, Any], Any]] = {
    "anywhere": lambda rng, row: rng.integers(len(row)),
    "largest": lambda rng, row: row.argmax(),
    "smallest": lambda rng, row: row.argmin(),
    "last": lambda rng, row: len(row) - 1,
    "second": lambda rng, row: np.argsort(row, kind="stable")[-min(2, len(row))],
    "first": lambda rng, row: 0,
}


def _typical(scale):
    return lambda rng, shape, limits: scale * rng.standard_normal(shape)


def _of_steps(offset):
    """Logits some units of the last place from ``offset``, as the dtype stores it."""

    def draw(rng, shape, limits):
        step = float(limits.eps) * abs(offset) * rng.choice([1.0, 2.0, 1e3], (shape[0], 1))
        return offset + step * rng.integers(-40, 41, shape)

    return draw


def _with_some(number, share):
    def draw(rng, shape, limits):
        logits = 4 * rng.standard_normal(shape)
        logits[rng.random(shape) < share] = number
        logits[:, rng.integers(shape[1])] = 1.0
        return logits

    return draw


def _with_one(number):
    def draw(rng, shape, limits):
        logits = rng.standard_normal(shape)
        logits[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = number
        return logits

    return draw


def _confident(loss):
    """The target so far above the others that the loss is about ``loss``."""

    def draw(rng, shape, limits):
        logits = rng.standard_normal(shape)
        others = np.log(np.exp(logits[:, 1:]).sum(axis=1)) if shape[1] > 1 else np.zeros(shape[0])
        logits[:, 0] = others - np.log(np.expm1(loss))
        return rng.permuted(logits, axis=1)

    return draw


def _depth(limits):
    """How far below the largest logit a probability is still a normal number, and a little more."""
    return 110.0 if limits.bits <= 32 else 760.0


def _stairs(rng, shape, limits):
    """Every 300 classes so much higher that nothing before it counts in float32, then the same downwards."""
    steps = np.arange(shape[1]) // 300 * 40.0
    signs = rng.choice([-1.0, 1.0], (shape[0], 1))
    return signs * steps + rng.standard_normal(shape)


def _far_below(rng, shape, limits):
    """Equal logits but for one, 1e3 to 1e29 below them."""
    logits = np.zeros(shape)
    logits[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = -(10.0 ** rng.uniform(3, 29, shape[0]))
    return logits + rng.choice([0.0, 1.0, -1e6], (shape[0], 1))


def _exponents(rng, shape, limits):
    low, high = np.log2(float(limits.smallest_subnormal)), np.log2(float(limits.max))
    return rng.choice([-1.0, 1.0], shape) * np.exp2(rng.uniform(low, high, shape))


TYPICAL = {f"typical, scale {scale}": _typical(scale) for scale in (1, 4, 12)}
CONFIDENT = {
    f"confident, loss {loss:.0e}".replace("e-0", "e-"): _confident(loss)
    for loss in (1e-2, 1e-4, 1e-7, 1e-10, 1e-15, 1e-20, 1e-25, 1e-30)
}
OFFSET = {
    f"offset {offset:.0e}".replace("e+0", "e").replace("e+", "e"): _of_steps(offset)
    for offset in (1e2, 1e4, -1e6, 1e8, -1e15, 1e30, -1e30)
}
HOSTILE = {
    "all equal": lambda rng, shape, limits: np.broadcast_to(100 * rng.standard_normal((shape[0], 1)), shape),
    "ties": lambda rng, shape, limits: rng.integers(-2, 3, shape) * 1.0,
    "tied at the top": lambda rng, shape, limits: np.minimum(8 * rng.standard_normal(shape), 3.0),
    "one step apart": lambda rng, shape, limits: 1 + float(limits.eps) * rng.integers(0, 2, shape),
    "subnormal": lambda rng, shape, limits: float(limits.smallest_subnormal) * rng.integers(-9, 10, shape),
    "of any exponent": _exponents,
    "one huge": _with_one(1e30),
    "one hugely negative": _with_one(-1e30),
    "one far below": _far_below,
    "the largest numbers": lambda rng, shape, limits: float(limits.max) * rng.choice([-1.0, 0.5, 1.0], shape),
    "alternating": lambda rng, shape, limits: rng.uniform(1, 60, (shape[0], 1)) * (1 - 2 * (np.arange(shape[1]) % 2)),
    "sorted": lambda rng, shape, limits: np.sort(20 * rng.standard_normal(shape), axis=1),
    "sorted downwards": lambda rng, shape, limits: -np.sort(20 * rng.standard_normal(shape), axis=1),
    "stairs": _stairs,
    "down to underflow": lambda rng, shape, limits: -_depth(limits) * rng.random(shape),
    "whole multiples of ln 2": lambda rng, shape, limits: np.log(2) * rng.integers(-150, 151, shape),
    "a third -inf": _with_some(-np.inf, 0.3),
    "nearly all -inf": _with_some(-np.inf, 0.99),
    "masked by the lowest number": lambda rng, shape, limits: np.where(
        rng.random(shape) < 0.5, float(limits.min), 4 * rng.standard_normal(shape)
    ),
}
UNDEFINED = {
    "one +inf": _with_one(np.inf),
    "one NaN": _with_one(np.nan),
    "a third NaN": _with_some(np.nan, 0.3),
    "all -inf": lambda rng, shape, limits: np.full(shape, -np.inf),
    "infinities of both signs": lambda rng, shape, limits: rng.choice([-np.inf, np.inf], shape),
}
KINDS = TYPICAL | CONFIDENT | OFFSET | HOSTILE | UNDEFINED
OF_LARGE = (
    *TYPICAL, "confident, loss 1e-2", "confident, loss 1e-20", "offset 1e4", "all equal", "ties", "alternating",
    "sorted", "sorted downwards", "stairs", "down to underflow", "a third -inf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one kind; built as `fastxent.bench.cases.Case` builds, so that `exact.Exact` takes either."""

    kind: str
    classes: int
    dtype: str
    options: tuple[tuple[str, Any], ...] = ()
    rows: int = len(ROLES)

    @property
    def targets(self):
        return "index"

    @property
    def name(self):
        return f"{self.dtype}, {self.kind}, {self.classes:,} classes"

    def build(self):
        """``logits, targets, options``; rows that the dtype cannot tell from a NaN row are left out."""
        rng = np.random.default_rng([*self.kind.encode(), self.classes])
        # of the most classes the smallest and the last too
        rows = self.rows if self.classes < 4096 else {65_537: 2, 262_144: 4}.get(self.classes, 3)
        with np.errstate(over="ignore", invalid="ignore"):
            logits = np.array(KINDS[self.kind](rng, (rows, self.classes), ml_dtypes.finfo(self.dtype))).astype(
                self.dtype
            )
            wide = logits.astype(np.float64)
        targets = np.array([role(rng, row) for role, row in zip(ROLES.values(), wide, strict=False)])
        if self.kind.startswith("confident"):
            targets[1:] = wide[1:].argmax(axis=1)
        kept = undefined(wide) == (self.kind in UNDEFINED)
        return logits[kept], targets[kept], {"reduction": "none"} | dict(self.options)

    def role(self, row):
        """Where the target of a row is, in a word."""
        return "largest" if row and self.kind.startswith("confident") else [*ROLES][row]


def undefined(logits):
    """Which rows have no softmax: those that hold +inf or NaN, or nothing but -inf."""
    with np.errstate(invalid="ignore"):
        return ~(logits.max(axis=1) < np.inf) | (logits.max(axis=1) == -np.inf)


def blocks(kind, dtype):
    """The blocks of a kind that have a row."""
    large = LARGE if kind in OF_LARGE else ()
    found = (Block(kind, width, dtype) for width in (*WIDTHS, *large))
    return [block for block in found if len(block.build()[0])]


@functools.lru_cache(64)
def exact_of(block):
    """`exact.Exact` of a block, NaN where a row has no softmax."""
    with np.errstate(invalid="ignore"):
        want = exact.Exact(block)
    nowhere = undefined(want.logits.astype(np.float64))
    want.losses[nowhere], want.gradient[nowhere], want.terms[nowhere] = np.nan, np.nan, np.nan
    with np.errstate(over="ignore"):  # what the dtype of a loss cannot hold
        beyond = np.isinf(want.losses.astype(exact.computed(block.dtype)))
    want.losses[beyond] = np.inf
    return want


def check(block, backend, tiny=1.0):
    """Hold every loss and gradient entry of a block to the promise; see `compare`."""
    want = exact_of(block)
    found = fastxent.cross_entropy_with_grad(want.logits, want.targets, backend=backend, **want.options)
    compare(block, backend, *found, tiny)


def compare(block, backend, losses, gradient, tiny=1.0):
    """Hold what a backend found to the promise; below ``tiny`` smallest normal numbers nothing is asked."""
    want, computed, slack = exact_of(block), exact.computed(block.dtype), 0.0
    if backend == "reference" and computed == "float64":  # z - z_t is rounded, and counts while exp does not underflow
        slack = np.finfo(np.float64).eps * 750
    tiny, loss_budget = tiny * np.finfo(computed).tiny, want.loss_budget
    with np.errstate(invalid="ignore"):
        scale = np.abs(want.losses) * (1 + slack / loss_budget) + want.loss_slack / loss_budget
        terms = want.terms * (1 + 2 * slack / want.gradient_budget)
    exact.assert_close(losses, want.losses, scale, loss_budget, tiny)
    exact.assert_close(gradient, want.gradient, terms, want.gradient_budget, tiny * want.most[:, None])


class Outcome(NamedTuple):
    """How many cases of a kind there are, and their worst loss and gradient entry in units of the last place."""

    cases: int
    loss: float
    gradient: float
    worst_loss: str
    worst_gradient: str


@functools.cache
def outcome(kind, dtype):
    """The `Outcome` of the cpu backend on all of a kind."""
    cases, loss, gradient = 0, (-1.0, ""), (-1.0, "")
    for block in blocks(kind, dtype):
        want = exact_of(block)
        got, entries = fastxent.cross_entropy_with_grad(want.logits, want.targets, **want.options)
        cases += len(got)
        for i in range(len(got)):
            name = f"{block.name}, row {i}"
            loss = max(loss, (_ulps(got[i : i + 1], want.losses[i : i + 1]), name))
            gradient = max(gradient, (_ulps(entries[i], want.gradient[i]), name))
    return Outcome(cases, loss[0], gradient[0], loss[1], gradient[1])


def _ulps(got, want):
    finite = np.isfinite(want) & np.isfinite(got.astype(np.float64))
    return worst_ulps(got[finite], want[finite]) if finite.any() else 0.0


def table():
    """Markdown: of each kind and dtype the number of cases, and the worst loss and gradient entry in ulps."""
    yield "| rows | " + " | ".join(DTYPES) + " |"
    yield "|---|" + "---|" * len(DTYPES)
    for kind in KINDS:
        found = [outcome(kind, dtype) for dtype in DTYPES]
        cells = [f"{o.cases}: {o.loss:.2f}, {o.gradient:.2f}" if o.cases else "" for o in found]
        yield f"| {kind} | " + " | ".join(cells) + " |"
    totals = [sum(outcome(kind, dtype).cases for kind in KINDS) for dtype in DTYPES]
    yield "| all | " + " | ".join(f"{total:,}" for total in totals) + " |"


def worst(dtype):
    """``{"loss": (ulps, name), "gradient": (ulps, name)}`` of a dtype, over all kinds."""
    found = [outcome(kind, dtype) for kind in KINDS]
    return {
        "loss": max((o.loss, o.worst_loss) for o in found),
        "gradient": max((o.gradient, o.worst_gradient) for o in found),
    }


if __name__ == "__main__":
    print("\n".join(table()))
    for dtype in DTYPES:
        for what, (ulps, name) in worst(dtype).items():
            print(f"{what}: {ulps:.3f} ulp, {name}")
