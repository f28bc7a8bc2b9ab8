"""What a kernel is told, and how its threads take logits and shares from memory: 16 bytes at a time, from anywhere."""

from typing import NamedTuple

import numpy as np

from fastxent import rowmath
from fastxent.backends.cuda.forms import of_kind
from fastxent.rowmath import Table


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
    """What each class weighs: scale weight_k (keep q_k + even). Addresses of weight (V,), 0 where it is 1, and of
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


@of_kind
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


@of_kind
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
        return numbers(shares.weight, k, classes) * q if shares.weight != 0 else q

    return {"none": same, "even": same, "weights": weights, "probabilities": masses}[kind.spread]


@of_kind
def build_point(ops, kind):
    """``stored`` and ``logit`` of one class of a row that lies from ``first`` to ``last``."""
    form = ops.form(kind.form)
    real = rowmath.FLOAT64 if form.real is np.float64 else rowmath.FLOAT32
    tanh_parts, load = rowmath.build_terms(ops, real).tanh_parts, build_loads(ops, form)
    decode, from_bits, lane, to_float64 = form.decode, form.from_bits, ops.lane, ops.to_float64
    itemsize, capped, function = form.itemsize, kind.capped, ops.function

    @function
    def stored(first, last, k):
        """The logit of class ``k`` as it is stored, in what is computed with."""
        return lane(decode(load(first + k * itemsize, (first + k * itemsize) & 15, first, last)), 0)

    @function
    def logit(first, last, k, scaling):
        """The logit of class ``k`` in the units of sums, and its slope."""
        x = stored(first, last, k)
        if capped:
            value, slope = tanh_parts(x * from_bits(scaling.cap))
            return to_float64(value), to_float64(slope)
        return to_float64(x), 1.0

    return Table(stored=stored, logit=logit)


@of_kind
def build_along(ops, form):
    """``add``: to four lanes at most, all those of a word; ``add_exactly``: a number to a sum; and ``first_equal``: the
    first lane that holds a number.
    """
    function, int32, lane = ops.function, ops.int32, ops.lane
    first_half, second_half, count = ops.first_half, ops.second_half, form.count

    @function
    def add_four(lanes, x):
        return lanes + x

    @function
    def add_eight(lanes, x):
        return (lanes + first_half(x)) + second_half(x)

    @function
    def add_sixteen(lanes, x):
        return add_eight(add_eight(lanes, first_half(x)), second_half(x))

    @function
    def first_equal(x, number):
        place = int32(count - 1)
        for k in range(count - 1):
            place = int32(count - 2 - k) if lane(x, count - 2 - k) == number else place
        return place

    @function
    def add_exactly(total, low, x):
        """The sum and what rounding has cost all of them so far."""
        s = total + x
        back = s - total
        return s, low + ((total - (s - back)) + (x - back))

    add = {2: add_four, 4: add_four, 8: add_eight, 16: add_sixteen}[count]
    return Table(add=add, add_exactly=add_exactly, first_equal=first_equal)
