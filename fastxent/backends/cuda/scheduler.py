"""The threads of a simulated kernel and what they share: one runs at a time, until it waits for others.

Memory is what a launch was given, and every address is checked against it.
"""

import ctypes
import functools
import random
import threading
from collections import deque

import numpy as np

WARP = 32
NONSENSE = 0x7F  # bytes of a huge number in float32, bfloat16, float64 and integers, of a NaN in float16 and float8


class SimulationError(RuntimeError):
    """What a kernel must not do."""


class _Meeting:
    """Threads that wait for each other: a block, a warp, or some of one."""

    def __init__(self, size):
        self.size, self.arrived = size, {}


class _Block:
    def __init__(self, number, threads, shared_bytes):
        self.number = number
        self.shared = np.full(shared_bytes, NONSENSE, np.uint8)
        self.everyone, self.threads = _Meeting(threads), threads
        self.neighbours: dict[tuple[int, int], _Meeting] = {}
        self.ended: set[int] = set()

    def around(self, index, width):
        """Where a thread meets the ``width`` of its warp that it shuffles with."""
        first = index // width * width
        if first + width > self.threads or not self.ended.isdisjoint(range(first, first + width)):
            raise SimulationError("a warp whose threads have not all come this far")
        return self.neighbours.setdefault((first, width), _Meeting(width))


class _Thread(threading.Thread):
    def __init__(self, launch, block, index, body):
        super().__init__(daemon=True)
        self.launch, self.block, self.index, self.body = launch, block, index, body
        self.go = threading.Semaphore(0)
        self.failure, self.finished, self.found = None, False, None

    def run(self):
        self.go.acquire()
        try:
            with np.errstate(all="ignore"):
                self.body()
        except BaseException as failure:
            self.failure = failure
        self.finished = True
        self.launch.control.release()

    def pause(self):
        """Let others run until the launch comes back to this thread."""
        self.launch.control.release()
        self.go.acquire()
        if self.launch.stopped:
            raise SystemExit

    def meet(self, meeting, value=None):
        """Wait until all have come; what each brought, by thread."""
        meeting.arrived[self.index] = value
        if len(meeting.arrived) == meeting.size:
            self.launch.release(meeting)
        else:
            self.launch.waiting[self] = meeting
            self.pause()
        return self.found


class Launch:
    """One kernel on ``blocks`` of ``threads`` threads, by number in the order they begin, ``resident`` at a time."""

    def __init__(self, buffers):
        self.buffers = buffers
        self.control, self.stopped = threading.Semaphore(0), False
        self.idle = 0
        self.ready: deque[_Thread] = deque()
        self.waiting: dict[_Thread, _Meeting] = {}
        self._chance = random.Random(0)  # noqa: S311  threads take turns as they like on a GPU

    def run(self, kernel, arguments, blocks, threads, shared_bytes=0, resident=1):
        """Run the kernel to its end."""
        queue = deque(blocks)
        alive: dict[_Block, int] = {}
        try:
            while queue or alive:
                while queue and len(alive) < resident:
                    block = _Block(queue.popleft(), threads, shared_bytes)
                    alive[block] = threads
                    for index in range(threads):
                        thread = _Thread(self, block, index, functools.partial(kernel, *arguments))
                        thread.start()
                        self.ready.append(thread)
                self._step(alive)
        finally:
            self._stop()

    def _step(self, alive):
        if not self.ready or self.idle > 4 * len(self.ready) + 1000:
            raise SimulationError("threads wait for each other for ever")
        self.ready.rotate(self._chance.randrange(len(self.ready)))
        thread = self.ready.popleft()
        thread.go.release()
        self.control.acquire()
        if thread.failure is not None:
            raise thread.failure
        if thread.finished:
            self._leave(thread, alive)

    def _leave(self, thread, alive):
        self.idle = 0
        meeting = thread.block.everyone
        meeting.size -= 1
        if meeting.size and len(meeting.arrived) == meeting.size:
            self.release(meeting)
        thread.block.ended.add(thread.index)
        for (first, width), neighbours in thread.block.neighbours.items():
            if neighbours.arrived and first <= thread.index < first + width:
                raise SimulationError("a thread has ended while its warp waits for it")
        alive[thread.block] -= 1
        if not alive[thread.block]:
            del alive[thread.block]

    def release(self, meeting):
        """Let all go on who have come to a meeting."""
        found, meeting.arrived = meeting.arrived, {}
        self.idle = 0
        for thread in [thread for thread, where in self.waiting.items() if where is meeting]:
            del self.waiting[thread]
            thread.found = found
            self.ready.append(thread)
        threading.current_thread().found = found  # type: ignore[attr-defined]

    def _stop(self):
        self.stopped = True
        for thread in [*self.ready, *self.waiting]:
            thread.go.release()

    def memory(self, address, size):
        """The bytes at an address, checked."""
        address = int(address)
        if address % min(size, 16):
            raise SimulationError(f"{size} bytes are taken from {address:#x}, which is no multiple of that")
        if not any(first <= address and address + size <= last for first, last in self.buffers):
            raise SimulationError(f"{size} bytes at {address:#x} lie outside every buffer of the launch")
        return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)
