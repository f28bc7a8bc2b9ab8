"""The loss of hidden states under an output matrix, and the products it is made of."""

import numpy as np

import fastxent
from fastxent.bench import linear, timing
from fastxent.bench.naive import numpy_cross_entropy, numpy_cross_entropy_with_grad


class LinearLoss:
    """Times, and times as multiples of those of the bare products, in interleaved rounds; one warm call is checked."""

    params = (["256x256x16000", "1024x768x32000"],)
    param_names = ("shape",)
    timeout = 600

    def setup(self, shape):
        self.hidden, self.weight, self.targets = linear.build(tuple(map(int, shape.split("x"))))
        self.out = np.zeros_like(self.hidden), np.zeros_like(self.weight), None
        self.product, self.products = linear.limits(self.hidden, self.weight)
        self.check()

    def check(self):
        """Against plain NumPy: all losses, both gradients, and what a score says of some rows."""
        logits = self.hidden @ self.weight.T
        losses = numpy_cross_entropy(logits, self.targets)
        _, dlogits = numpy_cross_entropy_with_grad(logits, self.targets)
        found, dhidden, dweight, _ = self.loss_and_gradients()
        each = [("loss", self.loss(), losses), ("loss with its gradients", found, losses)]
        each += [("dhidden", dhidden, dlogits @ self.weight), ("dweight", dweight, dlogits.T @ self.hidden)]
        rows = np.unique(np.linspace(0, len(logits) - 1, 16).astype(int))
        want, scores = fastxent.score(logits[rows], self.targets[rows], top_k=5), self.scores()[rows]
        names = "log_prob", "lse", "entropy", "sum_p2", "top_log_probs"
        each += [(name, getattr(scores, name), getattr(want, name)) for name in names]
        for name, got, wanted in each:
            off, size = (np.abs(part).reshape(len(part), -1).sum(axis=1) for part in (got - wanted, wanted))
            assert (off <= 1e-4 * size).all(), f"{name} is off"

    def loss(self):
        return fastxent.linear_cross_entropy(self.hidden, self.weight, self.targets, reduction="none")

    def loss_and_gradients(self):
        return fastxent.linear_cross_entropy_with_grad(
            self.hidden, self.weight, self.targets, reduction="none", out=self.out
        )

    def time_loss(self, shape):
        self.loss()

    def time_loss_and_gradients(self, shape):
        self.loss_and_gradients()

    def scores(self):
        return fastxent.score_linear(self.hidden, self.weight, self.targets, top_k=5)

    def time_scores(self, shape):
        self.scores()

    def track_loss_of_its_product(self, shape):
        return self.ratio(self.loss, self.product)

    def track_loss_and_gradients_of_their_products(self, shape):
        return self.ratio(self.loss_and_gradients, self.products)

    def ratio(self, ours, limit):
        seconds = timing.interleaved({"ours": ours, "limit": limit}, 3)
        return seconds["ours"] / seconds["limit"]


class LinearMemory:
    """The peak of the process, so nothing but the call may take memory: what it gives is checked by the class above."""

    params, param_names, timeout = LinearLoss.params, LinearLoss.param_names, LinearLoss.timeout

    def setup(self, shape):
        self.problem = linear.build(tuple(map(int, shape.split("x"))))
        self.out = *(np.zeros_like(array) for array in self.problem[:2]), None

    def peakmem_loss_and_gradients(self, shape):
        fastxent.linear_cross_entropy_with_grad(*self.problem, reduction="none", out=self.out)
