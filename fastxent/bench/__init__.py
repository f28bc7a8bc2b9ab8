"""Which backend, which other library, how fast, how right, how near the limit: measured on the machine at hand.

`compare` measures and gives a `Comparison`; ``fastxent compare`` does so from the shell.
"""

from fastxent.bench.comparison import compare
from fastxent.bench.record import Comparison

__all__ = ["Comparison", "compare"]
