"""From the losses of rows to what the caller gets; sums are float64 in fixed blocks, the same for any threads."""

import numpy as np

_BLOCK = 1024


class Total:
    """The float64 sum of numbers that come in pieces: blocks of 1,024 in order, then their sums, wherever cut."""

    def __init__(self):
        self._sums, self._rest = [], np.empty(0)

    def add(self, values):
        """The next numbers."""
        if len(self._rest):
            values = np.concatenate([self._rest, values])
        whole = len(values) // _BLOCK * _BLOCK
        self._sums.append(values[:whole].reshape(-1, _BLOCK).sum(axis=1))
        self._rest = values[whole:].copy()

    def value(self):
        """The sum of all."""
        return np.concatenate([*self._sums, np.empty(0)]).sum() + self._rest.sum()


def total(values):
    """The float64 sum of a vector in row order: blocks of 1,024, then their sums."""
    values = np.asarray(values, np.float64)
    if len(values) <= _BLOCK:
        return values.sum()
    summed = Total()
    summed.add(values)
    return summed.value()


def divisor(row_weights, rows, reduction, denominator):
    """What a reduced loss and its gradient are divided by: 1 but for a mean; one weight may stand for all rows."""
    if reduction != "mean":
        return np.float64(1.0)
    if denominator is not None:
        return np.float64(denominator)
    return total(row_weights) if row_weights.ndim else row_weights * rows


def reduce(losses, reduction, divided_by, dtype, shape):
    """``losses`` (N,) float64 as an array of ``shape`` for "none", else as a NumPy scalar, of ``dtype``."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if reduction == "none":
            return losses.astype(dtype).reshape(shape)
        return dtype.type(total(losses) / divided_by)
