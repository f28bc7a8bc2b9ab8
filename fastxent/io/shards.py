"""Several sources as one: their first axes one after the other, in the order given.

Only one shard is open at a time, so there may be thousands.
"""

import collections
import itertools
import math

import numpy as np

from fastxent.io.source import Source, SourceError


class Shards(Source):
    """The concatenation of what ``openers`` open, functions without arguments that return a `Source`.

    Raises
    ------
    SourceError
        If the shards differ in dtype or in the shape after the first axis, or one changes after it was first seen.
    """

    def __init__(self, openers):
        self._openers, lengths, paths = list(openers), [], []
        self._stamps: list[list] = []
        self.mapped = True
        for opener in self._openers:
            with opener() as source:
                if not self._stamps:
                    self.name, self.shape, self.dtype = source.name, source.shape, source.dtype
                self._check_alike(source)
                self._stamps.append(source.stamp())
                lengths.append(source.shape[0])
                paths += source.paths()
                self.piece_bytes = max(self.piece_bytes, source.piece_bytes)
                self.mapped = self.mapped and source.mapped
        self.name = f"{self.name} and {len(lengths) - 1} more"
        self._paths = paths
        self.shape = (sum(lengths), *self.shape[1:])
        width = math.prod(self.shape[1:])
        self._ends = list(itertools.accumulate(length * width for length in lengths))
        self._open, self._source = -1, Source()
        self._recent: collections.deque[Source] = collections.deque(maxlen=8)

    def _check_alike(self, source):
        if not source.shape:
            raise SourceError(f"{source.name}: is a scalar and cannot be a shard")
        if (source.shape[1:], source.dtype) != (self.shape[1:], self.dtype):
            raise SourceError(
                f"{source.name}: holds rows of shape {source.shape[1:]} and {source.dtype}, "
                f"where {self.name} holds {self.shape[1:]} and {self.dtype}"
            )

    def paths(self):
        """Those of every shard."""
        return self._paths

    def stamp(self):
        """Those of every shard."""
        return self._stamps

    def check_unchanged(self):
        """Ask the shards read of late; the others are asked when they are read."""
        for source in list(self._recent):
            source.check_unchanged()

    def close(self):
        """Close the shard that is open."""
        self._source.close()
        self._open, self._source = -1, Source()

    def block(self, start, stop):
        """Elements ``start`` to ``stop`` in C order; copied where they lie in more than one shard."""
        pieces, begin = [], 0
        for number, end in enumerate(self._ends):
            if start < end and begin < stop:
                shard = self._shard(number)
                pieces.append(shard.block(max(start - begin, 0), min(stop, end) - begin))
            begin = end
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _shard(self, number):
        if number != self._open:
            self.close()
            source = self._openers[number]()
            self._open, self._source = number, source
            self._recent.append(source)
            if source.stamp() != self._stamps[number]:
                raise SourceError(f"{source.name}: changed while the run went on")
        return self._source
