"""What the way through torch and its autograd costs, on the smallest call."""

import numpy as np

import fastxent


class TorchCall:
    """A loss of a row of ten and its gradient, beside the same on arrays; one warm call of each is checked."""

    def setup(self):
        try:
            import torch

            import fastxent.torch
        except ImportError:
            raise NotImplementedError("needs torch: pip install fastxent[torch]") from None
        self.torch = torch
        self.arrays = np.linspace(-1, 1, 10, dtype=np.float32)[None], np.array([3])
        self.logits, self.targets = map(torch.from_numpy, self.arrays)
        self.logits = self.logits.clone().requires_grad_(True)
        want = fastxent.cross_entropy_grad(self.arrays[0].astype(float), self.arrays[1], backend="reference")
        for found in (self.through_torch(), self.on_arrays()):
            np.testing.assert_allclose(found, want, rtol=1e-6)

    def through_torch(self):
        loss = fastxent.torch.cross_entropy(self.logits, self.targets)
        return self.torch.autograd.grad(loss, self.logits)[0]

    def on_arrays(self):
        return fastxent.cross_entropy_with_grad(*self.arrays)[1]

    def time_loss_and_gradient_through_torch(self):
        self.through_torch()

    def time_loss_and_gradient_on_arrays(self):
        self.on_arrays()
