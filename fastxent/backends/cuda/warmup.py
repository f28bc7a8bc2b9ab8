"""Compiling the CUDA kernels ahead of time, so that no later call waits for a compiler."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from fastxent import checks
from fastxent.backends.cpu import cache
from fastxent.backends.cuda import compiler
from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.layout import GPU
from fastxent.backends.cuda.run import runner

_FEW, _MANY = 16, 1 << 16  # classes of a warp's row and of a block's


def codes(form, architecture):
    """The kernels that logits of a format need for index targets and for softmax, without options."""
    own = checks.loss_dtype(FORMS[form].dtype).name
    written = own if FORMS[form].itemsize == 1 else form

    def code(name, classes, largest=False, written=None, entries="gradient"):
        kind = GPU.kind(form, classes, False, "none", largest)
        return compiler.Code(name, kind, written, entries, architecture)

    for classes in (_FEW, _MANY):
        for largest in (False, True):
            yield code("statistics", classes, largest)
            yield code("gradient", classes, largest, written)
        yield code("gradient", classes, True, written, "log_softmax")
    for largest, entries in ((False, "gradient"), (True, "gradient"), (True, "log_softmax")):
        for name in ("shared_gradient", "finish_gradient", "strip_entries"):
            yield code(name, _MANY, largest, written, entries)
    for largest in (False, True):
        for name in ("strip_sums", "finish_statistics"):
            yield code(name, _MANY, largest)
    yield code("finish_state", _MANY)
    if form == own:
        yield code("binary", _MANY)


def compile_for(form, architecture):
    """Compile what a format needs, into the cache; how many kernels that are."""
    return sum(1 for code in codes(form, architecture) if compiler.machine_code(code))


def compile_all(dtypes=checks.DTYPES):
    """Compile for each of ``dtypes``, several at a time, for the GPU at hand; yields each with its number.

    Raises
    ------
    OSError
        If there is no folder to keep kernels in.
    """
    if cache.folder() is None:
        raise OSError("no folder can be written to keep kernels in; FASTXENT_CACHE_DIR names one")
    architecture = runner().machine.architecture
    workers = min(len(dtypes), multiprocessing.cpu_count())
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        numbers = pool.map(compile_for, map(str, dtypes), [architecture] * len(dtypes))
        yield from zip(dtypes, numbers, strict=True)
