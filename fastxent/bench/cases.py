"""The one table of problems: tests check them, asv and pytest-benchmark time them.

A `Case` is a recipe; `Case.build` makes the arrays, the same ones every time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

# how the logits of a row are drawn, from a generator and a shape
KINDS = {
    "typical": lambda rng, shape: 4 * rng.standard_normal(shape),
    "flat": lambda rng, shape: np.zeros(shape),
    "wide": lambda rng, shape: 12 * rng.standard_normal(shape),
    "offset": lambda rng, shape: 1e4 + rng.standard_normal(shape),
    "huge offset": lambda rng, shape: -3e7 + 8 * rng.integers(-3, 4, shape),
    "confident": lambda rng, shape: rng.standard_normal(shape),  # and the target 5 to 60 above, see `Case.build`
    "masked": lambda rng, shape: np.where(rng.random(shape) < 0.3, -np.inf, 4 * rng.standard_normal(shape)),
    "sorted": lambda rng, shape: np.sort(20 * rng.standard_normal(shape), axis=-1),
    "ties": lambda rng, shape: rng.integers(-2, 3, shape).astype(float),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Logits of ``rows`` x ``classes`` drawn as ``kind``, seeded by the case itself, and options of the loss.

    ``targets`` is "index", "dense" (probabilities of all classes) or "sparse" (of three). ``ignored`` is the share of
    index targets set to -100; ``weights`` asks for class weights and sample weights, some of them 0.
    """

    rows: int
    classes: int
    kind: str = "typical"
    dtype: str = "float32"
    ignored: float = 0.0
    weights: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    targets: str = "index"

    @property
    def name(self):
        """A readable identifier: shape, dtype, kind and what is switched on."""
        parts = [f"{self.rows}x{self.classes}", self.dtype, self.kind.replace(" ", "-")]
        parts += [self.targets] * (self.targets != "index")
        parts += [f"ignored={self.ignored:g}"] * bool(self.ignored) + ["weights"] * self.weights
        return "-".join(parts + [f"{key}={value}" for key, value in self.options])

    def build(self):
        """``logits, targets, options`` of the problem."""
        rng = np.random.default_rng([self.rows, self.classes, *self.kind.encode()])
        logits = KINDS[self.kind](rng, (self.rows, self.classes)).astype(self.dtype)
        targets = rng.integers(0, self.classes, self.rows)
        each = np.arange(self.rows)
        if self.kind == "confident":
            logits[each, targets] = logits.max(axis=1) + rng.uniform(5, 60, self.rows).astype(self.dtype)
        if self.kind == "masked":
            logits[each, targets] = 1.0
        ignored = rng.random(self.rows) < self.ignored
        if self.targets == "index":
            targets[ignored] = -100
        options = dict(self.options)
        if self.weights:
            options["weight"] = np.where(rng.random(self.classes) < 0.1, 0.0, rng.random(self.classes) + 0.1)
            options["sample_weight"] = np.where(rng.random(self.rows) < 0.2, 0.0, rng.random(self.rows) + 0.1)
        if self.targets == "dense":
            probabilities = np.where(rng.random(logits.shape) < 0.5, 0.0, rng.random(logits.shape) / self.classes)
            probabilities[each, targets] += 0.5
            probabilities[np.isneginf(logits)] = 0.0
            return logits, probabilities.astype(self.dtype), options
        if self.targets == "sparse":
            ids = np.stack([targets, targets, rng.integers(0, self.classes, self.rows)], axis=1)
            probabilities = rng.random(ids.shape)
            probabilities[np.isneginf(logits[each[:, None], ids])] = 0.0
            ids[0, 2] = -100
            return logits, (ids, probabilities), options
        return logits, targets, options


def _options(**options):
    return tuple(options.items())


# one class, fewer than a vector, around a vector, a block (256), a strip (4,096), several strips with a ragged end
WIDTHS = (1, 2, 7, 16, 17, 255, 256, 257, 1000, 4096, 4097, 9001)
DTYPES = ("float32", "float64")
# the kinds of rows that a dtype of few bits can hold: float8_e4m3fn has no infinity
SMALL_DTYPES = {
    "float16": tuple(kind for kind in KINDS if kind != "huge offset"),
    "bfloat16": tuple(KINDS),
    "float8_e4m3fn": ("typical", "flat", "wide", "confident", "sorted", "ties"),
    "float8_e5m2": tuple(kind for kind in KINDS if kind != "huge offset"),
}

AGREEMENT = (
    tuple(
        Case(rows, classes, kind, dtype)
        for dtype in DTYPES
        for rows, classes, kind in (
            *((6, width, "typical") for width in WIDTHS),
            *((6, 300, kind) for kind in KINDS),
            *((4, 9001, kind) for kind in ("confident", "masked", "sorted", "huge offset")),
            (2, 65_537, "typical"),  # more classes than a 16-bit index holds
            (33, 10, "confident"),
        )
    )
    + tuple(
        Case(7, 1000, "typical", dtype, ignored, weights, options)
        for dtype in DTYPES
        for ignored in (0.0, 0.4, 1.0)
        for weights in (False, True)
        for options in (
            _options(),
            _options(reduction="sum"),
            _options(reduction="none", label_smoothing=0.1),
            _options(label_smoothing=1.0),
            _options(denominator=3.5, label_smoothing=0.25),
        )
    )
    + tuple(
        Case(7, width, kind, dtype, weights=weights, targets=targets, options=options)
        for dtype in DTYPES
        for targets in ("index", "dense", "sparse")
        for width, kind, weights, options in (
            (40, "confident", False, _options(reduction="none")),
            (700, "masked", True, _options(z_loss=1e-3)),
            (40, "typical", True, _options(label_smoothing=0.2, z_loss=0.01, softcap=5.0, temperature=0.8)),
            (300, "wide", True, _options(softcap=30.0, reduction="none")),
            (700, "confident", False, _options(temperature=0.3, label_smoothing=0.1)),
            (40, "ties", True, _options(label_smoothing=1.0, temperature=3.0)),
            (9001, "typical", True, _options(softcap=8.0, label_smoothing=0.1, z_loss=1e-4, reduction="sum")),
            (9001, "confident", False, _options(reduction="none", z_loss=1e-4)),
            (1, "typical", False, _options(label_smoothing=0.1, z_loss=0.1)),
        )
    )
    + tuple(
        Case(7, 700, "typical", dtype, targets=targets, options=_options(softcap=3.0, temperature=1.5, z_loss=1e-3))
        for dtype in SMALL_DTYPES
        for targets in ("index", "dense", "sparse")
    )
    + tuple(
        case
        for dtype, kinds in SMALL_DTYPES.items()
        for case in (
            *(Case(6, width, "typical", dtype) for width in WIDTHS),
            *(Case(6, 300, kind, dtype) for kind in kinds),
            Case(7, 9001, "wide", dtype, 0.4, weights=True, options=_options(reduction="none", label_smoothing=0.1)),
            Case(7, 40, "confident", dtype, 0.4, weights=True, options=_options(label_smoothing=0.1)),
        )
    )
)

# (rows, classes) to time one by one: the digits, ImageNet, a small and a large vocabulary
SPEED_SHAPES = ((100_000, 10), (16_384, 1000), (512, 32_000), (128, 128_256))
# and side by side, where nobody names a shape
SHAPES = SPEED_SHAPES[1:]
# the classes of digits, ImageNet, a small vocabulary, GPT-2's, Llama 3's, Gemma's; 2**24 logits each
SUITE_SHAPES = tuple((max(1, 2**24 // classes), classes) for classes in (10, 1000, 32_000, 50_257, 128_256, 262_144))
# rows, hidden width, classes: a small model's batch, Llama 3's vocabulary under many tokens and under few wide ones
HIDDEN_SHAPES = ((1024, 768, 32_000), (2048, 1024, 128_256), (64, 4096, 128_256))
# on a GPU: a gigabyte of bfloat16 or more, but for the second, which is small, and the last, of few rows
GPU_SHAPES = (
    (65_536, 8192), (4096, 32_000), (32_768, 32_000), (16_384, 50_257), (8192, 128_256), (4096, 262_144),
    (1_048_576, 1000), (4_194_304, 256), (8, 262_144),
)  # fmt: skip


def speed_case(rows: int, classes: int, dtype: str = "float32") -> Case:
    """The typical problem of a shape."""
    return Case(rows, classes, "typical", dtype)
