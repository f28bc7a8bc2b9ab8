"""The loss of hidden states under an output matrix, whose logits are never whole in memory: documentation, and the loop
over blocks of rows. What a block's logits are multiplied from is in `fastxent.products`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, checks, shards, terms
from fastxent.products import Gradients, Workers, slices, taken
from fastxent.reduction import reduce
from fastxent.rows import take
from fastxent.scoring import Scores, score_rows
from fastxent.state import IGNORED, STRIP, LseState
from fastxent.threads import get_num_threads

_MEMORY, _MEMORY_WITH_GRADIENTS = 64 << 20, 256 << 20  # bytes
_SHARE = 0.75  # of the memory, for logits and hidden states; the rest is BLAS's and the threads' own
_ENOUGH = 1024  # rows of a block for which going through the whole output matrix pays
_MOST = 1024  # rows of a block of some of the classes
_CHUNK = 1 << 21  # logits given to a kernel at a time
_SMALL = 1 << 21  # multiplications that are not worth waking threads for


def linear_cross_entropy(
    hidden: ArrayLike,
    linear_weight: ArrayLike,
    targets: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    memory: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    r"""`fastxent.cross_entropy` of the logits :math:`\mathrm{hidden} \cdot \mathrm{linear\_weight}^T +
    \mathrm{linear\_bias}`, which are made and used block by block.

    Each block is a matrix product of NumPy's BLAS, in float32, or float64 where an input is; its logits have the
    rounding of that product, and the loss of those logits has all its digits. Rows that are ignored, or weigh nothing,
    are left out of the products.

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
        How many bytes of logits and copies to hold at a time; by default 64 MiB. A row of logits is always held; a few
        numbers for each row of ``hidden`` come on top, and of a narrow matrix 4 MiB for each thread.
    backend : str, optional
        "cpu" or "reference", which takes its products in float64.
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
        For the backend "cuda".

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
    verbs, wide = _backend(backend)
    problem = arguments.normalise_linear(hidden, linear_weight, linear_bias, targets, options, wide)
    losses, by_classes = _Losses(problem, verbs), not terms.is_of_probabilities(problem)
    blocks = _Blocks(problem.logits, problem.counted, checks.read_memory(memory, _MEMORY), by_classes=by_classes)
    with blocks.workers:
        for rows, hidden_rows in blocks:
            if blocks.classes < blocks.layer.shape[1]:
                losses.add_by_classes(blocks, rows, hidden_rows)
            else:
                blocks.each(losses.add, blocks.logits(hidden_rows), rows)
    return losses.loss()


def linear_cross_entropy_with_grad(
    hidden: ArrayLike,
    linear_weight: ArrayLike,
    targets: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    grad_output: ArrayLike = 1.0,
    out: tuple[NDArray | None, NDArray | None, NDArray | None] | None = None,
    memory: int | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    r"""`linear_cross_entropy` and its gradients with respect to the hidden states, the output matrix and the bias.

    With dlogits, the gradient of `fastxent.cross_entropy_with_grad`, they are
    :math:`\mathrm{dlogits} \cdot \mathrm{linear\_weight}`, :math:`\mathrm{dlogits}^T \cdot \mathrm{hidden}`, and the
    sum of dlogits over the rows. dlogits takes the place of a block's logits, so nothing is computed twice.

    Parameters
    ----------
    hidden, linear_weight, targets, linear_bias, backend, **options
        As for `linear_cross_entropy`.
    grad_output : float, or array of shape (...) for reduction "none"
        The upstream gradient of the returned loss.
    out : tuple of three arrays or None, optional
        Where the gradients go: C-contiguous, of their inputs' shapes, of their dtypes or float32 or float64, and apart
        from all inputs.
    memory : int, optional
        As for `linear_cross_entropy`; by default 256 MiB. Where the blocks are several, the gradient of a half
        ``linear_weight`` is summed in a float32 array of its shape that comes on top; a float32 ``out`` saves it.

    Returns
    -------
    loss : as `linear_cross_entropy`
    lse : only with ``return_lse``
    dhidden, dlinear_weight, dlinear_bias : ndarray, or None for a bias not given
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
    verbs, wide = _backend(backend)
    problem = arguments.normalise_linear(hidden, linear_weight, linear_bias, targets, options, wide)
    layer = problem.logits
    inputs = {"hidden": checks.read_array(hidden, "hidden"), "linear_weight": layer.weight, "linear_bias": layer.bias}
    dhidden, dweight, dbias = checks.read_outputs(out, inputs)
    grad_output = checks.read_grad_output(grad_output, problem.options.reduction, problem.shape).reshape(-1)
    losses = _Losses(problem, verbs, grad_output)
    blocks = _Blocks(layer, problem.counted, checks.read_memory(memory, _MEMORY_WITH_GRADIENTS), copies=2)
    gradients = Gradients(layer, dhidden.reshape(-1, layer.width), dweight, dbias, len(blocks))
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
        As for `linear_cross_entropy`. Blocks hold rows with all their classes: with a large vocabulary more ``memory``
        makes larger blocks, whose products are faster.
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
    (verbs, wide), targets = _backend(backend), np.asarray(targets)
    layer, batch, dtype = arguments.read_layer(hidden, linear_weight, linear_bias, wide)
    marked, wanted = arguments.read_score_targets((*batch, layer.shape[1]), targets, ids, options)
    counted, done = marked != IGNORED, 0
    blocks = _Blocks(layer, True if counted.all() else counted, checks.read_memory(memory, _MEMORY))
    records = _ignored_records(layer.shape, dtype, wanted, options, verbs)

    def add(logits, rows):
        records[rows] = score_rows(logits, marked[rows], None if wanted is None else wanted[rows], options, verbs)

    with blocks.workers:
        for rows, hidden_rows in blocks:
            blocks.each(add, blocks.logits(hidden_rows), rows)
            if progress is not None:
                progress(done := done + len(hidden_rows), blocks.count)
    return Scores.from_records(records.reshape(targets.shape))


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
        raise NotImplementedError("the cuda backend has no products of hidden states yet; take backend='cpu'")
    return verbs, short == "reference"


class _Blocks:
    """The rows that count, block after block, and their logits in one buffer.

    ``copies`` is how many arrays of the hidden states' width a block needs beside its logits; ``by_classes`` allows
    blocks of some of the classes, where rows with all of theirs would be too few for a product to be fast.
    """

    def __init__(self, layer, counted, memory, *, copies=1, by_classes=False):
        self.layer, self._counted = layer, None if counted is True else np.flatnonzero(counted)
        rows, classes = layer.shape
        self.count = rows if self._counted is None else len(self._counted)
        cells, width = int(_SHARE * memory) // layer.dtype.itemsize, copies * layer.width
        most = cells // (classes + width)
        self.classes = classes
        if by_classes and most < min(self.count, _ENOUGH):
            most = min(self.count, _MOST, cells // (STRIP + width))
            self.classes = min(classes, STRIP * max(1, (cells // max(1, most) - width) // STRIP))
        number = -(-self.count // max(1, most))
        self._rows = -(-self.count // max(1, number))
        self._buffer = np.empty(self._rows * self.classes, layer.dtype)
        self.workers = Workers(1 if self.count * classes * layer.width < _SMALL else get_num_threads())

    def __len__(self):
        return -(-self.count // max(1, self._rows))

    def __iter__(self):
        """Rows, a slice or indices, with their hidden states."""
        for part in slices(0, self.count, max(1, self._rows)):
            rows = part if self._counted is None else self._counted[part]
            yield rows, taken(take(self.layer.hidden, rows), self.layer.dtype)

    def logits(self, hidden, classes=None):
        """The logits of a block's hidden states for a slice of classes, or all: overwritten by the next."""
        classes = classes or slice(0, self.classes)
        shape = len(hidden), classes.stop - classes.start
        logits = self._buffer[: shape[0] * shape[1]].reshape(shape)
        self.layer.logits(self.workers, hidden, classes, logits)
        return logits

    def each(self, function, logits, rows):
        """Call ``function(logits, rows)`` for a few rows of a block at a time."""
        chunks = slices(0, len(logits), max(1, _CHUNK // logits.shape[1]))
        self.workers.run((lambda chunk: function(logits[chunk], _within(rows, chunk)), chunks))


def _within(rows, part):
    """The rows that a slice of a block has, whose own are a slice or indices."""
    return slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]


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

    def add_by_classes(self, blocks, rows, hidden):
        """As `add` for all rows of a block whose targets are class indices, some of the classes at a time."""
        all_classes = np.broadcast_to(blocks.layer.dtype.type(0), (len(hidden), self._classes))
        of_rows = terms.of(self._problem.part(all_classes, rows))
        scaling = {"softcap": of_rows.options.softcap, "temperature": of_rows.options.temperature}
        state = LseState.empty(len(hidden), **scaling)

        def accumulate(start, logits, part):
            state.columns[part] = self._verbs.accumulate(
                logits, of_rows.targets[part], spread=shards.spread_of(of_rows, logits, start), vocab_start=start,
                state=LseState(state.columns[part], **scaling), **scaling,
            ).columns  # fmt: skip

        for classes in slices(0, self._classes, blocks.classes):
            logits = blocks.logits(hidden, classes)
            blocks.each(functools.partial(accumulate, classes.start), logits, slice(0, len(hidden)))
        self._keep(of_rows, shards.statistics_of(state, of_rows), rows)

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
