"""How a row's target comes to a kernel, and where what is found of the row goes: as verbs have it, in arrays.

A kernel begins and ends its rows through these functions alone. `losses` has the others, for the caller's own targets
and losses.
"""

from typing import NamedTuple

import numpy as np

from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.losses import build_ends_of_loss
from fastxent.rowmath import Table


class Results(NamedTuple):
    """Addresses of `fastxent.state.Statistics`, float64 (N,) each; 0 where it is not wanted."""

    nll: int
    target_logit: int
    peak: int
    lse: int
    gap: int


class Coefficients(NamedTuple):
    """Addresses of `fastxent.state.Coefficients`, float64; a step is 8, or 0 where all rows have the same."""

    hit: int
    smooth: int
    extra: int
    square: int
    hit_step: int
    smooth_step: int
    extra_step: int
    square_step: int


NO_RESULTS = Results(0, 0, 0, 0, 0)


@of_kind
def build_ends(ops, kind, ends):
    """``target_of`` a row, `IGNORED` or not less than the number of classes where it is not to be read; ``note_bad``;
    its ``coefficients_of``; ``put`` what is found and ``ignore`` what is not; and ``close`` the rows of a block.

    ``ends``: whose rows they are, a "verb"'s with `Results` and `Coefficients`, or those of a "loss" with
    `fastxent.backends.cuda.losses.Loss` and ``Upstream``.
    """
    if ends == "loss":
        return build_ends_of_loss(ops, kind)
    load_float64, store_float64, load_int64 = ops.load_float64, ops.store_float64, ops.load_int64
    raise_flag, function = ops.raise_flag, ops.function

    @function
    def target_of(i, rows, results):
        return load_int64(rows.targets + i * 8)

    @function
    def note_bad(i, rows, results):
        raise_flag(rows.flag, i + 1)

    @function
    def coefficients_of(i, target, coefficients, rows, results):
        return (
            load_float64(coefficients.hit + i * coefficients.hit_step),
            load_float64(coefficients.smooth + i * coefficients.smooth_step),
            load_float64(coefficients.extra + i * coefficients.extra_step),
            load_float64(coefficients.square + i * coefficients.square_step),
        )

    @function
    def put_one(address, i, value):
        if address != 0:
            store_float64(address + i * 8, value)

    @function
    def put(i, target, nll, target_logit, peak, lse, gap, rows, results):
        put_one(results.nll, i, nll)
        put_one(results.target_logit, i, target_logit)
        put_one(results.peak, i, peak)
        put_one(results.lse, i, lse)
        put_one(results.gap, i, gap)

    @function
    def ignore(i, nothing, rows, results):
        put(i, 0, nothing, np.nan, np.nan, np.nan, nothing, rows, results)

    @function
    def close(first, most, rows, results):
        pass

    return Table(
        target_of=target_of, note_bad=note_bad, coefficients_of=coefficients_of, put=put, ignore=ignore, close=close
    )
