"""The cross entropy family on Dask arrays, chunked over rows and classes in any way.

Everything is lazy. A block of logits becomes packed states (`fastxent.LseState`, `fastxent.ScoreState`), 72 bytes a row
and up; a tree merges those of a row's class chunks, ``split_every`` at a time, and only then is a loss, a score or a
gradient made. Blocks are computed with one thread each in a worker's thread, so a pool of them fits the cores.
`from_files` gives an array of a file whose graph holds the path; `dask.array.from_zarr` does for zarr stores.

Examples
--------
>>> import dask.array as da, fastxent.dask
>>> logits = da.zeros((4, 6), chunks=(2, 3))
>>> loss = fastxent.dask.cross_entropy(logits, da.zeros(4, dtype=int, chunks=4))
>>> loss
dask.array<..., shape=(), dtype=float64, chunksize=(), chunktype=numpy.ndarray>
>>> loss.compute()
np.float64(1.791759469228055)
"""

import functools
import math
from typing import Any

import dask.array as da
import numpy as np

from fastxent import arguments, backends, checks, io, scoring, shards, threads
from fastxent.rows import as_rows
from fastxent.score_state import ScoreState, join_peaks
from fastxent.softmax import temperature_of
from fastxent.state import FIELDS, LARGEST, LseState

__all__ = [
    "cross_entropy",
    "cross_entropy_with_grad",
    "from_files",
    "log_softmax",
    "logsumexp",
    "score",
]


def cross_entropy(logits, targets, *, axis=-1, split_every=None, backend=None, **options) -> Any:
    """`fastxent.cross_entropy` of a Dask array under class indices.

    Parameters
    ----------
    logits : dask.array.Array, shape (..., V)
    targets : dask.array.Array or array_like of integers, shape (...)
    axis : int
        Where the classes are.
    split_every : int, optional
        How many states a task merges.
    backend : str, optional
        As for `fastxent.cross_entropy`.
    **options
        Of `fastxent.cross_entropy`; ``sample_weight`` may be a Dask array, ``weight`` is a NumPy array.

    Returns
    -------
    dask.array.Array
        With ``return_lse`` a tuple of two. A loss is float64 for float64 logits, else float32.

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot fit; for a bad ``sample_weight`` when it is computed.
    IndexError, BackendUnavailableError
        When it is computed: for a target out of range, and if the backend cannot run in a worker.

    Examples
    --------
    >>> import dask.array as da, fastxent.dask
    >>> logits = da.from_array([[20.0, 0.0], [0.0, 0.0]], chunks=1)
    >>> fastxent.dask.cross_entropy(logits, [0, 1], reduction="none").compute().round(12)
    array([2.06100000e-09, 6.93147181e-01])
    """
    problem = _Problem(logits, targets, axis, split_every, backend, options)
    losses = problem.finish(problem.states())
    return (problem.reduce(losses[0]), losses[1]) if problem.return_lse else problem.reduce(losses[0])


def cross_entropy_with_grad(
    logits, targets, *, grad_output=1.0, axis=-1, split_every=None, backend=None, **options
) -> Any:
    """`fastxent.cross_entropy_with_grad` of a Dask array: the loss, and its gradient in the logits' chunks.

    Blocks of logits are loaded once and used twice, with the merge of all class chunks between: so long a worker keeps
    them, or spills them to its disk.

    Parameters
    ----------
    logits, targets, axis, split_every, backend, **options
        As for `cross_entropy`.
    grad_output : float, or array_like or dask.array.Array of shape (...) for reduction "none"
        The upstream gradient of the returned loss.

    Returns
    -------
    loss : as `cross_entropy`
    lse : only with ``return_lse``
    dlogits : dask.array.Array
        Of the logits' shape, chunks and dtype, float32 for float8.

    Raises
    ------
    TypeError, ValueError, IndexError, BackendUnavailableError
        As `cross_entropy`, and for a bad ``grad_output``.

    Examples
    --------
    >>> import dask.array as da, fastxent.dask
    >>> loss, dlogits = fastxent.dask.cross_entropy_with_grad(da.zeros((1, 4), chunks=2), [0])
    >>> dlogits.compute()
    array([[-0.75,  0.25,  0.25,  0.25]])
    """
    problem = _Problem(logits, targets, axis, split_every, backend, options)
    states = problem.states()
    losses, lse = problem.finish(states)
    loss, dlogits = problem.reduce(losses), problem.gradient(states, grad_output)
    return (loss, lse, dlogits) if problem.return_lse else (loss, dlogits)


def logsumexp(logits, *, axis=-1, keepdims=False, scale=1.0, split_every=None, backend=None) -> Any:
    """`fastxent.logsumexp` of a Dask array over one axis.

    Parameters
    ----------
    logits : dask.array.Array of float16, bfloat16, float8, float32 or float64
    axis : int
        The one to sum over.
    keepdims, scale
        As for `fastxent.logsumexp`.
    split_every, backend
        As for `cross_entropy`.

    Returns
    -------
    dask.array.Array
        float64 for float64 logits, else float32.

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot fit.
    BackendUnavailableError
        When it is computed, if the backend cannot run in a worker.

    Examples
    --------
    >>> import dask.array as da, fastxent.dask
    >>> fastxent.dask.logsumexp(da.zeros((1, 4), chunks=2)).compute()
    array([1.38629436])
    """
    logits = _logits_of(logits, axis)
    lse = da.map_blocks(
        _lse_of, _peaks(logits, scale, split_every, backend), drop_axis=logits.ndim - 1,
        dtype=(real := checks.loss_dtype(logits.dtype)), real=real,
    )  # fmt: skip
    return da.expand_dims(lse, axis) if keepdims else lse


def log_softmax(logits, *, axis=-1, scale=1.0, split_every=None, backend=None) -> Any:
    """`fastxent.log_softmax` of a Dask array over one axis, in its chunks; blocks are loaded once and used twice.

    Parameters
    ----------
    logits, axis, scale, split_every, backend
        As for `logsumexp`.

    Returns
    -------
    dask.array.Array
        Of the logits' shape, chunks and dtype, float32 for float8.

    Raises
    ------
    TypeError, ValueError, BackendUnavailableError
        As for `logsumexp`.

    Examples
    --------
    >>> import dask.array as da, fastxent.dask
    >>> fastxent.dask.log_softmax(da.from_array([20.0, 0.0], chunks=1)).compute().round(12)
    array([-2.061e-09, -2.000e+01])
    """
    moved = _logits_of(logits, axis)
    *batch, k, new = range(moved.ndim + 1)
    written = da.blockwise(
        _log_softmax_of, (*batch, k), moved, (*batch, k), _peaks(moved, scale, split_every, backend), (*batch, new),
        nats=float(scale), concatenate=True, align_arrays=False, dtype=checks.gradient_dtype(moved.dtype),
        meta=np.empty((0,) * moved.ndim, checks.gradient_dtype(moved.dtype)),
    )  # fmt: skip
    return da.moveaxis(written, -1, axis)


def score(
    logits, targets, *, top_k=0, ignore_index=-100, temperature=1.0, softcap=None, axis=-1, split_every=None,
    backend=None,
) -> Any:  # fmt: skip
    """`fastxent.score` of a Dask array: an array of records, which `fastxent.Scores.from_records` takes once computed.

    Where a row's classes lie in several chunks, blocks are loaded once and used twice, for the targets' logits first;
    where they lie in one, the records are `fastxent.score`'s to the bit.

    Parameters
    ----------
    logits, targets, axis, split_every, backend
        As for `cross_entropy`.
    top_k, ignore_index, temperature, softcap
        As for `fastxent.score`, whose ``shift``, ``ids`` and ``progress`` are not taken.

    Returns
    -------
    dask.array.Array
        Of the targets' shape; a record has the fields of `fastxent.Scores`, and those of the largest classes with
        ``top_k``.

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot fit.
    IndexError, BackendUnavailableError
        As `cross_entropy`, when it is computed.

    Examples
    --------
    >>> import dask.array as da, fastxent, fastxent.dask
    >>> records = fastxent.dask.score(da.from_array([[0.0, 2.0, 1.0]], chunks=(1, 2)), [2], top_k=2)
    >>> scores = fastxent.Scores.from_records(records.compute())
    >>> scores.rank, scores.top_ids
    (array([2]), array([[1, 2]]))
    """
    options = {"ignore_index": ignore_index, "temperature": temperature, "softcap": softcap}
    arguments.ScoreOptions(top_k=top_k, **options).check((1, _logits_of(logits, axis).shape[-1]))
    problem = _Problem(logits, targets, axis, split_every, backend, options)
    dtype = scoring.record_dtype(problem.logits.dtype, top_k)
    options |= {"top_k": top_k, "backend": backend}
    if len(problem.logits.chunks[-1]) == 1:
        return problem.of_rows(_score_rows, problem.logits, dtype, **options)
    own = problem.over_blocks(shards.target_logits, 1).max(axis=-1, split_every=split_every)
    kept = ScoreState.empty(0, top_k).columns.shape[1]
    states = problem.over_blocks(_accumulate_scores, kept, own, classes=problem.classes, **options)
    states = _merged(states, functools.partial(_merge_scores, **problem.units), kept, split_every)
    return problem.of_rows(
        _finalize_scores, states, dtype, logits_dtype=problem.logits.dtype, top_k=top_k, ignore_index=ignore_index,
        **problem.units,
    )  # fmt: skip


def from_files(names, chunks="auto", logits_dtype=None) -> Any:
    """A Dask array of files that `fastxent.io.open_source` reads; the graph holds their paths, and no data.

    A worker opens them itself, under the same path. Of files that cannot be mapped (parquet, compressed zarr) a chunk
    reads whole rows: chunk those over rows alone, or take `dask.array.from_zarr`.

    Parameters
    ----------
    names : path-like or sequence of path-like
        FILE or FILE::NAME, globs too; several are one array, one after the other.
    chunks
        As for `dask.array.from_array`.
    logits_dtype : str, optional
        One of `fastxent.io.NAMELESS`.

    Returns
    -------
    dask.array.Array
        Of the shape and dtype that the files have together.

    Raises
    ------
    fastxent.io.SourceError
        If they cannot be read; when it is computed, if they have changed since.
    ValueError
        If ``chunks`` do not fit the shape.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np, fastxent.dask
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "logits.npy")
    ...     np.save(file, np.zeros((4, 6), np.float32))
    ...     logits = fastxent.dask.from_files(file, chunks=(2, 3))
    ...     fastxent.dask.cross_entropy(logits, [0, 1, 2, 3]).compute()
    np.float32(1.7917595)
    """
    array = _Files(io.absolute(names), logits_dtype)
    meta = np.empty((0,) * array.ndim, array.dtype)
    return da.from_array(array, chunks=chunks, meta=meta, asarray=False, fancy=False)


class _Files:
    """What `dask.array.from_array` takes for an array: shape, dtype, and numbers and slices as indices, into which Dask
    fuses what is done to the array next; read from files when they are asked.
    """

    def __init__(self, names, logits_dtype):
        self._names, self._logits_dtype = names, logits_dtype
        with io.open_source(names, logits_dtype) as source:
            self.shape, self.dtype, self._stamp = source.shape, source.dtype, source.stamp()
        self.ndim = len(self.shape)

    def __dask_tokenize__(self):
        return self._names, self._logits_dtype, str(self._stamp)

    def __getitem__(self, index):
        first, *rest = index
        rows = range(self.shape[0])[first]
        taken = rows if isinstance(rows, range) else range(rows, rows + 1)
        start, stop = (min(taken[0], taken[-1]), max(taken[0], taken[-1]) + 1) if taken else (0, 0)
        within = 0 if isinstance(rows, int) else slice(None, None, rows.step)
        with io.open_source(self._names, self._logits_dtype) as source:
            if source.stamp() != self._stamp:
                raise io.SourceError(f"{source.name}: changed since the graph was made")
            inner = math.prod(self.shape[1:])
            block = source.block(start * inner, stop * inner).reshape(stop - start, *self.shape[1:])
            return np.array(block[(within, *rest)])


class _Problem:
    """Logits with the classes last, targets in their chunks, and the options."""

    def __init__(self, logits, targets, axis, split_every, backend, options):
        self.logits, self.axis = _logits_of(logits, axis), axis
        self.classes, self._batch = self.logits.shape[-1], tuple(range(self.logits.ndim - 1))
        self._split_every, self._backend = split_every, backend
        self.options = dict(options)
        self.return_lse = self.options.pop("return_lse", False)
        self.reduction = self.options.pop("reduction", "mean")
        self._denominator = self.options.pop("denominator", None)
        sample_weight = self.options.pop("sample_weight", None)
        plain = {"reduction": self.reduction, "denominator": self._denominator}
        arguments.normalise(np.zeros((1, self.classes)), [0], self.options | plain)
        self.units = _units(options)
        self.targets = self._of_rows("targets", targets)
        if self.targets.dtype.kind not in "iu":
            raise TypeError(f"targets must be class indices, integers; got {self.targets.dtype}")
        self._weights = () if sample_weight is None else (self._of_rows("sample_weight", sample_weight),)

    def _of_rows(self, name, values):
        """An array of a number a row, in the chunks of the logits' rows."""
        values, batch = da.asarray(values), self.logits.shape[:-1]
        if values.shape != batch:
            raise ValueError(f"{name} must have the logits' shape without the classes, {batch}; got {values.shape}")
        return values.rechunk(self.logits.chunks[:-1])

    def over_blocks(self, function, width, *more, **options):
        """``function(block, targets, *more, vocab_start=...)`` of each block: ``width`` columns a class chunk."""
        sizes = self.logits.chunks[-1]
        starts = da.from_array(np.cumsum([0, *sizes[:-1]]), chunks=1)
        k, batch = len(self._batch), self._batch
        pairs = [part for array in (self.targets, *more) for part in (array, batch)]
        return da.blockwise(
            functools.partial(_on_block, function, width, len(more) + 1), (*batch, k), self.logits, (*batch, k), *pairs,
            starts, (k,), adjust_chunks={k: lambda _: width}, align_arrays=False, dtype=np.float64,
            meta=np.empty((0,) * (k + 1)), **options,
        )  # fmt: skip

    def states(self):
        """Packed `LseState` of whole rows, (..., 9)."""
        options = self.options | {"classes": self.classes, "backend": self._backend}
        states = self.over_blocks(_accumulate, len(FIELDS), *self._weights, **options)
        return _merged(states, functools.partial(_merge, **self.units), len(FIELDS), self._split_every)

    def of_rows(self, function, states, dtype, *more, **options):
        """``function(states, targets, *more)`` of every chunk of rows."""
        batch, k = self._batch, len(self._batch)
        pairs = [part for array in more for part in (array, batch)]
        return da.blockwise(
            _threaded, batch, states, (*batch, k), self.targets, batch, *pairs, function=function, concatenate=True,
            align_arrays=False, dtype=dtype, meta=np.empty((0,) * k, dtype), **options,
        )  # fmt: skip

    def finish(self, states):
        """Losses in float64 and lse of every row."""
        options = self.options | {"classes": self.classes} | self.units
        losses = self.of_rows(_losses, states, np.dtype(np.float64), *self._weights, **options)
        if not self.return_lse:
            return losses, None
        real = checks.loss_dtype(self.logits.dtype)
        return losses, self.of_rows(_lse, states, real, *self._weights, real=real, **options)

    def reduce(self, losses):
        """What the caller gets for them."""
        real = checks.loss_dtype(self.logits.dtype)
        if self.reduction == "none":
            return losses.astype(real)
        total = losses.sum(split_every=self._split_every)
        return (total if self.reduction == "sum" else _divide(total, self.divisor)).astype(real)

    @functools.cached_property
    def divisor(self):
        """What a mean is divided by."""
        if self._denominator is not None:
            return da.asarray(np.float64(self._denominator))
        options = {name: value for name, value in self.options.items() if name in ("weight", "ignore_index")}
        counts = da.map_blocks(
            _counts, self.targets, *self._weights, classes=self.classes, dtype=np.float64, **options,
            meta=np.empty((0,) * self.targets.ndim),
        )  # fmt: skip
        return counts.sum(split_every=self._split_every)

    def gradient(self, states, grad_output):
        """The gradient in the logits' chunks, the classes where they were."""
        dtype, k, batch = checks.gradient_dtype(self.logits.dtype), len(self._batch), self._batch
        upstream = da.asarray(grad_output)
        checks.check_grad_output(upstream, self.reduction, self.targets.shape)
        upstream = upstream.astype(np.float64)
        if self.reduction == "mean":
            upstream = _divide(upstream, self.divisor)
        chunks = self.targets.chunks
        each = upstream.rechunk(chunks) if upstream.ndim else da.broadcast_to(upstream, self.targets.shape, chunks)
        starts = da.from_array(np.cumsum([0, *self.logits.chunks[-1][:-1]]), chunks=1)
        weights = [part for array in self._weights for part in (array, batch)]
        written = da.blockwise(
            _gradient, (*batch, k), self.logits, (*batch, k), states, (*batch, k + 1), starts, (k,),
            self.targets, batch, each, batch, *weights, concatenate=True, align_arrays=False, dtype=dtype,
            classes=self.classes, backend=self._backend, meta=np.empty((0,) * (k + 1), dtype),
            **(self.options | self.units),
        )  # fmt: skip
        return da.moveaxis(written, -1, self.axis)


def _logits_of(logits, axis):
    """Dask logits with the classes last."""
    if not isinstance(logits, da.Array):
        raise TypeError(f"logits must be a dask array, not {type(logits).__name__}; take fastxent's own functions")
    checks.check_logits(logits.shape, logits.dtype, axis)
    if any(np.isnan(size) for chunks in logits.chunks for size in chunks):
        raise ValueError("logits must have known chunks; call compute_chunk_sizes() first")
    return logits if axis in (-1, logits.ndim - 1) else da.moveaxis(logits, axis, -1)


def _merged(states, merge, width, split_every):
    """Packed states (..., n width) merged to (..., width) by a tree."""
    kept = functools.partial(_columns, merge=merge, width=width)
    return da.reduction(
        states, chunk=_as_it_is, combine=kept, aggregate=kept, axis=states.ndim - 1, keepdims=True, output_size=width,
        split_every=split_every, dtype=np.float64, meta=np.empty((0,) * states.ndim),
    )  # fmt: skip


def _as_it_is(states, axis, keepdims):
    return states


def _columns(states, axis, keepdims, merge, width):
    """Packed states side by side, one after another merged."""
    batch = states.shape[:-1]
    parts = np.moveaxis(states.reshape(-1, states.shape[-1] // width, width), 1, 0)
    return functools.reduce(merge, parts).reshape(*batch, width)


def _merge(one, other, **units):
    return LseState.unpack(one, **units).merge(LseState.unpack(other, **units)).columns


def _merge_scores(one, other, **units):
    return ScoreState.unpack(one, **units).merge(ScoreState.unpack(other, **units)).columns


def _merge_peaks(one, other):
    return np.stack(join_peaks(*one.T, *other.T), axis=1)


def _divide(total, by):
    return da.map_blocks(_quotient, total, by, dtype=np.float64, meta=np.empty((0,) * total.ndim))


@np.errstate(divide="ignore", invalid="ignore")
def _quotient(total, by):
    return total / by


def _threaded(*blocks, function, **options):
    with threads.one_in_a_worker():
        return function(*blocks, **options)


def _on_block(function, width, given, block, *others, **options):
    """Columns (..., width) of a block; ``others`` are ``given`` arrays of rows, then where its classes start."""
    with threads.one_in_a_worker():
        columns = function(block, *others[:given], vocab_start=int(others[given][0]), **options)
    return columns.reshape(*block.shape[:-1], width)


def _accumulate(block, targets, sample_weight=None, **options):
    return shards.accumulate(block, targets, sample_weight=sample_weight, **options).columns


def _accumulate_scores(block, targets, own, **options):
    return shards.accumulate_scores(block, targets, own, **options).columns


def _state_of(columns, options):
    """The state of rows (..., 9)."""
    return LseState(columns.reshape(-1, columns.shape[-1]), **_units(options))


def _units(options):
    """What logits are in nats: the options that a state is made under."""
    return {name: options[name] for name in ("softcap", "temperature") if options.get(name) is not None}


def _losses(states, targets, sample_weight=None, **options):
    options |= {"sample_weight": sample_weight, "reduction": "none"}
    return shards.finalize(_state_of(states, options), targets, **options)


def _lse(states, targets, sample_weight=None, *, real, **options):
    options |= {"sample_weight": sample_weight, "reduction": "none", "return_lse": True}
    return shards.finalize(_state_of(states, options), targets, **options)[1].astype(real)


def _counts(targets, sample_weight=None, **options):
    return shards.row_weights(targets, sample_weight=sample_weight, **options)


def _gradient(block, states, start, targets, each, sample_weight=None, **options):
    options |= {"vocab_start": int(start[0]), "reduction": "none", "sample_weight": sample_weight}
    state = _state_of(states, options)
    with threads.one_in_a_worker():
        return shards.gradient(block, targets, state, grad_output=each, **options)


def _score_rows(block, targets, **options):
    return scoring.score(block, targets, **options).to_records()


def _finalize_scores(states, targets, logits_dtype, top_k, ignore_index, **units):
    state = ScoreState(states.reshape(-1, states.shape[-1]), **units)
    options = {"top_k": top_k, "ignore_index": ignore_index, "dtype": logits_dtype}
    return shards.finalize_scores(state, targets, **options).to_records()


def _peaks(logits, scale, split_every, backend):
    """The largest logit times scale of each row, and how far the lse is above it: (..., 2)."""
    temperature, k = temperature_of(scale), logits.ndim - 1
    peaks = da.map_blocks(
        _peak, logits, temperature=temperature, nats=float(scale), backend=backend, dtype=np.float64,
        chunks=(*logits.chunks[:-1], (2,) * logits.numblocks[-1]), meta=np.empty((0,) * (k + 1)),
    )  # fmt: skip
    return _merged(peaks, _merge_peaks, 2, split_every)


def _peak(block, temperature, nats, backend):
    rows = as_rows(block)
    with threads.one_in_a_worker():
        found = backends.choose(backend).statistics(
            rows, np.full(len(rows), LARGEST), temperature=temperature, wanted=("target_logit",)
        )
    peak, excess = found.target_logit * nats, found.nll
    for i in np.flatnonzero(np.isinf(peak)):  # infinities, but a row that is NaN too stays NaN
        peak[i] = rows[i : i + 1].astype(np.float64).max()
        excess[i] = 0.0
    return np.stack([peak, excess], axis=1).reshape(*block.shape[:-1], 2)


def _lse_of(peaks, real):
    return (peaks[..., 0] + peaks[..., 1]).astype(real)


def _log_softmax_of(block, peaks, nats):
    peak, excess = peaks[..., :1], peaks[..., 1:]
    with np.errstate(invalid="ignore", over="ignore"):
        below = nats * block.astype(np.float64) - np.where(np.isinf(peak), np.nan, peak)
        return (below - excess).astype(checks.gradient_dtype(block.dtype))
