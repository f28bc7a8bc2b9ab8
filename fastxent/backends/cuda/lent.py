"""Arrays that another library lends by DLPack, jax for one: read where they are, answered in that library's kind."""

import threading
from collections import deque
from typing import Any

from fastxent import checks
from fastxent.arguments import Options
from fastxent.backends.cuda.arrays import DeviceArray, has_own_words
from fastxent.backends.cuda.dlpack import Borrowed

# marks behind calls, and what these have borrowed
_LENT: deque[tuple[Any, Any, Any]] = deque()
_GIVING = threading.Lock()
_MOST = 4  # calls whose arrays are held while the device is at it


def is_lent(array):
    """Whether an array of the device is to be borrowed: it speaks DLPack, and is known in no words of its own."""
    return not has_own_words(array) and hasattr(array, "__dlpack__")


def borrowed(array):
    """A lent array as its capsule has it; whatever else as it is."""
    if isinstance(array, Options):
        return Options(*map(borrowed, array))
    if array is None or not checks.is_on_device(array) or not is_lent(array):
        return array
    checks.refuse_misread(array, "arrays")
    return Borrowed(array)


def answered(machine, function, logits, *arguments, **named):
    """``function`` of lent logits and whatever else is lent, but for ``out``. What is borrowed is given back by a later
    call that finds the device done with it; nothing waits, but for the call before the last few.
    """
    out = named.get("out")
    with machine.current():
        give_back(machine)
    given = [borrowed(one) for one in (logits, *arguments)]
    others = {name: one if name == "out" else borrowed(one) for name, one in named.items()}
    try:
        found = function(*given, **others)
    finally:
        with machine.current():
            _LENT.append((machine.mark(machine.stream_of(Borrowed.stream)), given, others))
            give_back(machine)
    if isinstance(found, tuple):
        return tuple(array if array is out else _in_kind(logits, array) for array in found)
    return found if found is out else _in_kind(logits, found)


def give_back(machine):
    """Let go of what the device is done with, and of what calls before the last few have borrowed, once it is."""
    with _GIVING:
        while _LENT:
            mark, *_ = _LENT[0]
            if len(_LENT) > _MOST:
                machine.wait_for(mark)
            if not machine.has_passed(mark):
                return
            _LENT.popleft()


def _in_kind(like, array):
    """An array of ours by ``from_dlpack`` of the namespace that ``like`` names, if it names one."""
    if not isinstance(array, DeviceArray) or not hasattr(like, "__array_namespace__"):
        return array
    array.is_handed_on = True
    return like.__array_namespace__().from_dlpack(array)
