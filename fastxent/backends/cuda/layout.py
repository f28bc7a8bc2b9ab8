"""How rows are laid out over a GPU's threads: a matter of their length alone, so that no bit depends on the batch."""

from typing import NamedTuple

from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.words import Kind


class Layout(NamedTuple):
    """A row of at most ``small`` bytes belongs to a warp, ``warps`` of them to a block. A longer one is cut into strips
    of ``strip`` bytes, each for a block of ``threads``. ``launch`` bytes of logits are copied at a time.
    """

    small: int
    warps: int
    threads: int
    strip: int
    launch: int

    def kind(self, form, classes, capped, spread, largest, mergeable=False):
        """The `Kind` for rows of so many classes; ``mergeable`` rows have strips whatever their length."""
        itemsize = FORMS[form].itemsize
        if classes * itemsize <= self.small and not mergeable:
            return Kind(form, capped, spread, largest, 32, self.warps, self.small // itemsize)
        return Kind(form, capped, spread, largest, self.threads, 1, self.strip // itemsize)


# 64 KB of a row in shared memory leave room for three blocks on a multiprocessor of an H100 or B200, two on an A100
GPU = Layout(small=4096, warps=8, threads=256, strip=65536, launch=1 << 26)
# so that small problems meet every case: two warps a block, several words a thread, several strips a row
SIMULATED = Layout(small=256, warps=2, threads=64, strip=2048, launch=1 << 14)
