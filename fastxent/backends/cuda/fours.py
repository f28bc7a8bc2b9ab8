"""Four words of a strip at a time: fetched together, looked at together, added together.

A thread's four are ``threads`` words apart. Where the strip ends among them its last word is fetched in place of those
that are not there, and all its numbers are made -inf: where that is nothing to what is wanted of them, the threads of a
warp stay together to the end of a row.
"""

import numpy as np

from fastxent.backends.cuda.forms import of_kind
from fastxent.backends.cuda.words import build_loads
from fastxent.rowmath import Table

AHEAD = 4  # words a thread has on the way


@of_kind
def build_fetch(ops, kind):
    """``whole`` and ``some`` fetch a thread's four words of a strip; ``keep_whole`` and ``keep_some`` leave them in
    shared memory.
    """
    form, threads = ops.form(kind.form), kind.threads
    load, load_word, stage = build_loads(ops, form), ops.load_word, ops.shared_store_word
    realigned, itemsize = form.realigned, form.itemsize
    function, int32, int64 = ops.function, ops.int32, ops.int64

    @function
    def put_together(at, shift):
        low = at - shift
        return realigned(load_word(low), load_word(low + 16), shift)

    @function
    def four_put_together(at, shift):
        return (
            put_together(at, shift), put_together(at + threads * 16, shift),
            put_together(at + 2 * threads * 16, shift), put_together(at + 3 * threads * 16, shift),
        )  # fmt: skip

    @function
    def whole(at, misplaced):
        """Words of the row from address ``at`` on, all of whose bytes are the row's."""
        if misplaced == 0:
            return (
                load_word(at), load_word(at + threads * 16),
                load_word(at + 2 * threads * 16), load_word(at + 3 * threads * 16),
            )  # fmt: skip
        if itemsize == 8:  # a number lies at a multiple of its size
            return four_put_together(at, int32(8))
        # a choice here is one for four words: as the words' own it would be eleven instructions in each
        odd = int32(misplaced & 3)
        if misplaced < 4:
            return four_put_together(at, odd)
        if misplaced < 8:
            return four_put_together(at, int32(4 | odd))
        if misplaced < 12:
            return four_put_together(at, int32(8 | odd))
        return four_put_together(at, int32(12 | odd))

    @function
    def there(j, last_word):
        return min(int32(j), int32(last_word))

    @function
    def some(place, j, last_word, misplaced, first, last):
        """Words ``j``, ``j`` + threads ... of the strip that begins at ``place``, up to its last."""
        a, b = place + int64(there(j, last_word)) * 16, place + int64(there(j + threads, last_word)) * 16
        c, d = (
            place + int64(there(j + 2 * threads, last_word)) * 16, place + int64(there(j + 3 * threads, last_word)) * 16
        )  # fmt: skip
        if misplaced == 0:
            return load_word(a), load_word(b), load_word(c), load_word(d)
        return (
            load(a, misplaced, first, last), load(b, misplaced, first, last),
            load(c, misplaced, first, last), load(d, misplaced, first, last),
        )  # fmt: skip

    @function
    def keep_whole(at, four):
        stage(at, four[0])
        stage(at + threads * 16, four[1])
        stage(at + 2 * threads * 16, four[2])
        stage(at + 3 * threads * 16, four[3])

    @function
    def keep_some(slots, j, last_word, four):
        stage(slots + there(j, last_word) * 16, four[0])
        stage(slots + there(j + threads, last_word) * 16, four[1])
        stage(slots + there(j + 2 * threads, last_word) * 16, four[2])
        stage(slots + there(j + 3 * threads, last_word) * 16, four[3])

    return Table(whole=whole, some=some, keep_whole=keep_whole, keep_some=keep_some)


@of_kind
def build_among(ops, kind):
    """``is_among(word, j)``: whether a word of the strip, the thread's own or -1, is one of its four from ``j`` on."""
    int32, of_four = ops.int32, AHEAD * kind.threads

    @ops.function
    def is_among(word, j):
        ahead = int32(word - j)
        return ahead >= 0 and ahead < of_four

    return is_among


@of_kind
def build_hide(ops, kind):
    """``hidden`` four words: without the class that has gone, and what lies beyond the end."""
    form, threads, count = ops.form(kind.form), kind.threads, ops.form(kind.form).count
    decode, encode, numbered, where = form.decode, form.encode, ops.numbered, ops.where
    function, int32, nothing, is_among = ops.function, ops.int32, form.real(-np.inf), build_among(ops, kind)

    @function
    def hidden_word(word, j, classes, gone):
        place, left = int32(gone - j * count), int32(classes - j * count)
        if left < count or (place >= 0 and place < count):
            x = decode(word)
            x = where(numbered(x) < left, x, nothing)
            word = encode(where(numbered(x) == place, nothing, x))
        return word

    @function
    def hidden(four, j, classes, gone, gone_word):
        """Words ``j``, ``j`` + threads ...; ``gone_word`` is that of class ``gone`` if this thread has it, else -1."""
        if (j + 3 * threads + 1) * count > classes or is_among(gone_word, j):
            four = (
                hidden_word(four[0], j, classes, gone), hidden_word(four[1], int32(j + threads), classes, gone),
                hidden_word(four[2], int32(j + 2 * threads), classes, gone),
                hidden_word(four[3], int32(j + 3 * threads), classes, gone),
            )  # fmt: skip
        return four

    return hidden
