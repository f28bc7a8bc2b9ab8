"""Compiling the CUDA kernels ahead of time, so that no later call waits for a compiler.

`codes` is the one list of kernels there are: a test sees that the public functions ask for all of it, and for no other.
"""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numba

from fastxent import checks
from fastxent.backends import BackendUnavailableError
from fastxent.backends.cuda import compiler
from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.layout import GPU
from fastxent.backends.cuda.run import runner

_FEW, _SOME, _MORE, _MANY = 16, 1 << 11, 1 << 13, 1 << 18  # bytes of rows of 8, 32, 64 and 256 threads
_LENGTHS = _FEW, _SOME, _MORE, _MANY
_BATCH = 8  # kernels: more would leave cores idle at the end
_SPREADS = ["none", "even", "weights", "probabilities"]
_OF_SUMS = (
    *(("statistics", size) for size in _LENGTHS),
    *(("strip_sums", _MANY), ("finish_statistics", _MANY)),
)
_OF_ENTRIES = (
    *(("gradient", size) for size in _LENGTHS),
    *(("shared_gradient", _MANY), ("finish_gradient", _MANY), ("strip_entries", _MANY)),
)


def codes(form, architecture, every_option=False):
    """The kernels that logits of a format need for class indices, softmax and scores, without options and with
    gradients in the dtype they have by default; after these, with ``every_option``, all others that a call can ask for.
    """
    found = dict.fromkeys(_codes(form, architecture, every_option=False))
    if every_option:
        found |= dict.fromkeys(_codes(form, architecture, every_option=True))
    return list(found)


def _codes(form, architecture, every_option):
    own, default = (dtype_of(FORMS[form].dtype).name for dtype_of in (checks.loss_dtype, checks.gradient_dtype))
    flags, spreads, written = [False], ["none"], [default]
    if every_option:
        flags, spreads, written = [False, True], _SPREADS, list(dict.fromkeys((default, own)))

    def code(
        name, size, capped=False, spread="none", largest=False, written=None, entries="gradient", ends="verb", of=form
    ):  # fmt: skip
        kind = GPU.kind(of, size // FORMS[of].itemsize, capped, spread, largest)
        return compiler.Code(name, kind, written, entries, ends, architecture)

    for ends, capped, spread, largest in itertools.product(("verb", "loss"), flags, spreads, (False, True)):
        if not _are_asked_for(ends, capped, spread, largest):
            continue
        rows = capped, spread, largest
        for name, size in _OF_SUMS:
            yield code(name, size, *rows, ends=ends)
        for entries, dtype in itertools.product(("gradient", "log_softmax"), written):
            if entries == "gradient" or rows == (False, "none", True):
                for name, size in _OF_ENTRIES:
                    yield code(name, size, *rows, written=dtype, entries=entries, ends=ends)
    for size in _LENGTHS:
        yield code("settle_lse", size, largest=True)
        for name in ("strip_counts", "strip_divergences"):
            yield code(name, size)
        for name, capped in itertools.product(("strip_scores", "finish_scores", "log_probs"), flags):
            yield code(name, size, capped)
    for capped, spread in itertools.product(flags, spreads):
        if spread != "probabilities":
            yield code("finish_state", _MANY, capped, spread)
            if capped:
                yield code("slope_of_targets", _MANY, capped, spread)
    # whatever the logits' format, these are of what is computed with
    yield code("binary", _MANY, of=own)
    for name, largest in itertools.product(("total_weight", "total_loss"), flags):
        yield code(name, _MANY, largest=largest, of=own)


def _are_asked_for(ends, capped, spread, largest):
    """Whether any call has such rows: ``largest`` are those of a softmax, and those whose targets are probabilities."""
    if spread == "probabilities":
        return largest
    # without a spread probabilities are those of a few classes, which no array on a device can be
    return not (largest and capped and spread == "none" and ends == "loss")


def compile_all(dtypes=checks.DTYPES, architecture=None, every_option=False, chosen=None):
    """Compile the `codes` of each of ``dtypes``, a kernel on every core at a time, for an ``architecture``, such as
    (9, 0), or that of the GPU at hand; or those of them that ``chosen``, a function, gives for it. Yields each dtype
    with how many kernels it adds to those before it, and how many of them had not been kept.

    Raises
    ------
    fastxent.backends.BackendUnavailableError
        If the compilers cannot be loaded.
    OSError
        If there is no folder to keep kernels in.
    RuntimeError
        If a kernel has not been kept and a compiler is not installed.
    ValueError
        If there are no kernels for the architecture.
    """
    if compiler.folder() is None:
        raise OSError("no folder can be written to keep kernels in; FASTXENT_CACHE_DIR names one")
    architecture = architecture or runner().machine.architecture
    if compiler.can_compile():  # else there may be kernels that were compiled elsewhere
        _check_architecture(architecture)
    asked: dict[compiler.Code, str] = {}
    these = None if chosen is None else set(chosen(architecture))
    for dtype in map(str, dtypes):
        for code in codes(dtype, architecture, every_option or chosen is not None):
            if these is None or code in these:
                asked.setdefault(code, dtype)
    batches = list(_batches(asked))
    if not compiler.can_compile():
        yield from _counted(asked, batches, map(_keep_all, batches))
        return
    workers = min(len(batches), numba.config.NUMBA_DEFAULT_NUM_THREADS)  # the cores that this process may use
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from _counted(asked, batches, pool.map(_keep_all, batches))


def _counted(asked, batches, kept):
    """Each dtype with how many kernels, and how many of them are new."""
    done = zip(batches, kept, strict=True)
    for dtype, of_dtype in itertools.groupby(done, lambda batch: asked[batch[0][0]]):
        anew = [is_new for _, batch in of_dtype for is_new in batch]
        yield dtype, len(anew), sum(anew)


def _batches(asked):
    """Kernels of one kind and dtype, for one process: what they have in common is compiled once."""
    together: dict[tuple, list] = {}
    for code, dtype in asked.items():
        together.setdefault((dtype, code.kind), []).append(code)
    for codes in together.values():
        yield from (codes[first : first + _BATCH] for first in range(0, len(codes), _BATCH))


def _keep_all(codes):
    return [keep(code) for code in codes]


def keep(code):
    """Compile a kernel unless it has been kept; whether it had to be."""
    file = compiler.file_of(code)
    if compiler.kept(file) is not None:
        return False
    compiler.machine_code(code)
    if not file.exists():
        raise OSError(f"kernels cannot be kept in {file.parent}")
    return True


def _check_architecture(architecture):
    supported = _architectures()
    if architecture not in supported:
        names = ", ".join(f"{major}.{minor}" for major, minor in supported)
        raise ValueError("there are no kernels for compute capability {}.{}; it may be ".format(*architecture) + names)


def _architectures():
    """Those there are kernels for, of those that the compilers know."""
    try:
        import cuda.core  # noqa: F401
        import numba_cuda  # noqa: F401
        from cuda.bindings import nvjitlink, nvrtc

        nvjitlink.version()
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except (ImportError, RuntimeError) as error:  # a package, or a library that it loads
        raise BackendUnavailableError(
            "the compilers of CUDA are not installed: pip install fastxent[cuda13], or [cuda12] for older drivers"
        ) from error
    return [divmod(number, 10) for number in known if divmod(number, 10) >= compiler.LEAST]
