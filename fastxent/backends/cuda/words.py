"""What a kernel is told, and how its threads take logits and shares from memory: 16 bytes at a time, from anywhere."""

from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """What a kernel is compiled for.

    form of the logits; whether they are capped; spread is "none", "even" (all classes weigh the same), "weights" or
    "probabilities"; largest: a row's largest logit is left out of its sum, else its target is. ``threads`` have a row,
    ``rows`` rows are in a block, ``strip`` classes are summed by a block.
    """

    form: str
    capped: bool
    spread: str
    largest: bool
    threads: int
    rows: int
    strip: int


class Shares(NamedTuple):
    """What each class weighs: scale weight_k (keep q_k + even). Addresses of weight (V,), none above 1, and of
    probabilities (N, V) with ``stride`` numbers from row to row, both of the kind that is computed with; of ``keep``
    and ``even`` the bits in that kind.
    """

    weight: int
    probabilities: int
    stride: int
    keep: int
    even: int
    scale: float


class Scaling(NamedTuple):
    """`fastxent.rowmath.rate` for the logits and for what belongs to a row; cap is 1 / softcap, 0 without.

    Of those for logits the bits, in the kind that is computed with: an instruction takes them from where arguments are,
    while a float64 would have to be converted first, and keep a register.
    """

    high: int
    low: int
    nats: int
    cap: int
    row_high: float
    row_low: float
    row_nats: float


def build_loads(ops, form):
    """``load(at, misplaced, first, last)``: 16 bytes from any address ``at``, which is ``misplaced`` bytes beyond a
    multiple of 16, of a row that lies from ``first`` to ``last``.
    """
    load_word, realigned = ops.load_word, form.realigned

    @ops.function
    def load(at, misplaced, first, last):
        """Bytes outside the row are nonsense. A word with at least one byte of the row in it is never out of bounds."""
        if misplaced == 0:
            return load_word(at)
        low = at - misplaced
        before = load_word(low if low + 16 > first else low + 16)
        after = load_word(low + 16 if low + 16 < last else low)
        return realigned(before, after, misplaced)

    return load


def build_shares(ops, kind):
    """``share(shares, row, k, classes)``: what as many classes from ``k`` on weigh as there are logits in a word."""
    form = ops.form(kind.form)
    plain = ops.form(np.dtype(form.real).name)
    load, lanes_of, from_bits, decode = build_loads(ops, plain), form.lanes_of, plain.from_bits, plain.decode
    fma, concatenated, one = ops.fma, ops.concatenated, form.real(1)
    count, itemsize = plain.count, plain.itemsize

    @ops.function
    def one_word(start, k, classes):
        """A word wholly outside the classes is not wanted by anybody; one that is there is read in its place."""
        k = k if k > -count else 1 - count
        k = k if k < classes else classes - 1
        at = start + k * itemsize
        return decode(load(at, at & 15, start, start + classes * itemsize))

    @ops.function
    def two_words(start, k, classes):
        return concatenated(one_word(start, k, classes), one_word(start, k + count, classes))

    @ops.function
    def four_words(start, k, classes):
        return concatenated(two_words(start, k, classes), two_words(start, k + 2 * count, classes))

    numbers = {1: one_word, 2: two_words, 4: four_words}[form.count // count]

    @ops.function
    def same(shares, row, k, classes):
        return lanes_of(one)

    @ops.function
    def weights(shares, row, k, classes):
        return numbers(shares.weight, k, classes)

    @ops.function
    def masses(shares, row, k, classes):
        start = shares.probabilities + row * shares.stride * itemsize
        q = fma(numbers(start, k, classes), from_bits(shares.keep), lanes_of(from_bits(shares.even)))
        return numbers(shares.weight, k, classes) * q

    return {"none": same, "even": same, "weights": weights, "probabilities": masses}[kind.spread]
