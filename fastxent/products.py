"""Products of hidden states and an output matrix, tile by tile: what the fused linear loss does beside its kernels.

A tile is NumPy's matrix product, on whatever BLAS that has, run by one of our threads on one thread of the BLAS, and so
are the kernels. BLAS and Numba each keep threads that spin for milliseconds after their work, and in a loop that turns
from one to the other they take the cores from each other. How matrices are cut follows from their shapes and the
memory allowed alone, so no bit depends on the number of threads.
"""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_ROWS, _CLASSES = 1024, 2048  # of a tile of logits
_COLUMNS = 512  # of a tile of the hidden states' gradient, at most
_PIECE = 1 << 20  # elements of a matrix converted, or of a product that is added to what is there


@dataclass(frozen=True, slots=True)
class Layer:
    """Hidden states (N, K), an output matrix (V, K) and a bias (V,) or None: in place of their logits (N, V).

    The logits are made in ``dtype``, float32 or float64, whatever the three are stored in.
    """

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    dtype: np.dtype

    @property
    def shape(self):
        """That of the logits."""
        return len(self.hidden), len(self.weight)

    @property
    def width(self):
        """K."""
        return self.weight.shape[1]

    def logits(self, hidden, classes, out):
        """The logits of readable hidden states (n, K) and a slice of classes, written to ``out`` (n, c)."""
        count = classes.stop - classes.start
        step = count if readable(self.weight, self.dtype) else max(1, min(_CLASSES, _PIECE // self.width))
        for part in slices(0, count, step):
            weight = self.weight[classes.start + part.start : classes.start + part.stop]
            np.matmul(hidden, taken(weight, self.dtype).T, out=out[:, part])
        if self.bias is not None:
            out += self.bias[classes]

    def all_logits(self, workers, hidden, out):
        """`logits` of all classes, tile by tile."""

        def tile(place):
            rows, classes = place
            self.logits(hidden[rows], classes, out[place])

        rows, classes = (slices(0, size, step) for size, step in zip(out.shape, (_ROWS, _CLASSES), strict=True))
        workers.run((tile, [(these, part) for part in classes for these in rows]))


def readable(array, dtype):
    """Whether BLAS can read an array of two axes as it is, for a product in ``dtype``."""
    return array.dtype == dtype and array.dtype.isnative and array.flags.aligned and dtype.itemsize in array.strides


def taken(array, dtype):
    """``array``, or a copy of it that is `readable`."""
    if readable(array, dtype):
        return array
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:  # its upper half; astype would hold the interpreter
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, dtype)


class Gradients:
    """Where the gradients of a `Layer` are summed, block of rows after block: logits' gradients in, products out.

    ``dhidden`` (N, K), ``dweight`` (V, K) and ``dbias`` (V,) are C-contiguous, or None where nobody wants them. Where
    there are several blocks, what is narrower than the layer's dtype is summed apart and rounded once.
    """

    def __init__(self, layer, dhidden, dweight, dbias, blocks):
        self._layer, self._dhidden, self._dweight, self._dbias = layer, dhidden, dweight, dbias
        apart = dweight is not None and blocks > 1 and dweight.dtype.itemsize < layer.dtype.itemsize
        self._sum = np.empty(dweight.shape, layer.dtype) if apart else dweight
        self._bias_sum = None if dbias is None else np.zeros(dbias.shape)
        self._first = True
        if not blocks and dweight is not None:
            self._sum[...] = 0

    def add(self, workers, rows, hidden, dlogits):
        """The gradients of a block: its rows, a slice or indices, their readable hidden states, and dlogits (n, V)."""
        layer, work = self._layer, []
        dhidden: Any = None
        if self._dhidden is not None:
            direct = isinstance(rows, slice) and self._dhidden.dtype == layer.dtype
            dhidden = self._dhidden[rows] if direct else np.empty(hidden.shape, layer.dtype)
        whole = readable(layer.weight, layer.dtype)
        parts = slices(0, len(layer.weight), len(layer.weight) if whole else max(1, _PIECE // _COLUMNS))

        def of_hidden(columns):
            for part in parts:
                weight = taken(layer.weight[part, columns], layer.dtype)
                if part.start == 0:
                    np.matmul(dlogits[:, part], weight, out=dhidden[:, columns])
                else:
                    dhidden[:, columns] += dlogits[:, part] @ weight

        def of_classes(part):
            if self._bias_sum is not None:
                self._bias_sum[part] += dlogits[:, part].sum(axis=0, dtype=np.float64)
            if self._sum is None:
                return
            if self._first and self._sum.dtype == layer.dtype:
                np.matmul(dlogits[:, part].T, hidden, out=self._sum[part])
            elif self._first:
                self._sum[part] = dlogits[:, part].T @ hidden
            else:
                self._sum[part] += dlogits[:, part].T @ hidden

        if dhidden is not None:
            columns = -(-layer.width // -(-layer.width // _COLUMNS))
            work.append((of_hidden, slices(0, layer.width, columns)))
        if self._sum is not None or self._bias_sum is not None:
            work.append((of_classes, slices(0, len(layer.weight), max(1, min(_CLASSES, _PIECE // layer.width)))))
        workers.run(*work)
        self._first = False
        if dhidden is not None and not direct:
            with np.errstate(over="ignore"):
                self._dhidden[rows] = dhidden

    def finish(self, counted):
        """What was summed apart goes where it belongs, and zeros to the rows that do not count."""
        if counted is not True and self._dhidden is not None:
            self._dhidden[~counted] = 0
        with np.errstate(over="ignore"):
            if self._sum is not self._dweight:
                self._dweight[...] = self._sum
            if self._dbias is not None:
                self._dbias[...] = self._bias_sum


class Workers:
    """A context in which `run` shares tasks among threads, with one BLAS thread and serial kernels in each."""

    def __init__(self, threads):
        self._threads, self._pool = threads, None

    def __enter__(self):
        _ONE_THREAD.enter()
        if self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads, initializer=_run_kernels_serially)
        return self

    def __exit__(self, *error):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        _ONE_THREAD.leave()

    def run(self, *work):
        """Call each (function, tasks) of ``work`` with each of its tasks, in no order; return when all are done."""
        calls = [(function, task) for function, tasks in work for task in tasks]
        each = map if self._pool is None else self._pool.map
        for _ in each(_call, calls):
            pass


def _call(call):
    function, task = call
    with np.errstate(over="ignore", invalid="ignore"):  # a product that overflows makes a row of infinities, or NaN
        function(task)


def _run_kernels_serially():
    from fastxent.threads import set_num_threads

    set_num_threads(1)


class _OneThread:
    """BLAS held to one thread while anyone has entered; calls from several threads must not restore each other's."""

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0
        self._limits: Any = None

    def enter(self):
        with self._lock:
            if not self._inside:
                self._limits = _controller().limit(limits=1, user_api="blas")
            self._inside += 1

    def leave(self):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()


_ONE_THREAD = _OneThread()


@functools.cache
def _controller():
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


def slices(start, stop, step):
    """Slices of ``step`` that cover those from ``start`` to ``stop``."""
    return [slice(first, min(stop, first + step)) for first in range(start, stop, step)]
