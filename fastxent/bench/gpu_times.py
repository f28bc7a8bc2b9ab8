"""Our calls against the clock of a GPU, on arrays that are on the device; the ceiling is a copy within its memory."""

import time
from typing import Any

import numpy as np

import fastxent
from fastxent import checks
from fastxent.bench import gpu_tensors
from fastxent.bench.gpu_bars import GRADIENT, HOST, IN_PLACE, LOSS
from fastxent.bench.gpu_record import Time
from fastxent.bench.record import Seconds
from fastxent.state import IGNORED

_ROUNDS, _WARM = 20, 3
_IGNORE_INDEX = -100
AHEAD = 16  # launches' bytes, a gigabyte: written first, they take longer than the host needs to ask for a call
# what takes a device less time than the host needs to ask for it
ASKED_SHAPE, ASKED_DTYPE, _ASKINGS = (64, 1000), "bfloat16", 200
_SCORED = 1 << 18  # rows: what kernels leave each other of more would be gigabytes of page-locked memory


class Problem:
    """Logits, targets, options and room for a gradient on the device's default stream, for calls that are timed."""

    def __init__(self, machine, shape, dtype, ignored=0.0, options=None):
        from fastxent.backends.cuda.arrays import DeviceArray
        from fastxent.backends.cuda.stream import Slot

        (self.rows, self.classes), self.dtype = shape, np.dtype(dtype)
        self.machine, self.stream, self.slot = machine, machine.stream_of(0), Slot(machine)
        self.logits: Any = DeviceArray(machine, 0, shape, self.dtype)
        self.out: Any = DeviceArray(machine, 0, shape, self.dtype)
        self.ahead: Any = DeviceArray(machine, 0, (AHEAD * machine.layout.launch,), np.dtype(np.uint8))
        self.size = self.rows * self.classes * self.dtype.itemsize
        rng = np.random.default_rng(0)
        piece = min(self.size, 1 << 26) // self.dtype.itemsize
        part = self._placed((4 * rng.standard_normal(piece, np.float32)).astype(self.dtype))
        for start in range(0, self.size, piece * self.dtype.itemsize):
            length = min(piece * self.dtype.itemsize, self.size - start)
            machine.copy(self.stream, part.address, self.logits.address + start, length)
        machine.wait(self.stream)
        indices = rng.integers(0, self.classes, self.rows)
        self.indices = np.where(rng.random(self.rows) < ignored, IGNORED, indices)
        self.targets = self._placed(np.where(self.indices == IGNORED, _IGNORE_INDEX, self.indices))
        placed = {name: self._placed(value) for name, value in (options or {}).items() if isinstance(value, np.ndarray)}
        self.options = (options or {}) | placed

    def _placed(self, values) -> Any:
        from fastxent.backends.cuda.arrays import DeviceArray

        array = DeviceArray(self.machine, 0, values.shape, values.dtype)
        self.machine.copy_to_device(self.stream, values, array.address)
        self.machine.wait(self.stream)
        return array

    def release(self):
        """Give the device its memory back."""
        self.machine.wait(self.stream)
        del self.logits, self.out, self.ahead, self.targets, self.options
        self.slot.release()

    def scoring(self, top_k):
        """What scores with the ``top_k`` largest classes ask of the device."""
        from fastxent.backends.cuda import launches
        from fastxent.backends.cuda.inputs import kind_of, scaling_of, shares_of
        from fastxent.backends.cuda.places import Rows
        from fastxent.backends.cuda.scores import KNOWN, Found, Picked

        slot, scaling, count = self.slot, scaling_of(self.dtype, None, 1.0), self.rows
        kind = kind_of(slot.machine, self.dtype, self.classes, self.indices, scaling, None)
        places = slot.upload("targets", self.indices, np.int64), slot.zeros("flag", 1)
        given = Rows(
            self.logits.address, self.classes, places[0], count, self.classes, -(-self.classes // kind.strip), places[1]
        )
        shares = shares_of(slot, slice(0, count), None, kind, checks.loss_dtype(self.dtype), self.classes)
        columns = [slot.reserve(f"score {k}", (count,), np.float64) for k in range(len(Found._fields) - 2)]
        found = Found._make((*columns, slot.reserve("top_ids", (count, top_k), np.int64), top_k))
        known = slot.reserve("known", (count, KNOWN), np.uint8)
        picked = Picked(found.top_ids, top_k, slot.reserve("top_log_probs", (count, top_k), np.float64))

        def score():
            launches.score(slot, kind, given, shares, scaling, found, known)
            if top_k:
                launches.log_probs(slot, kind, given, scaling, known, picked)

        return score

    def calls(self):
        """What is timed, by name, the last of which takes the place of the logits."""
        copy = {"copy": lambda: self.machine.copy(self.stream, self.logits.address, self.out.address, self.size)}
        return copy | _calls(self.logits, self.targets, self.out, self.options)

    def seconds(self, body, stream):
        """`Seconds` of some rounds, after some that warm it: of the device alone, whose caches hold nothing of the last
        round, as it has other bytes to write while the host asks for the call.
        """
        for _ in range(_WARM):
            body()
        return Seconds.of([self.machine.seconds(stream, body, lambda: self._keep_busy(stream)) for _ in range(_ROUNDS)])

    def _keep_busy(self, stream):
        self.machine.clear(stream, self.ahead.address, *self.ahead.shape)


def _calls(logits, targets, out, options):
    function = fastxent.cross_entropy_with_grad
    return {
        LOSS: lambda: fastxent.cross_entropy(logits, targets, **options),
        GRADIENT: lambda: function(logits, targets, out=out, **options),
        IN_PLACE: lambda: function(logits, targets, out=logits, **options),
    }


def time_calls(machine, shape, dtype, label="fastxent", **named):
    """The times of one shape, beside a copy of the same bytes, and the median seconds of that: the loss, the loss with
    its gradient, new and in place, and without options scores.
    """
    with machine.current():
        problem = Problem(machine, shape, dtype, **named)
        try:
            *calls, last = problem.calls().items()
            seconds = {name: problem.seconds(body, problem.stream) for name, body in calls}
            if named.get("options") is None and shape[0] <= _SCORED:
                for name, top_k in (("score", 0), ("score with top 5", 5)):
                    seconds[name] = problem.seconds(problem.scoring(top_k), problem.slot.stream)
            seconds[last[0]] = problem.seconds(last[1], problem.stream)
        finally:
            problem.release()
    about, copied = (shape, np.dtype(dtype).name, label), seconds.pop("copy").median
    # a copy reads and writes, as a gradient does
    return [
        Time.of(name, about, found, copied if "gradient" in name else copied / 2) for name, found in seconds.items()
    ], copied


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
                for name, body in _calls(logits, targets, out, {}).items()
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
    return Seconds.of(samples[_WARM:])


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
