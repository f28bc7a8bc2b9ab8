"""The loss and the loss with its gradient over shapes, dtypes, backends and threads."""

import time

import numpy as np

import fastxent
from fastxent.bench import cases

SHAPES = [f"{rows}x{classes}" for rows, classes in cases.SPEED_SHAPES]


class _Problem:
    """Arrays, threads, and one warm call that is checked; the reference takes a hundredth of the rows."""

    params = (SHAPES, ["float32", "float64"], ["cpu", "reference"], ["1", "all"])
    param_names = ("shape", "dtype", "backend", "threads")

    def setup(self, shape, dtype, backend, threads):
        import numba

        if backend == "reference" and threads != "1":
            raise NotImplementedError("the reference has one thread")
        numba.set_num_threads(1 if threads == "1" else numba.config.NUMBA_NUM_THREADS)
        rows, classes = map(int, shape.split("x"))
        case = cases.speed_case(rows if backend == "cpu" else max(1, rows // 100), classes, dtype)
        self.logits, self.targets, _ = case.build()
        self.out = np.empty_like(self.logits)
        self.backend = backend
        self.check(self.run())

    def check(self, got):
        rows = slice(0, 16)
        want = self.reference(self.logits[rows].astype(np.float64), self.targets[rows], len(self.logits))
        np.testing.assert_allclose(got[rows], want, rtol=1e-4, atol=1e-9)

    def ns_per_element(self):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self.run()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds)) / self.logits.size * 1e9


class Loss(_Problem):
    def run(self):
        return fastxent.cross_entropy(self.logits, self.targets, reduction="none", backend=self.backend)

    def reference(self, logits, targets, rows):
        return fastxent.cross_entropy(logits, targets, reduction="none", backend="reference")

    def time_loss(self, *params):
        self.run()

    def track_loss(self, *params):
        return self.ns_per_element()

    track_loss.unit = "ns/element"


class ScoreWithTopFive(_Problem):
    def run(self):
        return fastxent.score(self.logits, self.targets, top_k=5, backend=self.backend).log_prob

    def reference(self, logits, targets, rows):
        return -fastxent.cross_entropy(logits, targets, reduction="none", backend="reference")

    def time_score(self, *params):
        self.run()

    def track_score(self, *params):
        return self.ns_per_element()

    track_score.unit = "ns/element"


class LossAndGradient(_Problem):
    def run(self):
        return fastxent.cross_entropy_with_grad(self.logits, self.targets, out=self.out, backend=self.backend)[1]

    def reference(self, logits, targets, rows):
        return fastxent.cross_entropy_grad(logits, targets, denominator=rows, backend="reference")

    def time_loss_and_gradient(self, *params):
        self.run()

    def track_loss_and_gradient(self, *params):
        return self.ns_per_element()

    track_loss_and_gradient.unit = "ns/element"


class Call:
    """What a call costs beyond its arithmetic."""

    def setup(self):
        self.logits, self.targets = np.zeros((1, 10), np.float32), np.zeros(1, np.int64)
        fastxent.cross_entropy(self.logits, self.targets)

    def time_smallest_call(self):
        fastxent.cross_entropy(self.logits, self.targets)
