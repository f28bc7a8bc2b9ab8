"""logsumexp, log_softmax and softmax of logits that are on the device. Nothing waits."""

from fastxent import checks
from fastxent.backends.cuda import arrangement, calls, launches, resident
from fastxent.backends.cuda.arrays import library_of_logits
from fastxent.backends.cuda.inputs import scaling_of
from fastxent.backends.cuda.lent import answered, is_lent
from fastxent.backends.cuda.losses import Loss, Upstream
from fastxent.backends.cuda.places import Rows
from fastxent.backends.cuda.run import runner
from fastxent.backends.cuda.scratch import scratch_of
from fastxent.backends.cuda.words import Shares
from fastxent.backends.cuda.write import Written


def logsumexp(logits, temperature, *, axis=-1, keepdims=False):
    """See `fastxent.logsumexp`; one axis."""
    if is_lent(logits):
        return answered(runner().machine, logsumexp, logits, temperature, axis=axis, keepdims=keepdims)
    return _asked("lse", logits, None, axis, temperature, keepdims)[0]


def log_softmax(logits, temperature, *, axis=-1, out=None):
    """See `fastxent.log_softmax`; one axis."""
    if is_lent(logits):
        return answered(runner().machine, log_softmax, logits, temperature, axis=axis, out=out)
    return _entries("log_softmax", logits, axis, temperature, out)


def softmax(logits, temperature, *, axis=-1, out=None):
    """See `fastxent.softmax`; one axis."""
    if is_lent(logits):
        return answered(runner().machine, softmax, logits, temperature, axis=axis, out=out)
    return _entries("gradient", logits, axis, temperature, out)


def _entries(entries, logits, axis, temperature, out):
    found, library, place = _asked(entries, logits, out, axis, temperature)
    return arrangement.handed_back(found, out, place, axis, library)


def _asked(what, logits, out, axis, temperature, keepdims=False):
    """What has been made, the caller's library, and the place that was written to, if there was one."""
    machine = runner().machine
    library = library_of_logits(logits, machine)
    view = library.view(logits)
    checks.check_logits(view.shape, view.dtype, axis)
    rows = arrangement.in_rows(logits, axis, library)
    place = arrangement.place_for(out, logits, rows, axis, library)
    reduced = list(library.view(rows).shape[:-1])
    if keepdims:
        reduced.insert(axis % len(view.shape), 1)
    slot = scratch_of(machine, handle := library.stream(logits))
    given, options = {"logits": rows, "out": place}, (what, temperature, tuple(reduced))
    about = calls.known(given, options, library, slot, handle)
    with slot.lock, slot.machine.current():
        slot.raise_for_earlier(False)

        def carry_out():
            seen = calls.placed(library.view(rows), "logits")
            where = resident.as_rows(seen), seen.shape[:-1], checks.loss_dtype(seen.dtype), library, slot, handle
            call = calls.Call(rows, *where)
            if what == "lse":
                _ask_lse(call, temperature, tuple(reduced))
            else:
                _ask_entries(call, what, temperature, call.written(place, "made"))
            return call

        made, _ = calls.carried_out(about, rows, library, slot, carry_out)
    return made.get("made", place), library, place


def _told(call, temperature):
    """What kernels are told of the rows: kind, `Rows`, `Shares` and `Scaling`."""
    scaling = scaling_of(call.rows.dtype, None, temperature)
    kind = call.machine.layout.kind(call.rows.dtype.name, call.rows.classes, False, "none", True)
    rows, classes = call.rows.shape
    given = Rows(call.rows.address, call.rows.stride, 0, rows, classes, -(-classes // kind.strip), 0)
    return kind, given, Shares(0, 0, 0, 0, 0, 1.0), scaling


def _ask_lse(call, temperature, shape):
    kind, given, shares, scaling = _told(call, temperature)
    place = call.made("made", shape, call.real).address
    launches.statistics(call.slot, kind, given, shares, scaling, Loss(lse=place))
    launches.settle_lse(call.slot, kind, given, place)


def _ask_entries(call, entries, temperature, out):
    kind, given, shares, scaling = _told(call, temperature)
    launches.entries(
        call.slot, kind, given, shares, Upstream(1.0, 0, 0, 1.0, 1.0), scaling, Loss(),
        Written(out.address, out.stride), out.address == given.logits, written=out.dtype.name, entries=entries,
    )  # fmt: skip
