"""How rows are laid out over a GPU's threads: a matter of their length alone, so that no bit depends on the batch."""

from typing import NamedTuple

from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.words import Kind


class Layout(NamedTuple):
    """A row of at most ``tiny`` bytes belongs to ``few`` threads, one of at most ``small`` bytes to a warp, in blocks
    of ``threads``; one of at most ``middle`` bytes to a block of two warps. A longer one is cut into strips of
    ``strip`` bytes, each a block's. ``threads`` have ``shared`` bytes of shared memory at most. ``launch`` bytes of
    logits are copied at a time.
    """

    tiny: int
    few: int
    small: int
    middle: int
    threads: int
    strip: int
    shared: int
    launch: int

    def kind(self, form, classes, capped, spread, largest, mergeable=False):
        """The `Kind` for rows of so many classes; ``mergeable`` rows have strips whatever their length."""
        itemsize = FORMS[form].itemsize
        most, threads, rows = self.strip, self.threads, 1
        if not mergeable:
            sizes = (self.tiny, self.few), (self.small, 32), (self.middle, 64)
            most, threads = next((size for size in sizes if classes * itemsize <= size[0]), (most, threads))
            rows = self.threads // threads if threads <= 32 else 1
        return Kind(form, capped, spread, largest, threads, rows, most // itemsize)


# eight words of a row in each thread's registers; sixteen words a thread make up for what a row costs however short it
# is; 64 KB of one in shared memory leave room for three blocks on a multiprocessor of an H100 or B200, two on an A100
GPU = Layout(
    tiny=1024, few=8, small=4096, middle=16384, threads=256, strip=65536, shared=76800, launch=1 << 26
)  # fmt: skip
# so that small problems meet every case: several rows a block, several words a thread, several strips a row
SIMULATED = Layout(tiny=64, few=8, small=256, middle=256, threads=64, strip=2048, shared=6144, launch=1 << 14)
