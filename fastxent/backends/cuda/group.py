"""What the threads of a row tell each other: some of a warp, a warp or a block, in an order that is always the same."""

from fastxent.backends.cuda.forms import of_kind
from fastxent.rowmath import Table


@of_kind
def build_group(ops, threads):
    """``total`` and ``peak`` of a number that each thread has, float64.

    Up to 32 threads, a power of two, are neighbours in a warp and shuffle; more are a block, which goes by the first
    bytes of shared memory. ``slot`` numbers the meetings of a block, each of which has its own place there.
    """
    shuffle_xor, sync_block, thread = ops.shuffle_xor, ops.sync_block, ops.thread
    put, get = ops.shared_store_float64, ops.shared_load_float64
    to_float64, function, larger = ops.to_float64, ops.function, ops.larger
    width, warps = min(threads, 32), threads // 32
    steps, half = width.bit_length() - 1, width // 2

    @function
    def add(x, y):
        return x + y

    def in_warp(combine):
        @function
        def joined(x):
            for step in range(steps):
                x = combine(x, shuffle_xor(x, half >> step, width))
            return x

        return joined

    def in_group(combine):
        of_warp = in_warp(combine)
        if warps <= 1:
            return function(lambda x, slot: to_float64(of_warp(x)))

        @function
        def joined(x, slot):
            x = to_float64(of_warp(x))
            t = thread()
            if t & 31 == 0:
                put((slot * warps + (t >> 5)) * 8, x)
            sync_block()
            x = get(slot * warps * 8)
            for warp in range(1, warps):
                x = combine(x, get((slot * warps + warp) * 8))
            return x

        return joined

    return Table(total=in_group(add), peak=in_group(larger))
