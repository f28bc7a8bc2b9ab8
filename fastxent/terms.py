"""The O(N) part of a loss: what the kernels are told of each row, and what is made of what they found.

One class for each kind of target; `of` picks it. A kernel is given ``targets``, ``spread``, ``wanted`` and
`coefficients`, and returns `fastxent.state.Statistics`. Options live here and in `arguments`, not in the kernels.
"""

import functools
from abc import ABC, abstractmethod

import numpy as np

from fastxent import reduction, rowmath
from fastxent.arguments import SparseTargets
from fastxent.rows import points, put
from fastxent.state import IGNORED, LARGEST, Coefficients, Spread

# of every row or class, where they do not differ
ONE, NOUGHT = np.ones(1), np.zeros(1)


def of(problem):
    """The terms of a `fastxent.arguments.Problem`."""
    if isinstance(problem.targets, SparseTargets):
        return SparseTerms(problem)
    return IndexTerms(problem) if len(problem.targets.shape) == 1 else DenseTerms(problem)


def is_of_probabilities(problem):
    """Whether the targets are probabilities, of all classes or of a few."""
    return isinstance(problem.targets, SparseTargets) or len(problem.targets.shape) == 2


def row_weight(problem):
    """What the target of each row counts in a mean: float64 (N,), or () where all count the same."""
    if is_of_probabilities(problem):
        return np.asarray(1.0)
    counted = np.asarray(problem.counted, np.float64)
    if problem.options.weight is None:
        return counted
    return counted * problem.options.weight[np.maximum(problem.targets, 0)]


def divisor(problem, counts):
    """What a reduced loss and its gradient are divided by, given the rows' `row_weight`."""
    options = problem.options
    if options.sample_weight is not None:
        counts = counts * options.sample_weight
    return reduction.divisor(counts, problem.logits.shape[0], options.reduction, options.denominator)


class _Terms(ABC):
    """What all kinds of targets share: sample weights, z-loss, temperature, the divisor and the reduction.

    A kind sets ``targets`` and ``spread`` for the kernels.
    """

    targets: np.ndarray
    spread: Spread | None

    def __init__(self, problem):
        self.problem, self.options = problem, problem.options
        self.rows, self.classes = problem.logits.shape
        self.class_weight = ONE if self.options.weight is None else self.options.weight
        self.row_weight = row_weight(problem)
        self.wanted = ("lse",) if self.options.z_loss or self.options.return_lse else ()

    def kernel_options(self):
        """Keyword arguments of a backend's `statistics`."""
        softcap, temperature = self.options.softcap, self.options.temperature
        return {"spread": self.spread, "softcap": softcap, "temperature": temperature, "wanted": self.wanted}

    @functools.cached_property
    def divisor(self):
        """What a reduced loss and its gradient are divided by."""
        return divisor(self.problem, self.row_weight)

    def row_losses(self, statistics):
        """The loss of each row, float64 (N,)."""
        options, problem = self.options, self.problem
        with np.errstate(invalid="ignore", over="ignore"):
            losses = self.losses(statistics)
            if options.z_loss:
                losses = losses + np.where(problem.counted, options.z_loss * statistics.lse**2, 0.0)
            if options.sample_weight is not None:
                losses = losses * options.sample_weight
        return losses

    def loss(self, statistics):
        """What the caller gets for the rows' statistics: the loss, or with ``return_lse`` the loss and the lse."""
        options, problem, losses = self.options, self.problem, self.row_losses(statistics)
        loss = reduction.reduce(losses, options.reduction, self.divisor, problem.loss_dtype, problem.shape)
        if not options.return_lse:
            return loss
        return loss, statistics.lse.astype(problem.loss_dtype).reshape(problem.shape)[()]

    def upstream(self, grad_output):
        """The gradient of what is returned by a row's loss, over the temperature: (N,), or (1,) for all rows."""
        g = grad_output / (self.divisor * self.options.temperature)
        if self.options.sample_weight is not None:
            g = g * self.options.sample_weight
        return g.reshape(-1)

    def coefficients(self, grad_output):
        """`fastxent.state.Coefficients` of the rows."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            g = self.upstream(grad_output)
            hit, smooth, extra = self.parts(g)
            return Coefficients(hit, smooth, extra, 2.0 * self.options.z_loss * g)

    @abstractmethod
    def losses(self, statistics):
        """(N,) without z-loss and sample weights."""

    @abstractmethod
    def parts(self, g):
        """hit, smooth and extra for the upstream gradient ``g``."""

    def correct(self, dlogits, statistics, grad_output):
        """The gradient (N, V) with what the kernel could not know written into it."""
        return dlogits

    @abstractmethod
    def mass(self, rows):
        """R of the rows of a slice, float64 (n,) or (1,): the sum of their shares."""

    def slope_of_probabilities(self, coefficients, lse, rows):
        """What p is multiplied by in the gradient of the rows of a slice, whose lse is given: (n,) or (1,)."""
        hit, smooth, extra, square = coefficients.of(rows)
        with np.errstate(invalid="ignore", over="ignore"):  # 0 times infinity, where nothing counts
            slope = hit + extra + smooth * self.mass(rows)
            return slope + square * lse if self.options.z_loss else slope


class IndexTerms(_Terms):
    """(1-e) w_t (lse - z_t) + (e/V) sum_k w_k (lse - z_k)."""

    def __init__(self, problem):
        super().__init__(problem)
        smoothing = self.options.label_smoothing
        self.targets = problem.targets
        if problem.counted is not True:
            self.targets = np.where(problem.counted, self.targets, IGNORED)
        self.spread = Spread(self.class_weight, None, 0.0, 1.0) if smoothing > 0.0 else None

    def losses(self, statistics):
        """(N,) without z-loss and sample weights."""
        smoothing = self.options.label_smoothing
        return rowmath.index_loss(statistics.nll, statistics.gap, self.row_weight, smoothing, self.classes)

    def parts(self, g):
        """hit, smooth and extra for the upstream gradient ``g``."""
        smoothing = self.options.label_smoothing
        weight = ONE if self.options.weight is None else self.row_weight
        return g * (1.0 - smoothing) * weight, g * (smoothing / self.classes), NOUGHT

    def mass(self, rows):
        """R, the same for all rows."""
        return _class_mass(self) if self.spread is not None else NOUGHT


class _ProbabilityTerms(_Terms):
    """Probabilities have no target of their own: what is left out of a row's sum is its largest logit."""

    def __init__(self, problem):
        super().__init__(problem)
        self.targets = np.where(problem.counted, LARGEST, np.full(self.rows, IGNORED))


class DenseTerms(_ProbabilityTerms):
    """sum_k share_k (lse - z_k) with the shares of `rowmath.share_of`."""

    def __init__(self, problem):
        super().__init__(problem)
        smoothing = self.options.label_smoothing
        if smoothing == 1.0:
            self.spread = Spread(self.class_weight / self.classes, None, 0.0, 1.0)
        else:
            self.spread = Spread(self.class_weight, problem.targets, 1.0 - smoothing, smoothing / self.classes)

    def losses(self, statistics):
        """(N,) without z-loss and sample weights."""
        return statistics.gap

    def parts(self, g):
        """hit, smooth and extra for the upstream gradient ``g``."""
        return NOUGHT, g, NOUGHT

    def mass(self, rows):
        """R of each row."""
        share = rowmath.share_of(
            self.class_weight, self.problem.targets[rows].astype(np.float64), self.options.label_smoothing, self.classes
        )
        return np.broadcast_to(share, (len(share), self.classes)).sum(axis=1)


class SparseTerms(_ProbabilityTerms):
    """sum_j (1-e) w_j q_j (lse - z_j) over the ids given, + (e/V) sum_k w_k (lse - z_k).

    The kernels see no ids: they give each row's lse through its largest logit, and the few classes named are visited
    here, in float64.
    """

    def __init__(self, problem):
        super().__init__(problem)
        smoothing = self.options.label_smoothing
        self.spread = Spread(self.class_weight, None, 0.0, 1.0) if smoothing > 0.0 else None
        self.wanted = (*self.wanted, "target_logit")
        self._ids, self._first, mass = _merged(problem.targets)
        self._weight = np.broadcast_to(self.class_weight, self.classes)[self._ids]
        self._mass = (1.0 - smoothing) * self._weight * mass
        # taken now: the gradient may be written over the logits
        self._logits, self._slopes = self._in_units(points(problem.logits, self._ids))

    def losses(self, statistics):
        """(N,) without z-loss and sample weights."""
        terms = np.where(self._mass > 0.0, self._mass * self._gaps(statistics), 0.0)
        losses = np.where(self.problem.counted, terms.sum(axis=1), 0.0)
        return losses if self.spread is None else losses + self.options.label_smoothing / self.classes * statistics.gap

    def parts(self, g):
        """hit, smooth and extra for the upstream gradient ``g``."""
        return NOUGHT, g * (self.options.label_smoothing / self.classes), g * self._mass.sum(axis=1)

    def mass(self, rows):
        """R, the same for all rows: that of the ids is in extra."""
        return _class_mass(self) if self.spread is not None else NOUGHT

    @np.errstate(divide="ignore", invalid="ignore", over="ignore")
    def correct(self, dlogits, statistics, grad_output):
        """The entries of the classes named, which the kernel took for any others, written anew."""
        options, g = self.options, self.upstream(grad_output)[:, None]
        smooth = g * (options.label_smoothing / self.classes)
        share = self._weight if self.spread is not None else 0.0
        spread_mass = self.mass(slice(None))
        square = 2.0 * options.z_loss * g * statistics.lse[:, None] if options.z_loss else 0.0
        mass = self._mass.sum(axis=1, keepdims=True)
        gaps = self._gaps(statistics)
        own, miss = np.exp(-gaps), -np.expm1(-gaps)
        entries = rowmath.NUMPY_ROWS.at_target(0.0, g, square, mass - self._mass, self._mass, miss, own)
        entries = entries + smooth * (spread_mass * own - share)
        counted = np.broadcast_to(self.problem.counted, self.rows)[:, None]
        put(dlogits, self._ids, entries * self._slopes, self._first & counted)
        return dlogits

    def _gaps(self, statistics):
        """lse - z of the classes named, nats."""
        nats = float(rowmath.rate(np.float64, self.options.softcap, self.options.temperature)[2])
        with np.errstate(invalid="ignore"):
            below = np.maximum(statistics.target_logit[:, None] - self._logits, 0.0)
            return statistics.nll[:, None] + nats * below

    def _in_units(self, logits):
        """Logits as the kernels take them, and their slopes."""
        if self.options.softcap is None:
            return logits.astype(np.float64), 1.0
        real = self.problem.loss_dtype.type
        terms = rowmath.build_terms(rowmath.NumpyOps, rowmath.FLOAT64 if real is np.float64 else rowmath.FLOAT32)
        with np.errstate(invalid="ignore", over="ignore"):
            capped, slopes = terms.tanh_parts(logits.astype(real) * real(1.0 / self.options.softcap))
        return capped.astype(np.float64), slopes.astype(np.float64)


def _class_mass(of_rows):
    """The sum of all classes' weights, (1,)."""
    return np.broadcast_to(of_rows.class_weight, of_rows.classes).sum(keepdims=True)


def _merged(targets):
    """Ids sorted within each row, which of them come first among equals, and these bear the sum of all: (N, k) each."""
    order = np.argsort(targets.ids, axis=1, kind="stable")
    ids = np.take_along_axis(targets.ids, order, axis=1)
    mass = np.take_along_axis(targets.probabilities, order, axis=1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    merged = np.zeros(ids.shape)
    if ids.size:
        merged[first] = np.add.reduceat(mass.reshape(-1), np.flatnonzero(first))
    return ids, first, merged
