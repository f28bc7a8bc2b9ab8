"""Arrays that another library lends by DLPack, jax for one: read where they are, answered in that library's kind."""

import threading
from collections import deque
from typing import Any

from fastxent import checks
from fastxent.arguments import Options
from fastxent.backends.cuda.arrays import DeviceArray, has_own_words
from fastxent.backends.cuda.dlpack import Borrowed

_HELD: deque[tuple[Any, Any]] = deque()
_HOLDING = threading.Lock()


def is_lent(array):
    """Whether an array of the device is to be borrowed: it speaks DLPack, and is known in no words of its own."""
    return not has_own_words(array) and hasattr(array, "__dlpack__")


def borrowed(array):
    """A lent array as its capsule has it; whatever else as it is."""
    if isinstance(array, Options):
        return Options(*map(borrowed, array))
    if array is None or not checks.is_on_device(array) or not is_lent(array):
        return array
    checks.refuse_misread(array, "logits")
    return Borrowed(array)


def answered(machine, function, logits, *arguments, **named):
    """``function`` of lent logits and whatever else is lent, but for ``out``. Nothing waits: what is borrowed is given
    back by a later call that finds the device done with it.
    """
    stays = {"out": named.pop("out")} if "out" in named else {}
    given = [borrowed(one) for one in (logits, *arguments)]
    others = {name: borrowed(one) for name, one in named.items()}
    try:
        found = function(*given, **others, **stays)
    finally:
        with machine.current():
            _hold(machine, (given, others))
    if isinstance(found, tuple):
        return tuple(_in_kind(logits, array) for array in found)
    return _in_kind(logits, found)


def _hold(machine, arrays):
    with _HOLDING:
        while _HELD and machine.has_passed(_HELD[0][0]):
            _HELD.popleft()
        _HELD.append((machine.mark(machine.stream_of(Borrowed.stream)), arrays))


def _in_kind(like, array):
    """An array of ours by ``from_dlpack`` of the namespace that ``like`` names, if it names one."""
    if not isinstance(array, DeviceArray) or not hasattr(like, "__array_namespace__"):
        return array
    return like.__array_namespace__().from_dlpack(array)
