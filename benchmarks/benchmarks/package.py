"""What a process pays before its first result, and how much of its memory is resident in a pass."""

import subprocess
import sys
import time

import fastxent
from fastxent.bench.cases import speed_case

FIRST = "import numpy as np, fastxent; fastxent.cross_entropy(np.zeros((1, 2), np.float32), [0])"


class Start:
    def setup(self):
        subprocess.run([sys.executable, "-c", FIRST], check=True)

    def _seconds(self, code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    def track_import(self):
        return self._seconds("import fastxent")

    track_import.unit = "s"

    def track_first_call_from_the_cache(self):
        return self._seconds(FIRST)

    track_first_call_from_the_cache.unit = "s"


class Memory:
    def setup(self):
        self.logits, self.targets, _ = speed_case(512, 32_000).build()

    def peakmem_loss(self):
        fastxent.cross_entropy(self.logits, self.targets)

    def peakmem_loss_and_gradient_in_place(self):
        fastxent.cross_entropy_with_grad(self.logits, self.targets, out=self.logits)
