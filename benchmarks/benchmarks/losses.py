"""Every operation over shapes, dtypes, backends and threads: its time, time an element, and memory."""

import tracemalloc

import ml_dtypes
import numpy as np

import fastxent
from fastxent.bench import cases, exact, timing


def _loss(logits, targets, out, backend):
    return fastxent.cross_entropy(logits, targets, reduction="none", backend=backend)


def _loss_and_gradient(logits, targets, out, backend):
    return fastxent.cross_entropy_with_grad(logits, targets, reduction="none", out=out, backend=backend)


def _score(logits, targets, out, backend):
    return fastxent.score(logits, targets, top_k=5, backend=backend)


OPERATIONS = {
    "loss": _loss,
    "loss and gradient": _loss_and_gradient,
    "score with the top five": _score,
}


def check(operation, found, logits, targets):
    """An AssertionError unless every figure of some rows, the last among them, is within what is promised.

    It asks nothing of `fastxent.bench` that older commits lack: they are measured by this file too.
    """
    rows = np.unique(np.linspace(0, len(logits) - 1, 16).astype(int))
    losses, gradient = (wanted.astype(float) for wanted in exact.losses_and_gradient(logits[rows], targets[rows]))
    of_loss, of_gradient = (1e-12, 1e-12) if logits.dtype == float else (5e-7, 1e-6)
    limits = ml_dtypes.finfo(logits.dtype)
    if operation == "score with the top five":
        want = fastxent.score(logits[rows].astype(float), targets[rows], top_k=5, backend="reference").as_dict()
        size = np.abs(logits[rows]).max().astype(float)
        for name, figures in want.items():
            least = of_loss * size if name == "lse" else 1e-38
            np.testing.assert_allclose(getattr(found, name)[rows], figures, 2 * of_loss, least, err_msg=name)
        return
    loss = found[0] if operation == "loss and gradient" else found
    np.testing.assert_allclose(loss[rows].astype(float), losses, of_loss, err_msg="loss")
    if operation == "loss and gradient":
        entries, least = found[1][rows].astype(float), float(limits.smallest_subnormal)
        np.testing.assert_allclose(entries, gradient, of_gradient + float(limits.eps), least, err_msg="gradient")


class Operation:
    """One warm call is checked; the reference, which takes ten thousand times as long, has a hundredth of the rows."""

    params = (
        list(OPERATIONS),
        [f"{rows}x{classes}" for rows, classes in cases.SPEED_SHAPES],
        ["float32", "float64", "bfloat16", "float16"],
        ["cpu", "reference"],
        ["one thread", "all threads"],
    )
    param_names = ("operation", "shape", "dtype", "backend", "threads")

    def setup(self, operation, shape, dtype, backend, threads):
        import numba

        if backend == "reference" and threads != "one thread":
            raise NotImplementedError("the reference has one thread")
        numba.set_num_threads(1 if threads == "one thread" else numba.config.NUMBA_NUM_THREADS)
        rows, classes = map(int, shape.split("x"))
        case = cases.speed_case(rows if backend == "cpu" else max(1, rows // 100), classes, dtype)
        logits, targets, _ = case.build()
        out = np.empty_like(logits)
        self.elements = logits.size
        self.run = lambda: OPERATIONS[operation](logits, targets, out, backend)
        check(operation, self.run(), logits, targets)

    def time_call(self, *params):
        self.run()

    def track_ns_per_element(self, *params):
        return timing.interleaved({"": self.run}, 3)[""] / self.elements * 1e9

    track_ns_per_element.unit = "ns"

    def track_peak_bytes(self, *params):
        """What NumPy allocates in a call at its highest."""
        tracemalloc.start()
        try:
            self.run()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    track_peak_bytes.unit = "bytes"


class Call:
    """What a call costs beyond its arithmetic."""

    def setup(self):
        self.logits, self.targets = np.zeros((1, 10), np.float32), np.zeros(1, np.int64)
        fastxent.cross_entropy(self.logits, self.targets)

    def time_smallest(self):
        fastxent.cross_entropy(self.logits, self.targets)
