"""What a caller may pass: every option, and the problem that arguments make together.

`normalise` turns arguments into a `Problem` the backends can take, and raises before anything is written. Nothing
here computes a loss; what is asked of a single argument is in `checks`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastxent import checks
from fastxent.products import Layer
from fastxent.rows import as_rows, classes_last, take
from fastxent.state import IGNORED

# class indices, probabilities of all classes, or of a few a row: (ids, probabilities)
Targets = ArrayLike | tuple[ArrayLike, ArrayLike]


class Options(NamedTuple):
    """The options of the cross entropy family, with their defaults; `fastxent.cross_entropy` explains each."""

    weight: ArrayLike | None = None
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    sample_weight: ArrayLike | None = None
    reduction: str = "mean"
    denominator: float | None = None
    return_lse: bool = False
    axis: int = -1


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Probabilities of k classes a row: ids (N, k) int64, probabilities (N, k) float64, 0 where a slot is not used."""

    ids: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, slots=True)
class Problem:
    """Checked arguments: rows of logits (N, V), and as targets class indices (N,) with IGNORED where a row counts for
    nothing, probabilities (N, V), or `SparseTargets`.

    ``counted`` tells which rows count: bool (N,), or True for all. In ``options`` weight and sample_weight are float64
    (V,) and (N,), or None; ``shape`` is the targets' without classes. A `fastxent.products.Layer` may stand for logits.
    """

    logits: np.ndarray | Layer
    targets: np.ndarray | SparseTargets
    counted: np.ndarray | bool
    options: Options
    shape: tuple[int, ...]
    loss_dtype: np.dtype

    def part(self, logits, rows):
        """The problem of some rows that count, a slice or indices, whose logits are given: their losses one by one."""
        targets, sample_weight = self.targets, self.options.sample_weight
        if isinstance(targets, SparseTargets):
            targets = SparseTargets(targets.ids[rows], targets.probabilities[rows])
        else:
            targets = take(targets, rows)
        if sample_weight is not None:
            sample_weight = np.asarray(sample_weight)[rows]
        options = self.options._replace(sample_weight=sample_weight, reduction="none", denominator=None)
        return Problem(logits, targets, True, options, logits.shape[:1], checks.loss_dtype(logits.dtype))


def normalise(logits, targets, options):
    """The `Problem` of logits and targets under ``options`` (an Options or a mapping); classes lie along its axis."""
    options = as_options(options)
    logits = checks.read_logits(logits, options.axis)
    return _problem(as_rows(logits), logits.shape, checks.loss_dtype(logits.dtype), targets, options)


def normalise_linear(hidden, linear_weight, linear_bias, targets, options, wide=False):
    """The `Problem` whose logits are hidden states times an output matrix: a `fastxent.products.Layer`."""
    options = options_of_layer(options)
    layer, batch, loss_dtype = read_layer(hidden, linear_weight, linear_bias, wide)
    return _problem(layer, (*batch, layer.shape[1]), loss_dtype, targets, options)


def read_layer(hidden, linear_weight, linear_bias, wide=False):
    """The `fastxent.products.Layer` of hidden states (..., K), the shape of their leading axes, and the losses' dtype;
    the layer's is that, or float64 where ``wide``.
    """
    hidden, weight = checks.read_array(hidden, "hidden"), checks.read_array(linear_weight, "linear_weight")
    bias = None if linear_bias is None else checks.read_array(linear_bias, "linear_bias")
    dtype = check_layer(hidden, weight, bias)
    layer = Layer(as_rows(hidden), weight, bias, np.dtype(np.float64) if wide else dtype)
    return layer, hidden.shape[:-1], dtype


def check_layer(hidden, weight, bias):
    """What is computed with, of three (the last may be None) that have a ``shape`` and ``dtype``; or a TypeError or
    ValueError says why they do not go together.
    """
    checks.check_dtype(hidden.dtype, "hidden")
    checks.check_dtype(weight.dtype, "linear_weight")
    if len(hidden.shape) < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have the shape (..., K) with K at least 1; got {hidden.shape}")
    if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"linear_weight must have the shape (V, {hidden.shape[-1]}) with V at least 1, a row of hidden's width for "
            f"each class; got {weight.shape}"
        )
    given = [hidden, weight]
    if bias is not None:
        given.append(bias)
        checks.check_dtype(bias.dtype, "linear_bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"linear_bias must have shape ({weight.shape[0]},), one number a class; got {bias.shape}")
    return np.result_type(*(checks.loss_dtype(array.dtype) for array in given))


def _problem(rows, logits_shape, loss_dtype, targets, options):
    """The `Problem` of rows (N, V) of logits of a shape (..., V)."""
    check_scalars(options)
    classes, shape = logits_shape[-1], logits_shape[:-1]
    weight = None if options.weight is None else _read_weight(options.weight, classes)
    sample_weight = None if options.sample_weight is None else _read_sample_weight(options.sample_weight, shape)
    plain = weight is None and sample_weight is None
    if isinstance(targets, tuple):
        marked, counted = _read_sparse(targets, options.ignore_index, shape, classes), True
    elif (targets := np.asarray(targets)).dtype.kind in "iu":
        check_targets(targets.shape, targets.dtype, logits_shape, options.axis)
        marked, counted = mark_ignored(targets.reshape(-1), options.ignore_index, classes)
    else:
        marked, counted = _read_probabilities(targets, options, logits_shape), True
    if sample_weight is not None and not sample_weight.all():
        counted = counted & (sample_weight > 0.0)
    return Problem(
        logits=rows,
        targets=marked,
        counted=counted,
        options=options if plain else options._replace(weight=weight, sample_weight=sample_weight),
        shape=shape,
        loss_dtype=loss_dtype,
    )


def _read_probabilities(targets, options, logits_shape):
    """Dense probabilities as rows (N, V)."""
    probabilities = targets
    if targets.ndim == len(logits_shape) and -targets.ndim <= options.axis < targets.ndim:
        probabilities = classes_last(targets, options.axis)
    if probabilities.shape != logits_shape:
        check_targets(targets.shape, targets.dtype, logits_shape, options.axis)
    if not checks.is_floating(targets.dtype):
        raise TypeError(f"targets must be class indices or probabilities, not {targets.dtype}")
    check_no_ignored_class(options.ignore_index)
    checks.check_amounts("targets", targets)
    return as_rows(probabilities)


def check_no_ignored_class(ignore_index):
    """Probabilities ignore no class."""
    if ignore_index is not None and ignore_index >= 0:
        raise ValueError(f"ignore_index must be negative or None where targets are probabilities; got {ignore_index}")


def _read_sparse(targets, ignore_index, shape, classes):
    if len(targets) != 2:
        raise ValueError(f"sparse targets must be two arrays, (ids, probabilities); got {len(targets)}")
    ids, probabilities = map(np.asarray, targets)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids of sparse targets must be integers, not {ids.dtype}")
    if not checks.is_floating(probabilities.dtype):
        raise TypeError(f"probabilities of sparse targets must be real numbers, not {probabilities.dtype}")
    if ids.shape[:-1] != shape or ids.ndim != len(shape) + 1:
        raise ValueError(f"ids of sparse targets must have the shape {shape} and one axis more; got {ids.shape}")
    if probabilities.shape != ids.shape:
        raise ValueError(
            f"probabilities of sparse targets must have the ids' shape {ids.shape}, not {probabilities.shape}"
        )
    marked, used = mark_ignored(ids.reshape(-1), ignore_index, classes)
    used = np.broadcast_to(used, marked.shape).reshape(math.prod(shape), ids.shape[-1])
    probabilities = probabilities.reshape(used.shape)
    checks.check_amounts("probabilities of sparse targets", probabilities[used])
    marked = marked.reshape(used.shape)
    return SparseTargets(np.where(used, marked, 0), np.where(used, probabilities.astype(np.float64), 0.0))


def check_targets(shape, dtype, logits_shape, axis=-1):
    """Class indices of this ``shape`` and ``dtype`` fit logits (..., V), or a TypeError or ValueError says why not."""
    batch = logits_shape[:-1]
    if dtype.kind in "iu" and len(shape) == len(logits_shape):
        raise TypeError(f"targets of the logits' rank must be probabilities, floating; got {dtype} of shape {shape}")
    if dtype.kind not in "iu" and len(shape) == len(batch):
        raise TypeError(f"targets must be integer class indices, or probabilities of the logits' shape; not {dtype}")
    if shape == batch:
        return
    place, all_axes = axis % len(logits_shape), list(batch)
    all_axes.insert(place, logits_shape[-1])
    wanted = batch if dtype.kind in "iu" else tuple(all_axes)
    hint = ""
    for other in range(len(all_axes)):
        if dtype.kind in "iu" and other != place and shape == (*all_axes[:other], *all_axes[other + 1 :]):
            hint = f"; with axis={other} it would fit"
    what = f"the shape of logits without axis {axis}" if dtype.kind in "iu" else "the logits' shape"
    raise ValueError(f"targets must have {what}, {wanted}; got {shape}{hint}")


def mark_ignored(targets, ignore_index, classes, first_row=0):
    """Targets (N,) as int64, IGNORED for ``ignore_index``, and where they are not: bool (N,), or True everywhere.

    Any other outside [0, classes) is an IndexError.
    """
    checks.check_ignore_index(ignore_index)
    outside = _outside(targets, classes)
    if not np.count_nonzero(outside) and (ignore_index is None or not 0 <= ignore_index < classes):
        return np.ascontiguousarray(targets, np.int64), True
    ignored = np.zeros(targets.shape, bool) if ignore_index is None else targets == ignore_index
    wrong = outside & ~ignored
    if wrong.any():
        row = int(wrong.argmax())
        raise IndexError(
            f"targets must lie in [0, {classes - 1}]{'' if ignore_index is None else f' or be {ignore_index}'}; "
            f"{int(wrong.sum())} of {targets.size} do not, the first in row {first_row + row} with value {targets[row]}"
        )
    return np.where(ignored, IGNORED, targets.astype(np.int64, copy=False)), ~ignored


def _outside(targets, classes):
    if targets.dtype == np.int64:
        return targets.view(np.uint64) >= classes  # one pass: seen as unsigned, what is negative is large
    return (targets < 0) | (targets >= classes)


def with_last_axis(options):
    """The same `Options` where the classes have been moved to the last axis."""
    return options._replace(axis=-1)


def options_of_layer(options):
    """`as_options` where there is no axis of classes."""
    if "axis" in options:
        raise TypeError("axis does not apply: the classes are the rows of linear_weight")
    return as_options(options)


def as_options(options):
    """An `Options`, of a mapping too."""
    if isinstance(options, Options):
        return options
    for name in options:
        if name not in Options._fields:
            raise TypeError(f"unknown option {checks.shown(name)}; the options are {', '.join(Options._fields)}")
    return Options(**options)


@dataclass(frozen=True, slots=True)
class BinaryProblem:
    """Checked arguments of a binary cross entropy; all arrays broadcast to the shape of the logits."""

    logits: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    pos_weight: np.ndarray
    label_smoothing: float
    reduction: str
    loss_dtype: np.dtype


def read_binary(logits, targets, *, weight=None, pos_weight=None, label_smoothing=0.0, reduction="mean"):
    """The `BinaryProblem` of its arguments."""
    logits = checks.read_array(logits)
    checks.check_dtype(logits.dtype)
    checks.check_reduction(reduction)
    smoothing = checks.read_smoothing(label_smoothing)
    targets = np.asarray(targets)
    if targets.shape != logits.shape:
        raise ValueError(f"targets must have the logits' shape {logits.shape}; got {targets.shape}")
    if targets.dtype.kind not in "fiub" and not checks.is_floating(targets.dtype):
        raise TypeError(f"targets must hold real numbers in [0, 1], not {targets.dtype}")
    checks.check_within("targets", targets)
    return BinaryProblem(
        logits=logits,
        targets=targets,
        weight=_read_element_weight("weight", weight, logits),
        pos_weight=_read_element_weight("pos_weight", pos_weight, logits),
        label_smoothing=smoothing,
        reduction=reduction,
        loss_dtype=checks.loss_dtype(logits.dtype),
    )


def _read_element_weight(name, values, logits):
    values = np.ones(()) if values is None else checks.read_like(name, values, logits)
    checks.check_amounts(name, values)
    return values


def _read_weight(weight, classes):
    weight = checks.read_reals("weight", weight)
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one number a class; got {weight.shape}")
    checks.check_amounts("weight", weight)
    return weight


def _read_sample_weight(sample_weight, shape):
    sample_weight = checks.read_reals("sample_weight", sample_weight)
    if sample_weight.shape != shape:
        raise ValueError(f"sample_weight must have shape {shape}, one number a row; got {sample_weight.shape}")
    checks.check_amounts("sample_weight", sample_weight)
    return sample_weight.reshape(-1)


def check_scalars(options):
    """Options that are numbers or words are allowed, or a TypeError or ValueError says why not."""
    checks.check_reduction(options.reduction)
    checks.read_smoothing(options.label_smoothing)
    if not 0.0 <= checks.read_real("z_loss", options.z_loss) < math.inf:
        raise ValueError(f"z_loss must be finite and not negative; got {options.z_loss}")
    checks.check_scaling(options.softcap, options.temperature)
    if options.denominator is not None:
        if options.reduction != "mean":
            raise ValueError(f'denominator goes with reduction="mean"; got reduction={checks.shown(options.reduction)}')
        if math.isnan(checks.read_real("denominator", options.denominator)):
            raise ValueError("denominator must be a number; got nan")


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The options of `fastxent.score` that say what a record holds, with their defaults."""

    top_k: int = 0
    ignore_index: int | None = -100
    temperature: float = 1.0
    softcap: float | None = None
    shift: int = 0

    def check(self, shape):
        """These options fit logits of this ``shape`` (..., V), or a TypeError or ValueError says why not."""
        checks.check_scaling(self.softcap, self.temperature)
        for name, most in (("top_k", shape[-1]), ("shift", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be a whole number, not {checks.shown(value)}")
            if not 0 <= value <= most:
                limit = f"lie in [0, {most}], the number of classes" if name == "top_k" else "not be negative"
                raise ValueError(f"{name} must {limit}; got {value}")
        if self.shift and len(shape) < 2:
            raise ValueError(f"shift needs an axis of positions beside the classes; got logits of shape {shape}")


def read_score_targets(shape, targets, ids, options, axis=-1):
    """Of targets under logits of ``shape`` (..., V) and `ScoreOptions`: int64 (N,) with IGNORED where a row has none;
    and ids (N, K), or None.
    """
    options.check(shape)
    check_targets(targets.shape, targets.dtype, shape, axis)
    moved, beyond = np.zeros_like(targets), np.zeros(targets.shape, bool)
    if options.shift:  # the first targets of a sequence belong to no position, and may be anything
        last = max(0, targets.shape[-1] - int(options.shift))
        moved[..., :last], beyond[..., last:] = targets[..., int(options.shift) :], True
    marked, _ = mark_ignored((moved if options.shift else targets).reshape(-1), options.ignore_index, shape[-1])
    marked = np.where(beyond.reshape(-1), IGNORED, marked)
    return marked, None if ids is None else _read_ids(ids, targets.shape, shape[-1])


def _read_ids(ids, shape, classes):
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {ids.dtype}")
    if ids.ndim < 2 or ids.shape[:-1] != shape:
        if ids.ndim != 1:
            raise ValueError(
                f"ids must have the targets' shape {shape} and one axis more, or one axis; got {ids.shape}"
            )
        ids = np.broadcast_to(ids, (*shape, len(ids)))
    flat = ids.reshape(math.prod(shape), ids.shape[-1])
    wrong = _outside(flat, classes)
    if wrong.any():
        row, place = (int(index) for index in np.unravel_index(wrong.argmax(), wrong.shape))
        raise IndexError(
            f"ids must lie in [0, {classes - 1}]; {int(wrong.sum())} of {flat.size} do not, the first in row {row} "
            f"with value {flat[row, place]}"
        )
    return flat.astype(np.int64, copy=False)
