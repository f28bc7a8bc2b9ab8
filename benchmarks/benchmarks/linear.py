"""The loss of hidden states under an output matrix, and the products it is made of."""

import numpy as np

import fastxent
from fastxent.bench import linear, timing


class LinearLoss:
    """Times, and times as multiples of those of the bare products, in interleaved rounds; one warm call is checked."""

    params = (["256x256x16000", "1024x768x32000"],)
    param_names = ("shape",)
    timeout = 600

    def setup(self, shape):
        self.hidden, self.weight, self.targets = linear.build(tuple(map(int, shape.split("x"))))
        self.out = np.zeros_like(self.hidden), np.zeros_like(self.weight), None
        self.product, self.products = linear.limits(self.hidden, self.weight)
        rows = slice(0, 16)
        want = fastxent.linear_cross_entropy(
            self.hidden[rows], self.weight, self.targets[rows], reduction="none", backend="reference"
        )
        np.testing.assert_allclose(self.loss()[rows], want, rtol=1e-4)
        np.testing.assert_allclose(self.loss_and_gradients()[0][rows], want, rtol=1e-4)

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

    def time_scores(self, shape):
        fastxent.score_linear(self.hidden, self.weight, self.targets, top_k=5)

    def track_loss_of_its_product(self, shape):
        return self.ratio(self.loss, self.product)

    def track_loss_and_gradients_of_their_products(self, shape):
        return self.ratio(self.loss_and_gradients, self.products)

    def ratio(self, ours, limit):
        seconds = timing.interleaved({"ours": ours, "limit": limit}, 3)
        return seconds["ours"] / seconds["limit"]

    def peakmem_loss_and_gradients(self, shape):
        self.loss_and_gradients()
