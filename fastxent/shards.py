"""Cross entropy over classes that are never together: shards of a process each, chunks of a file, blocks of a stream.

A block holds the logits of all rows for some classes, those from ``vocab_start`` on. `accumulate` makes a mergeable
`fastxent.LseState` of it; merged over all blocks it gives every row's loss (`finalize`) and, block by block, the
gradient (`gradient`), with the digits and the options of `fastxent.cross_entropy`. What travels between processes is 72
bytes a row, `LseState.pack`.

Every function takes the whole problem's targets, which count from class 0, and the same options; ``weight`` is that of
all classes. Targets are class indices.

Examples
--------
Two processes hold half of the classes each:

>>> import numpy as np
>>> from fastxent import shards
>>> logits, targets = np.float32([[20, 0, 0, 0], [0, 1, 2, 3]]), np.array([0, 2])
>>> halves = {0: logits[:, :2], 2: logits[:, 2:]}
>>> states = [shards.accumulate(half, targets, vocab_start=start) for start, half in halves.items()]
>>> whole = states[0].merge(states[1])
>>> print(shards.finalize(whole, targets, reduction="none").round(12))
[6.1830000e-09 1.4401897e+00]
>>> shards.gradient(halves[0], targets, whole, vocab_start=0, reduction="none").round(3)
array([[-0.   ,  0.   ],
       [ 0.032,  0.087]], dtype=float32)
"""

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastxent import arguments, backends, checks, scoring, terms
from fastxent.rows import as_rows, points
from fastxent.score_state import ScoreState
from fastxent.state import ABSENT, IGNORED, LseState, Statistics, check_alike, in_block

__all__ = [
    "accumulate",
    "accumulate_scores",
    "finalize",
    "finalize_scores",
    "gradient",
    "row_weights",
    "target_logits",
]


def accumulate(
    block: ArrayLike,
    targets: ArrayLike,
    *,
    vocab_start: int = 0,
    classes: int | None = None,
    state: LseState | None = None,
    backend: str | None = None,
    **options: Any,
) -> LseState:
    """What is known of each row after a block of its classes.

    Parameters
    ----------
    block : array_like of float16, bfloat16, float8, float32 or float64, shape (..., B)
        The logits of classes ``vocab_start`` to ``vocab_start + B``; never changed. Read once.
    targets : array_like of integers, shape (...)
        Class indices among all classes, or ``ignore_index``; most lie in other blocks.
    vocab_start : int
        The first class of the block.
    classes : int, optional
        How many there are in all: targets are held to it. `fastxent.cross_entropy`'s ``weight`` tells it too, and with
        ``label_smoothing`` one of the two must.
    state : LseState, optional
        What is known already, of other classes: the result is merged to it, a stream's way.
    backend : str, optional
        A name from `fastxent.backends`.
    **options
        Of `fastxent.cross_entropy`: ``ignore_index``, ``temperature`` and ``softcap`` always matter here, ``weight``
        where there is ``label_smoothing``; the others may be given.

    Returns
    -------
    LseState
        Blocks cut at multiples of `fastxent.state.STRIP` classes and accumulated in order give the bits of the whole
        row, if it has more than 128 classes; cut anywhere and merged in any order they agree within the accuracy
        promised for it.

    Raises
    ------
    IndexError
        If a target is out of range.
    TypeError, ValueError
        If an argument has the wrong dtype, shape or value.
    BackendUnavailableError
        If the backend cannot run here.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> logits, targets = np.float32([[20, 0, 0, 0]]), [0]
    >>> state = shards.accumulate(logits[:, :2], targets)
    >>> state = shards.accumulate(logits[:, 2:], targets, vocab_start=2, state=state)
    >>> state.nll()
    array([6.18346085e-09])
    """
    rows, of_rows = _read(block, targets, vocab_start, classes, options)
    softcap, temperature = of_rows.options.softcap, of_rows.options.temperature
    if state is not None:
        check_alike(state, LseState.empty(len(rows), softcap, temperature))
    return backends.choose(backend).accumulate(
        rows, of_rows.targets, spread=spread_of(of_rows, rows, vocab_start), vocab_start=vocab_start, state=state,
        softcap=softcap, temperature=temperature,
    )  # fmt: skip


def finalize(state: LseState, targets: ArrayLike, *, classes: int | None = None, **options: Any) -> Any:
    """The loss of rows all of whose classes are in ``state``, as `fastxent.cross_entropy` gives it but in float64.

    `LseState.nll` and `LseState.lse` are the plain figures of each row.

    Parameters
    ----------
    state : LseState
    targets, classes, **options
        As for `accumulate`; ``reduction``, ``label_smoothing``, ``z_loss``, ``sample_weight``, ``denominator`` and
        ``return_lse`` mean what they do for `fastxent.cross_entropy`.

    Returns
    -------
    loss : NumPy scalar or ndarray of float64
        With ``return_lse`` a tuple of it and the lse.

    Raises
    ------
    ValueError
        If a target lies in no block, or in two; if the state was made under another softcap or temperature, or, with
        ``label_smoothing``, its classes do not weigh what all weigh together.
    IndexError, TypeError
        As `accumulate`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> state = shards.accumulate(np.zeros((2, 4)), [1, 3])
    >>> shards.finalize(state, [1, 3])
    np.float64(1.3862943611198906)
    """
    targets = np.asarray(targets)
    of_rows = _terms(targets.shape, targets, 0, classes, options)
    return of_rows.loss(statistics_of(state, of_rows))


def gradient(
    block: ArrayLike,
    targets: ArrayLike,
    state: LseState,
    *,
    vocab_start: int = 0,
    classes: int | None = None,
    grad_output: ArrayLike = 1.0,
    out: NDArray | None = None,
    backend: str | None = None,
    **options: Any,
) -> NDArray:
    """The gradient of the loss with respect to a block of the logits.

    p_k = exp(z_k - lse) comes from the state of all classes, and the target's p - 1 from the sum of the other classes,
    never by subtraction. The block is read once and the gradient written once.

    Parameters
    ----------
    block, targets, vocab_start, classes, backend, **options
        As for `accumulate` and `finalize`.
    state : LseState
        Of all classes.
    grad_output, out
        As for `fastxent.cross_entropy_with_grad`; ``out`` has the block's shape, and may be the block.

    Returns
    -------
    ndarray, shape (..., B)
        Of the block's dtype, float32 for float8; ``out`` if it was given.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As `accumulate` and `finalize`; always before anything is written.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> block, targets = np.zeros((1, 4)), [1]
    >>> shards.gradient(block, targets, shards.accumulate(block, targets))
    array([[ 0.25, -0.75,  0.25,  0.25]])
    """
    written = checks.read_out(out, checks.read_array(block))
    rows, of_rows = _read(block, targets, vocab_start, classes, options)
    statistics_of(state, of_rows)
    grad_output = checks.read_grad_output(grad_output, of_rows.options.reduction, of_rows.problem.shape).reshape(-1)
    backends.choose(backend).gradient(
        rows, of_rows.targets, state, of_rows.coefficients(grad_output), as_rows(written),
        spread=spread_of(of_rows, rows, vocab_start), vocab_start=vocab_start, target_share=_target_share(of_rows),
    )  # fmt: skip
    return written


def row_weights(targets: ArrayLike, *, classes: int | None = None, **options: Any) -> NDArray[np.float64]:
    """What each row counts in a mean: the divisor of `finalize` is their sum, unless ``denominator`` is given.

    Parameters
    ----------
    targets, classes, **options
        As for `accumulate`; ``weight``, ``sample_weight`` and ``ignore_index`` matter here.

    Returns
    -------
    ndarray of float64, of the targets' shape
        0 where a target is ignored.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `accumulate`.

    Examples
    --------
    >>> from fastxent import shards
    >>> shards.row_weights([0, -100, 1], weight=[0.5, 2.0])
    array([0.5, 0. , 2. ])
    """
    targets = np.asarray(targets)
    of_rows = _terms(targets.shape, targets, 0, classes, options)
    weight = 1.0 if of_rows.options.sample_weight is None else of_rows.options.sample_weight
    return np.broadcast_to(of_rows.row_weight * weight, of_rows.rows).reshape(targets.shape)


def target_logits(block: ArrayLike, targets: ArrayLike, *, vocab_start: int = 0) -> NDArray[np.float64]:
    """The logit of each row's target where it lies in this block. So many elements are read, not the block.

    Parameters
    ----------
    block, targets, vocab_start
        As for `accumulate`; no target is held to a range.

    Returns
    -------
    ndarray of float64, of the targets' shape
        -inf where the target is no class of this block; `numpy.maximum` merges those of all blocks.

    Raises
    ------
    TypeError, ValueError
        If the block has the wrong dtype, or no classes; if targets are no class indices of its rows; if
        ``vocab_start`` is no whole number from 0 on.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> shards.target_logits(np.eye(2), [1, 3], vocab_start=1)
    array([  1., -inf])
    """
    logits, targets = checks.read_logits(block), np.asarray(targets)
    arguments.check_targets(targets.shape, targets.dtype, logits.shape)
    _check_start(vocab_start)
    rows = as_rows(logits)
    place = targets.reshape(-1).astype(np.int64) - vocab_start
    here = (place >= 0) & (place < rows.shape[1])
    found = points(rows, np.where(here, place, 0)[:, None])[:, 0].astype(np.float64)
    return np.where(here, found, -np.inf).reshape(targets.shape)


def accumulate_scores(
    block: ArrayLike,
    targets: ArrayLike,
    own: ArrayLike,
    *,
    vocab_start: int = 0,
    classes: int | None = None,
    top_k: int = 0,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> ScoreState:
    """What a scorer knows of each row after a block of its classes.

    Parameters
    ----------
    block, targets, vocab_start, classes, backend
        As for `accumulate`. The block is read twice, again where a target lies in another block (or a row holds NaN or
        infinities), and once more where it has up to 128 classes.
    own : array_like of float, shape (...)
        The targets' logits, wherever they lie: `target_logits` of all blocks, merged. Ranks are counted against them.
    top_k, ignore_index, temperature, softcap
        As for `fastxent.score`.

    Returns
    -------
    ScoreState
        It keeps the ``top_k`` largest classes, one at least; states of all blocks are merged by `ScoreState.merge`.

    Raises
    ------
    IndexError, TypeError, ValueError, BackendUnavailableError
        As `accumulate`, and for a bad ``own`` or ``top_k``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> logits, targets = np.log([[0.5, 0.125, 0.375]]), [1]
    >>> state = shards.accumulate_scores(logits, targets, shards.target_logits(logits, targets), top_k=2)
    >>> state.ids, state["above"]
    (array([[0., 2.]]), array([2.]))
    """
    scaling = {"softcap": softcap, "temperature": temperature}
    rows, of_rows = _read(block, targets, vocab_start, classes, scaling | {"ignore_index": ignore_index})
    arguments.ScoreOptions(top_k=top_k).check((max(of_rows.classes, top_k),))
    verbs, marked, levels = backends.choose(backend), of_rows.targets, checks.read_reals("own", own).reshape(-1)
    if len(levels) != len(rows):
        raise ValueError(f"own must hold a logit for each of {len(rows)} targets; got {len(levels)}")
    lse_state = verbs.accumulate(rows, marked, vocab_start=vocab_start, **scaling)
    here, ignored = in_block(marked, rows, vocab_start), marked == IGNORED
    kept = max(1, top_k)
    given = min(kept, rows.shape[1])
    found = verbs.score(rows, np.where(here == ABSENT, 0, here), top_k=given, **scaling)
    ids, logits = np.full((2, len(rows), kept), np.inf)
    logits *= -1.0
    ids[:, :given] = found.top_ids
    nothing = _without_mass(rows, (found.argmax < 0) & ~ignored)
    ids[nothing, :given] = np.arange(given)
    known = ids[:, 0] >= 0.0
    ids[~known] = np.inf
    logits[known, :given] = points(rows, np.where(known[:, None], ids, 0)[:, :given].astype(np.int64))[known]
    ids += vocab_start
    excess, entropy, sum_p2 = 0.0 - found.top_log_probs[:, 0], found.entropy, found.sum_p2
    counts = np.stack([found.rank - 1, found.rank_hi - found.rank], axis=1)
    if (counted := (here == ABSENT) | (found.argmax < 0) & ~ignored).any():
        counts[counted] = (verbs.count(rows, levels) - np.stack([here < 0, here >= 0], axis=1) * [0, 1])[counted]
    figures = np.stack([excess, entropy, sum_p2, *counts.T], axis=1)
    figures[nothing, :3] = 0.0
    figures[ignored] = 0.0
    return ScoreState(np.hstack([lse_state.columns, figures, ids, logits]), softcap, temperature)


def finalize_scores(
    state: ScoreState,
    targets: ArrayLike,
    *,
    top_k: int = 0,
    ignore_index: int | None = -100,
    dtype: Any = np.float64,
) -> scoring.Scores:
    """`fastxent.Scores` of rows all of whose classes are in ``state``.

    Parameters
    ----------
    state : ScoreState
    targets, ignore_index
        As for `accumulate_scores`.
    top_k : int
        How many of the largest classes to give, no more than the state keeps.
    dtype : dtype
        Of the logits: floats are float64 for float64, else float32.

    Returns
    -------
    Scores
        Of the targets' shape, without ``id_log_probs``.

    Raises
    ------
    ValueError
        If a target lies in no block, or in two, or the state keeps fewer classes or has another number of rows.
    IndexError, TypeError
        As `accumulate`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastxent import shards
    >>> logits, targets = np.log([[0.5, 0.125, 0.375]]), [1]
    >>> state = shards.accumulate_scores(logits, targets, shards.target_logits(logits, targets), top_k=2)
    >>> scores = shards.finalize_scores(state, targets, top_k=2)
    >>> scores.rank, scores.top_ids
    (array([3]), array([[0, 2]]))
    """
    targets = np.asarray(targets)
    of_rows = _terms(targets.shape, targets, 0, None, {"ignore_index": ignore_index})
    if top_k > state.ids.shape[1]:
        raise ValueError(f"top_k must be at most {state.ids.shape[1]}, what the state keeps; got {top_k}")
    check_alike(state, LseState.empty(of_rows.rows, state.softcap, state.temperature))
    _check_targets(state.lse_state, of_rows)
    records = np.empty(len(state), scoring.record_dtype(np.dtype(dtype), top_k))
    scoring.fill_records(records, state.scores(top_k), of_rows.targets)
    return scoring.Scores.from_records(records.reshape(targets.shape))


def _without_mass(rows, which):
    """Of the rows ``which``, those all of whose logits are -inf; the others hold NaN or +inf."""
    empty = np.zeros(len(rows), bool)
    for i in np.flatnonzero(which):
        empty[i] = rows[i : i + 1].astype(np.float64).max() == -np.inf
    return empty


def _check_start(vocab_start):
    if isinstance(vocab_start, bool) or operator.index(vocab_start) < 0:
        raise ValueError(f"vocab_start must be a whole number from 0 on; got {checks.shown(vocab_start)}")


def _read(block, targets, vocab_start, classes, options):
    """The rows of a block, and the terms of the problem that all classes make."""
    block = checks.read_logits(block)
    _check_start(vocab_start)
    return as_rows(block), _terms(block.shape[:-1], targets, vocab_start + block.shape[-1], classes, options)


def _terms(batch, targets, stop, classes, options):
    """`fastxent.terms.IndexTerms` of logits (*batch, V) that nobody has, of which some block ends at class ``stop``."""
    if isinstance(targets, tuple) or (targets := np.asarray(targets)).dtype.kind not in "iu":
        raise TypeError("targets of shards must be class indices, integers; probabilities need whole rows")
    if options.get("axis", -1) != -1:
        axis = checks.shown(options["axis"])
        raise ValueError(f"axis must be -1: the classes of a block are its last axis; got {axis}")
    if classes is None:
        classes = _classes_of(targets, stop, options)
    if stop > classes:
        raise ValueError(f"a block must end within the {classes} classes; it ends at {stop}")
    whole = np.broadcast_to(np.float64(0.0), (*batch, classes))
    return terms.of(arguments.normalise(whole, targets, options))


def _classes_of(targets, stop, options):
    """How many classes there are in all, as far as it matters."""
    if options.get("weight") is not None:
        return len(np.atleast_1d(options["weight"]))
    if options.get("label_smoothing"):
        raise ValueError("classes must be given with label_smoothing: a block does not tell how many there are")
    return max(stop, 1, int(targets.max(initial=0)) + 1)


def spread_of(of_rows, rows, vocab_start):
    """The `Spread` over the classes of a block."""
    if of_rows.spread is None:
        return None
    weight = of_rows.spread.weight
    return of_rows.spread._replace(
        weight=weight if len(weight) == 1 else weight[vocab_start : vocab_start + rows.shape[1]]
    )


def _target_share(of_rows):
    """What each row's target weighs in the `Spread`, (N,)."""
    if of_rows.spread is None:
        return terms.NOUGHT
    return np.broadcast_to(of_rows.spread.weight, of_rows.classes)[np.maximum(of_rows.targets, 0)]


def statistics_of(state, of_rows):
    """`fastxent.state.Statistics` of whole rows from the state of all their classes."""
    options, counted = of_rows.options, np.broadcast_to(of_rows.problem.counted, of_rows.rows)
    check_alike(state, LseState.empty(of_rows.rows, options.softcap, options.temperature))
    _check_targets(state, of_rows)
    gap, share = np.empty(0), _target_share(of_rows)
    if of_rows.spread is not None:
        weighed, mass = state["mass"] + share, of_rows.mass(slice(None))[0]
        if not np.allclose(weighed[counted], mass, rtol=1e-9, atol=0.0):
            raise ValueError(
                f"with label_smoothing the classes of a state must weigh {mass} together, as all do; "
                f"got {weighed[counted][~np.isclose(weighed[counted], mass, rtol=1e-9, atol=0.0)][0]}"
            )
        gap = np.where(counted, state.gap(share), 0.0)
    lse = np.where(counted, state.lse(), np.nan) if "lse" in of_rows.wanted else np.empty(0)
    return Statistics(np.where(counted, state.nll(), 0.0), np.empty(0), np.empty(0), lse, gap)


def _check_targets(state, of_rows):
    wrong = of_rows.problem.counted & (state["target_mass"] != 1.0)
    if wrong.any():
        raise ValueError(
            f"every target must lie in one shard; {int(wrong.sum())} of {wrong.size} do not, "
            f"the first in row {int(wrong.argmax())}"
        )
