"""The loss of hidden states under an output matrix, whose logits are never whole in memory: documentation, and the loop
over blocks of rows. How these are cut is in `fastxent.blocks`, what their logits are multiplied from in
`fastxent.products`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, checks, shards, terms
from fastxent.blocks import MEMORY, Blocks, Tiles
from fastxent.products import Gradients
from fastxent.reduction import reduce
from fastxent.scoring import Scores, score_rows
from fastxent.state import IGNORED, STRIP, LseState

_MEMORY_WITH_GRADIENTS = 256 << 20  # bytes


def linear_cross_entropy(
    hidden: ArrayLike,
    linear_weight: ArrayLike,
    targets: arguments.Targets,
    *,
    linear_bias: ArrayLike | None = None,
    memory: int | None = None,
    check: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Any:
    r"""`fastxent.cross_entropy` of the logits :math:`\mathrm{hidden} \cdot \mathrm{linear\_weight}^T +
    \mathrm{linear\_bias}`, which are made and used block by block.

    Each block is a matrix product of NumPy's BLAS, in float32, or float64 where an input is; its logits have the
    rounding of that product, and the loss of those logits has all its digits. Rows that are ignored, or weigh nothing,
    are left out of the products. Arrays of torch or cupy that are on a CUDA device stay there: the products are then
    that library's, and of all rows, so hidden states must be finite even where they do not count (docs/cuda.md).

    Parameters
    ----------
    hidden : array_like of float16, bfloat16, float8, float32 or float64, shape (..., K)
        Hidden states.
    linear_weight : array_like of the same kinds, shape (V, K)
        The output matrix, a row for each class. Narrow types are converted piece by piece.
    targets : array_like of integers, shape (...); or of floats, shape (..., V); or a tuple (ids, probabilities)
        As for `fastxent.cross_entropy`.
    linear_bias : array_like, shape (V,), optional
        Added to the logits.
    memory : int, optional
        How many bytes of logits and copies to hold at a time; by default 64 MiB, or with targets that are class indices
        of more than 4,096 classes 24 MiB a thread if that is more. With less than that, fewer threads may work. A row
        of logits is always held; a few numbers for each row of ``hidden`` come on top, and of a narrow matrix 4 MiB for
        each thread. On a device 1 GiB of logits.
    check : bool
        As for `fastxent.cross_entropy`.
    backend : str, optional
        "cpu" or "reference", which takes its products in float64; "cuda" for arrays that are on a device alone.
    **options
        Those of `fastxent.cross_entropy` but ``axis``.

    Returns
    -------
    loss : as `fastxent.cross_entropy`
        float64 where an input is, else float32; with ``return_lse`` a tuple of it and the lse.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As `fastxent.cross_entropy`, and for shapes that do not fit.
    NotImplementedError
        For arrays of the host and the backend "cuda", and for what is not multiplied on a device.

    Notes
    -----
    The same bits come out for any number of threads. They may change with the rounding of the product: with
    ``memory``, which decides how the matrices are cut, with the rows beside a row, and with NumPy's BLAS.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> hidden, linear_weight = np.float32([[1, 2]]), np.float32([[4, 8], [0, 0]])
    >>> fastxent.linear_cross_entropy(hidden, linear_weight, [0])
    np.float32(2.0611537e-09)
    """
    if checks.is_on_device(hidden):
        return backends.for_device(backend, "linear").linear_cross_entropy(
            (hidden, linear_weight, linear_bias), targets, options, memory=memory, check=check
        )
    verbs, wide = _backend(backend)
    problem = arguments.normalise_linear(hidden, linear_weight, linear_bias, targets, options, wide)
    losses, memory = _Losses(problem, verbs), checks.read_memory(memory, None)
    if terms.is_of_probabilities(problem) or problem.logits.shape[1] <= STRIP:
        blocks = Blocks(problem.logits, problem.counted, memory or MEMORY)
        with blocks.workers:
            for rows, hidden_rows in blocks:
                blocks.each(losses.add, blocks.logits(hidden_rows), rows)
    else:
        tiles = Tiles(problem.logits, problem.counted, memory)
        with tiles.workers:
            for rows, hidden_rows in tiles:
                losses.add_by_classes(tiles, rows, hidden_rows)
    return losses.loss()


def linear_cross_entropy_with_grad(
    hidden: ArrayLike,
    linear_weight: ArrayLike,
    targets: arguments.Targets,
    *,
    linear_bias: ArrayLike | None = None,
    grad_output: ArrayLike = 1.0,
    out: tuple[NDArray | None, NDArray | None, NDArray | None] | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    memory: int | None = None,
    check: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Any:
    r"""`linear_cross_entropy` and its gradients with respect to the hidden states, the output matrix and the bias.

    With dlogits, the gradient of `fastxent.cross_entropy_with_grad`, they are
    :math:`\mathrm{dlogits} \cdot \mathrm{linear\_weight}`, :math:`\mathrm{dlogits}^T \cdot \mathrm{hidden}`, and the
    sum of dlogits over the rows. dlogits takes the place of a block's logits, so nothing is computed twice.

    Parameters
    ----------
    hidden, linear_weight, targets, linear_bias, check, backend, **options
        As for `linear_cross_entropy`.
    grad_output : float, or array of shape (...) for reduction "none"; on a device a float, or an array there
        The upstream gradient of the returned loss.
    out : tuple of three arrays or None, optional
        Where the gradients go: C-contiguous, of their inputs' shapes, of their dtypes or float32 or float64, and apart
        from all inputs. Not for arrays on a device, whose gradients are new.
    wanted : tuple of three bools
        Whether the gradients of ``hidden``, ``linear_weight`` and ``linear_bias`` are computed: each of the first two
        takes a product, and the memory of what it belongs to.
    memory : int, optional
        As for `linear_cross_entropy`; by default 256 MiB, on a device 1 GiB. Where the blocks are several, the gradient
        of a half ``linear_weight`` is summed in a float32 array of its shape that comes on top; a float32 ``out`` saves
        it.

    Returns
    -------
    loss : as `linear_cross_entropy`
    lse : only with ``return_lse``
    dhidden, dlinear_weight, dlinear_bias : ndarray, or None for a bias not given and what is not ``wanted``
        Of the shapes and dtypes of their inputs, float32 for float8; summed in float32 at least, and rounded once.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError, NotImplementedError
        As `linear_cross_entropy`, and for a bad ``grad_output`` or ``out``; always before anything is written.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> hidden, linear_weight = np.float32([[1, 2]]), np.float32([[4, 8], [0, 0]])
    >>> loss, dhidden, dlinear_weight, _ = fastxent.linear_cross_entropy_with_grad(hidden, linear_weight, [0])
    >>> dlinear_weight
    array([[-2.0611537e-09, -4.1223074e-09],
           [ 2.0611537e-09,  4.1223074e-09]], dtype=float32)
    """
    if checks.is_on_device(hidden):
        return backends.for_device(backend, "linear").linear_cross_entropy_with_grad(
            (hidden, linear_weight, linear_bias), targets, options, grad_output=grad_output, out=out, wanted=wanted,
            memory=memory, check=check,
        )  # fmt: skip
    verbs, wide = _backend(backend)
    problem = arguments.normalise_linear(hidden, linear_weight, linear_bias, targets, options, wide)
    layer = problem.logits
    inputs = {"hidden": checks.read_array(hidden, "hidden"), "linear_weight": layer.weight, "linear_bias": layer.bias}
    dhidden, dweight, dbias = checks.read_outputs(out, inputs, wanted)
    grad_output = checks.read_grad_output(grad_output, problem.options.reduction, problem.shape).reshape(-1)
    losses = _Losses(problem, verbs, grad_output)
    blocks = Blocks(layer, problem.counted, checks.read_memory(memory, _MEMORY_WITH_GRADIENTS), copies=2)
    of_rows = None if dhidden is None else dhidden.reshape(-1, layer.width)
    gradients = Gradients(layer, of_rows, dweight, dbias, len(blocks))
    with blocks.workers:
        for rows, hidden_rows in blocks:
            dlogits = blocks.logits(hidden_rows)
            blocks.each(losses.add_with_gradient, dlogits, rows)
            gradients.add(blocks.workers, rows, hidden_rows, dlogits)
    gradients.finish(problem.counted)
    loss = losses.loss()
    return (*(loss if problem.options.return_lse else (loss,)), dhidden, dweight, dbias)


def score_linear(
    hidden: ArrayLike,
    linear_weight: ArrayLike,
    targets: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    top_k: int = 0,
    ids: ArrayLike | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    progress: Callable[[int, int], Any] | None = None,
    memory: int | None = None,
    backend: str | None = None,
) -> Scores:
    r"""`fastxent.score` of the logits :math:`\mathrm{hidden} \cdot \mathrm{linear\_weight}^T + \mathrm{linear\_bias}`,
    which are made and used block by block.

    Parameters
    ----------
    hidden, linear_weight, linear_bias, memory, backend
        As for `linear_cross_entropy`; with hidden states on a device, targets and scores are the host's. Blocks hold
        rows with all their classes: with a large vocabulary more ``memory`` makes larger blocks, whose products are
        faster.
    targets, top_k, ids, ignore_index, temperature, softcap, shift
        As for `fastxent.score`.
    progress : callable, optional
        Told after every block how many rows that have a target are done, and of how many.

    Returns
    -------
    Scores
        Of the targets' shape; its floats are float64 where an input is, else float32.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError, NotImplementedError
        As `fastxent.score` and `linear_cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastxent
    >>> hidden, linear_weight = np.float32([[1, 2], [0, 1]]), np.float32([[4, 8], [0, 0], [1, 1]])
    >>> scores = fastxent.score_linear(hidden, linear_weight, [0, 2], top_k=2)
    >>> scores.rank.tolist(), scores.top_ids.tolist()
    ([1, 2], [[0, 2], [0, 2]])
    """
    options = arguments.ScoreOptions(top_k, ignore_index, temperature, softcap, shift)
    if checks.is_on_device(hidden):
        layer = backends.for_device(backend, "linear").Layer((hidden, linear_weight, linear_bias))
        return _score_on_device(layer, np.asarray(targets), ids, options, progress, memory)
    (verbs, wide), targets = _backend(backend), np.asarray(targets)
    layer, batch, dtype = arguments.read_layer(hidden, linear_weight, linear_bias, wide)
    marked, wanted = arguments.read_score_targets((*batch, layer.shape[1]), targets, ids, options)
    counted, done = marked != IGNORED, 0
    blocks = Blocks(layer, True if counted.all() else counted, checks.read_memory(memory, MEMORY))
    records = _ignored_records(layer.shape, dtype, wanted, options, verbs)

    def add(logits, rows):
        records[rows] = score_rows(logits, marked[rows], _of(wanted, rows), options, verbs)

    with blocks.workers:
        for rows, hidden_rows in blocks:
            blocks.each(add, blocks.logits(hidden_rows), rows)
            if progress is not None:
                progress(done := done + len(hidden_rows), blocks.count)
    return Scores.from_records(records.reshape(targets.shape))


def _score_on_device(layer, targets, ids, options, progress, memory):
    """As `score_linear`, of a `fastxent.backends.cuda.linear.Layer`; targets and scores are the host's."""
    marked, wanted = arguments.read_score_targets((*layer.batch, layer.shape[1]), targets, ids, options)
    found, verbs, counted = [], backends.get("cuda"), marked != IGNORED
    for rows, logits in layer.ready(memory):
        found.append(score_rows(logits, marked[rows], _of(wanted, rows), options, verbs))
        if progress is not None:
            progress(int(counted[: rows.stop].sum()), int(counted.sum()))
    return Scores.from_records(np.concatenate(found).reshape(targets.shape))


def _of(ids, rows):
    return None if ids is None else ids[rows]


def _ignored_records(shape, dtype, wanted, options, verbs):
    """Records of rows whose targets are ignored."""
    ids = None if wanted is None else np.zeros((1, wanted.shape[1]), np.int64)
    one = score_rows(np.zeros((1, shape[1]), dtype), np.array([IGNORED]), ids, options, verbs)
    return np.repeat(one, shape[0])


def _backend(name):
    """The verbs of a backend, and whether its products are float64 whatever the inputs are."""
    verbs = backends.choose(name)
    short = verbs.__name__.rpartition(".")[2]
    if short == "cuda":
        raise NotImplementedError(
            "the cuda backend multiplies what is on its device; move hidden and linear_weight there, or take "
            "backend='cpu'"
        )
    return verbs, short == "reference"


class _Losses:
    """The losses of a problem's rows, found some rows at a time."""

    def __init__(self, problem, verbs, grad_output=None):
        self._problem, self._verbs, (count, self._classes) = problem, verbs, problem.logits.shape
        self._losses = np.zeros(count)
        self._lse = np.full(count if problem.options.return_lse else 0, np.nan)
        self._divisor = terms.divisor(problem, terms.row_weight(problem))
        if grad_output is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                self._upstream = grad_output / self._divisor

    def add(self, logits, rows):
        """The losses of rows, a slice or indices, whose logits are given."""
        of_rows = terms.of(self._problem.part(logits, rows))
        self._keep(of_rows, self._verbs.statistics(logits, of_rows.targets, **of_rows.kernel_options()), rows)

    def add_with_gradient(self, logits, rows):
        """As `add`, and the gradient takes the place of the logits."""
        of_rows = terms.of(self._problem.part(logits, rows))
        upstream = self._upstream[rows] if len(self._upstream) > 1 else self._upstream
        found = self._verbs.statistics_and_gradient(
            logits, of_rows.targets, of_rows.coefficients(upstream), logits, **of_rows.kernel_options()
        )
        of_rows.correct(logits, found, upstream)
        self._keep(of_rows, found, rows)

    def add_by_classes(self, tiles, rows, hidden):
        """As `add` for all rows of a block whose targets are class indices, from its tiles."""
        all_classes = np.broadcast_to(tiles.layer.dtype.type(0), (len(hidden), self._classes))
        of_rows = terms.of(self._problem.part(all_classes, rows))
        scaling = {"softcap": of_rows.options.softcap, "temperature": of_rows.options.temperature}
        states = [LseState.empty(len(hidden), **scaling) for _ in tiles.stripes]

        def accumulate(logits, part, number):
            start = tiles.stripes[number].start
            states[number].columns[part] = self._verbs.accumulate(
                logits, of_rows.targets[part], spread=shards.spread_of(of_rows, logits, start), vocab_start=start,
                **scaling,
            ).columns  # fmt: skip

        tiles.each(accumulate, hidden)
        self._keep(of_rows, shards.statistics_of(functools.reduce(LseState.merge, states), of_rows), rows)

    def _keep(self, of_rows, found, rows):
        self._losses[rows] = of_rows.row_losses(found)
        if len(self._lse):
            self._lse[rows] = found.lse

    def loss(self):
        """What the caller gets: the loss, or with ``return_lse`` the loss and the lse."""
        problem = self._problem
        loss = reduce(self._losses, problem.options.reduction, self._divisor, problem.loss_dtype, problem.shape)
        if not problem.options.return_lse:
            return loss
        return loss, self._lse.astype(problem.loss_dtype).reshape(problem.shape)[()]
