"""The suite of a GPU: its kernels right first, every verb in every format and with every option, then fast.

Whatever fails, a kernel or another library, is a line that says so; the suite goes on.
"""

import datetime
import time
from dataclasses import asdict

import fastxent
from fastxent import backends
from fastxent.backends.cuda.run import runner
from fastxent.bench import gpu_bars, gpu_checks, gpu_peers, gpu_times
from fastxent.bench.cases import GPU_SHAPES
from fastxent.bench.gpu_record import LEFT_OUT, Check, Time, failed

_SECONDS, _CHECKING = 7.5 * 60, 4 * 60.0  # the whole suite, with half a minute to spare, and what of it checks may take
DTYPES = ("bfloat16", "float32")
OPTION_SHAPE = (16_384, 32_000)


def run(shapes=GPU_SHAPES, option_shape=OPTION_SHAPE, dtypes=DTYPES, checked=None, seconds=_SECONDS):
    """Yield every `Check`, then every `Time`; what has no time left says so.

    Raises
    ------
    fastxent.backends.BackendUnavailableError
        Where there is no GPU.
    """
    backends.get("cuda")
    start = time.monotonic()
    machine = runner().machine
    machine.checked = True
    try:
        yield from _checks(gpu_checks.each() if checked is None else checked, start + min(_CHECKING, seconds))
    finally:
        machine.checked = False
    yield from _times(shapes, option_shape, dtypes, start + seconds)


def _checks(each, until):
    for problem, check in each:
        if time.monotonic() > until:
            yield Check(problem, note=LEFT_OUT)
            continue
        try:
            yield check()
        except Exception as failure:
            yield Check(problem, note=failed(failure))


def _times(shapes, option_shape, dtypes, until):
    machine = runner().machine

    def ours(shape, dtype, label, **named):
        """Times of ours, and seconds of a copy; None where there is none."""
        if time.monotonic() > until:
            return [Time("", shape, dtype, label, note=LEFT_OUT)], None
        try:
            return gpu_times.time_calls(machine, shape, dtype, label, **named)
        except Exception as failure:  # out of memory, say
            return [Time("", shape, dtype, label, note=failed(failure))], None

    yield from _asking(machine, until)
    for dtype in dtypes:
        for label, named in gpu_times.options_of(option_shape[1]).items():
            yield from ours(option_shape, dtype, label, **named)[0]
    copies = {}
    for shape in shapes:
        for dtype in dtypes:
            times, copies[shape, dtype] = ours(shape, dtype, gpu_bars.OURS)
            yield from times
    for (shape, dtype), copied in copies.items():
        for peer in gpu_peers.NAMES if copied is not None else ():
            if time.monotonic() > until:
                yield Time("", shape, dtype, peer, note=LEFT_OUT)
            else:
                yield from gpu_peers.time_peer(peer, shape, dtype, copied)


def _asking(machine, until):
    about = gpu_times.ASKED_SHAPE, gpu_times.ASKED_DTYPE, gpu_bars.HOST
    if time.monotonic() > until:
        return [Time("", *about, note=LEFT_OUT)]
    try:
        return gpu_times.time_asking(machine)
    except Exception as failure:
        return [Time("", *about, note=failed(failure))]


def record(found):
    """What the JSON file says of checks and times."""
    machine, times = runner().machine, [one for one in found if isinstance(one, Time)]
    bars = list(gpu_bars.of(times))
    return {
        "date": datetime.date.today().isoformat(),
        "device": machine.name,
        "compute_capability": list(machine.architecture),
        "fastxent": fastxent.__version__,
        "checks": [_as_dict(one) for one in found if isinstance(one, Check)],
        "times": [asdict(one) for one in times],
        "bars": [asdict(bar) | {"met": bar.met, "said": str(bar)} for bar in bars],
    }


def _as_dict(check):
    """JSON knows no infinity: a figure with a number missing has none."""
    errors = {figure: None if error == float("inf") else error for figure, error in check.errors}
    return {"problem": check.problem, "errors": errors, "right": check.right, "note": check.note}
