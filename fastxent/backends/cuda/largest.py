"""The k largest logits of a strip and their classes, in order: the lower class first among equals.

The strip waits in shared memory. Each thread knows the best of its own words that has not been taken yet; the best of
all is taken, and the threads of its row in the warp it came from look through the words of the one that had it.
"""

import numpy as np

from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.group import build_group

ENTRY = 16  # bytes of a logit and its class
_PEAK, _CLASS = 13, 14  # meetings of a block


@of_kind
def build_largest(ops, kind):
    """``keep_largest`` of a strip."""
    form = ops.form(kind.form)
    function, int32, lane, to_float64 = ops.function, ops.int32, ops.lane, ops.to_float64
    peak_of_lanes, to_real, group_peak = ops.peak_of_lanes, form.to_real, build_group(ops, kind.threads).peak
    staged_word, decode, shuffle_xor, sync_warp = ops.shared_load_word, form.decode, ops.shuffle_xor, ops.sync_warp
    store_float64, count, threads = ops.store_float64, form.count, kind.threads
    width = min(threads, 32)
    steps, half = width.bit_length() - 1, width // 2
    nothing, everything, none = form.real(-np.inf), form.real(np.inf), 2**31 - 1

    @function
    def better(x, first, size, after, after_class, best, best_class):
        """The best so far, or a better one of a word: what comes after ``after`` of its class, within the strip."""
        if peak_of_lanes(x) >= best:
            for k in range(count):
                value, number = lane(x, k), int32(first + k)
                left = value < after or (value == after and number > after_class)
                if left and number < size and (value > best or (value == best and number < best_class)):
                    best, best_class = value, number
        return best, best_class

    @function
    def best_of_share(t, step, slots, size, after, after_class, owner):
        """Of words ``owner`` + threads t, + threads (t + step) ... of the strip."""
        best, best_class = nothing, int32(none)
        j = int32(owner + t * threads)
        while j * count < size:
            best, best_class = better(
                decode(staged_word(slots + j * 16)), int32(j * count), size, after, after_class, best, best_class
            )
            j = int32(j + step * threads)
        return best, best_class

    @function
    def best_of_warp(value, number):
        for step in range(steps):
            other, other_class = shuffle_xor(value, half >> step, width), shuffle_xor(number, half >> step, width)
            if other > value or (other == value and other_class < number):
                value, number = other, other_class
        return value, number

    @function
    def keep_largest(t, slots, start, size, kept, place):
        """The ``kept`` largest of the strip of ``size`` classes from class ``start`` on, to ``place``: a logit and its
        class, float64 each; -inf and inf where there are fewer.
        """
        sync_warp(width)
        best, best_class = best_of_share(int32(0), 1, slots, size, everything, int32(-1), int32(t))
        for m in range(kept):
            peak = group_peak(to_float64(best), _PEAK)
            rank = to_float64(best_class) if to_float64(best) == peak and best_class != none else np.inf
            number = 0.0 - group_peak(0.0 - rank, _CLASS)
            if t == 0:
                store_float64(place + m * ENTRY, peak)
                store_float64(place + m * ENTRY + 8, number + to_float64(start))
            if number < np.inf:
                taken = int32(number)
                owner = int32((taken // count) % threads)
                if owner // width == t // width:
                    found, found_class = best_of_share(
                        int32(t % width), width, slots, size, to_real(peak), taken, owner
                    )
                    found, found_class = best_of_warp(found, found_class)
                    if t == owner:
                        best, best_class = found, found_class

    return keep_largest
