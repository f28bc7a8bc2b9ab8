"""Which kernels the suite of a GPU asks for, so that they can be compiled before it begins, where there is no GPU too.

They are found by asking for all that the suite does on a machine that takes down launches and makes none.
"""

import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor

from fastxent.backends.cuda import compiler, simulated
from fastxent.backends.cuda.layout import GPU
from fastxent.bench import gpu, gpu_checks, gpu_problem, gpu_times
from fastxent.bench.cases import GPU_SHAPES

TOGETHER = 16  # blocks that may wait for each other on a GPU of 132 multiprocessors
_ROWS = 2


class Asked(simulated.Machine):
    """A GPU's layout, and the ``codes`` of the kernels it has been asked for, in order."""

    layout = GPU._replace(launch=1 << 20)  # in memory of the host

    def __init__(self, architecture, together):
        super().__init__()
        self.architecture, self.together, self.codes = architecture, together, {}

    def spoil(self, stream, address, size):
        """What no kernel fills is 0, which ids can be."""
        self._memory[address][:] = 0

    def launch(
        self, stream, name, kind, arguments, blocks, shared=0, resident=None, written=None, entries="gradient",
        ends="verb",
    ):  # fmt: skip
        """Take it down."""
        self.codes[compiler.Code(name, kind, written, entries, ends, self.architecture)] = None
        if name == "finish_state":  # a state that has seen no target gets no gradient
            super().launch(stream, name, kind, arguments, blocks, shared=shared)


def asked(architecture, together=TOGETHER):
    """`fastxent.backends.cuda.compiler.Code` of every kernel the suite asks for, in order."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(_ask, architecture, together).result()


def _ask(architecture, together):
    """In a process of its own, whose GPU this is."""
    os.environ["FASTXENT_CUDA_SIMULATED"] = "1"
    machine = Asked(architecture, together)
    simulated.Machine = lambda: machine  # type: ignore[assignment, misc]
    gpu_problem.READ = _ROWS, gpu_problem.READ[1]
    warnings.simplefilter("ignore")  # of figures that no kernel has computed
    for _, check in gpu_checks.each(seed=0, large=None):  # whose kernels are those of what is timed
        check()
    for dtype in gpu.DTYPES:
        for named in gpu_times.options_of(gpu.OPTION_SHAPE[1]).values():
            gpu_times.time_calls(machine, (_ROWS, gpu.OPTION_SHAPE[1]), dtype, **named)
        for _, classes in GPU_SHAPES:
            gpu_times.time_calls(machine, (_ROWS, classes), dtype)
    return list(machine.codes)
