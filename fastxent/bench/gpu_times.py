"""Our calls against the clock of a GPU, on arrays that are on the device; the ceiling is a copy within its memory."""

import functools
import time
from typing import Any

import numpy as np

from fastxent.bench import gpu_figures, gpu_tensors
from fastxent.bench.gpu_bars import COPY, HOST, IN_PLACE, OURS
from fastxent.bench.gpu_problem import Problem, Scoring, calls_of
from fastxent.bench.gpu_record import Check, Time
from fastxent.bench.record import Seconds, lengths

_ROUNDS, _WARM_SECONDS = 20, 0.1  # an idle device's clocks take some time to rise
# what takes a device less time than the host needs to ask for it; the first calls make their plans
ASKED_SHAPE, ASKED_DTYPE, _ASKINGS, _FIRST = (64, 1000), "bfloat16", 200, 3
_SCORED = 1 << 18  # rows: what kernels leave each other of more would be gigabytes of page-locked memory


def time_calls(machine, shape, dtype, label=OURS, **named):
    """`Time`s of one shape, beside a copy of the same bytes: the loss, the loss with its gradient, new and in place,
    and without options scores. First a `Check` of these, see `fastxent.bench.gpu_figures`; where one is wrong only
    the copy has a time.
    """
    about = shape, np.dtype(dtype).name, label
    with machine.current():
        problem = Problem(machine, shape, dtype, **named)
        try:
            scorings = {}
            if named.get("options") is None and shape[0] <= _SCORED:
                scorings = {"score": Scoring(problem, 0), "score with top 5": Scoring(problem, 5)}
            calls = {name: (body, problem.stream) for name, body in _calls_of(problem).items()}
            calls |= {name: (scoring.ask, scoring.slot.stream) for name, scoring in scorings.items()}
            seconds = _in_turn(problem, calls)
            figures = gpu_figures.figures(problem, scorings.values())
            check = Check.of(f"{lengths(shape)} {about[1]}, {label}, as timed", figures)
        finally:
            problem.release()
    copied = seconds.pop(COPY)
    ceiling = [Time.of(COPY, (*about[:2], COPY), copied, copied.median)] if label == OURS else []
    if not check.right:
        return [check, *ceiling, *(Time(name, *about, note="wrong") for name in seconds)]
    # a copy reads and writes, as a gradient does
    times = [
        Time.of(name, about, found, copied.median if "gradient" in name else copied.median / 2)
        for name, found in seconds.items()
    ]
    return [check, *ceiling, *times]


def _calls_of(problem):
    machine, stream = problem.machine, problem.stream
    copy = {COPY: lambda: machine.copy(stream, problem.logits.address, problem.out.address, problem.size)}
    return copy | problem.calls()


def _in_turn(problem, calls):
    """`Seconds` of each call, a body and a stream, in rounds of all of them, so that what drifts is the same for all:
    of the device alone, whose caches hold nothing of the call before.
    """
    machine = problem.machine
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for body, stream in calls.values():
        body()
        machine.wait(stream)  # the next may want more of the same memory
    problem.restore()
    warm = time.perf_counter() + _WARM_SECONDS
    while time.perf_counter() < warm:
        calls[COPY][0]()
        machine.wait(problem.stream)
    for _ in range(_ROUNDS):
        for name, (body, stream) in calls.items():
            samples[name].append(machine.seconds(stream, body, functools.partial(_get_ready, problem, stream)))
            if name == IN_PLACE:
                problem.restore()
    return {name: Seconds.of(found) for name, found in samples.items()}


def _get_ready(problem, stream):
    problem.keep_busy()
    if stream != problem.stream:
        problem.machine.follow(stream, 0)


def time_asking(machine):
    """How long the host takes to ask for calls that have been made before, on torch's tensors where it sees the GPU,
    else on arrays of ours.
    """
    with machine.current():
        problem = Problem(machine, ASKED_SHAPE, ASKED_DTYPE)
        try:
            tensors = _in_torch(problem)
            logits, targets, out = tensors or (problem.logits, problem.targets, problem.out)
            kind = "torch's" if tensors else "our own"
            return [
                Time(name, ASKED_SHAPE, ASKED_DTYPE, HOST, _seconds_to_ask(problem, body), note=f"of {kind} arrays")
                for name, body in calls_of(logits, targets, out, {}).items()
            ]
        finally:
            problem.release()


def _seconds_to_ask(problem, body):
    samples = []
    for _ in range(_ASKINGS):
        start = time.perf_counter()
        body()
        samples.append(time.perf_counter() - start)
    problem.machine.wait(problem.stream)
    return Seconds.of(samples[_FIRST:])


def _in_torch(problem):
    """Logits, targets and room for a gradient, on torch's current stream; None where torch sees no GPU."""
    torch = gpu_tensors.torch_of_the_device()
    if torch is None:
        return None
    made = torch.zeros(*problem.logits.shape, dtype=getattr(torch, problem.dtype.name), device="cuda")
    return made, torch.from_numpy(problem.indices).to("cuda"), torch.empty_like(made)


def options_of(classes):
    """What is timed of one shape beside the plain loss, by name: options of `Problem`."""
    weight = np.linspace(0.5, 1.5, classes, dtype=np.float32)
    each: dict[str, dict[str, Any]] = {
        "plain": {},
        "smoothing": {"options": {"label_smoothing": 0.1}},
        "weights": {"options": {"weight": weight}},
        "weights and smoothing": {"options": {"label_smoothing": 0.1, "weight": weight}},
        "z-loss": {"options": {"z_loss": 1e-4}},
        "softcap": {"options": {"softcap": 30.0}},
        "10% ignored": {"ignored": 0.1},
        "90% ignored": {"ignored": 0.9},
    }
    return each
