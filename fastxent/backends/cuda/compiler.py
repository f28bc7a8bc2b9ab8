"""From a kernel in Python to machine code of one architecture, kept on disk. No device and no driver is needed.

Numba-cuda makes LTO-IR, nvJitLink machine code (asked for PTX instead, it needs a third more registers). What is kept
is named after everything it was made from: the sources, the kind of kernel and the architecture; and the versions of
the compilers. Where a compiler is missing, what others have made of the same sources is taken.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from fastxent.backends.cpu import cache
from fastxent.backends.cuda import counts, elements, gradients, losses, rows, scores, states
from fastxent.backends.cuda.counts import Beside
from fastxent.backends.cuda.elements import Elements
from fastxent.backends.cuda.ends import Coefficients, Results
from fastxent.backends.cuda.forms import FORMS
from fastxent.backends.cuda.losses import Loss, Upstream
from fastxent.backends.cuda.places import Rows
from fastxent.backends.cuda.scores import Found, Picked
from fastxent.backends.cuda.words import Kind, Scaling, Shares
from fastxent.backends.cuda.write import Written

# each of them, or in its place that of CUDA 12; the last two make LTO-IR and machine code
_COMPILERS = (
    ("numba-cuda",), ("numba",), ("cuda-core",), ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"),
    ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
)  # fmt: skip
LEAST = 8, 0  # compute capability: instructions on pairs of bfloat16, a maximum that keeps NaN, shared memory
# they call kernels, and no kernel calls them; what a layout or a machine says of a kernel is in its `Code`
_NO_KERNELS = (
    *("__init__.py", "arrangement.py", "arrays.py", "calls.py", "device.py", "dlpack.py", "inputs.py", "launches.py"),
    *("layout.py", "lent.py", "linear.py", "machine.py", "plans.py", "resident.py", "run.py", "scheduler.py"),
    *("scratch.py", "simulated.py", "softmaxes.py", "stream.py", "warmup.py"),
)
_GROUPS = {
    "elements": Elements,
    "rows": Rows,
    "shares": Shares,
    "coefficients": Coefficients,
    "scaling": Scaling,
    "results": Results,
    "loss": Loss,
    "found": Found,
    "beside": Beside,
    "picked": Picked,
    "written": Written,
}
KERNELS = {
    name: module for module in (rows, gradients, states, scores, counts, losses, elements)
    for name in module.KERNELS
}  # fmt: skip
_ENDS = {"verb": {}, "loss": {"results": Loss, "coefficients": Upstream}}


class Code(NamedTuple):
    """What a kernel is made of: its name in `KERNELS`, its kind, what it writes, whose rows, for which architecture."""

    name: str
    kind: Kind
    written: str | None
    entries: str
    ends: str
    architecture: tuple[int, int]


def resident(code):
    """Blocks of 256 threads a multiprocessor is to hold at least: three leave 80 registers each, two 128, one 255."""
    kind, lanes = code.kind, FORMS[code.kind.form].lanes
    of_four = lanes in (4, 8)
    if kind.capped or kind.spread in ("weights", "probabilities") or (kind.spread == "even" and lanes == 16):
        return 2 if of_four else 1
    if kind.form == "float64" and (code.name, kind.spread) in (("strip_scores", "none"), ("shared_gradient", "even")):
        return 1
    if code.name in ("strip_scores", "strip_divergences") or code.name.startswith("finish_"):
        return 2
    return 3 if of_four and (kind.spread == "none" or kind.form == "float32") else 2


def repair_numpy():
    """NumPy 2.5 has no row_stack, which numba-cuda names while it compiles anything."""
    if not hasattr(np, "row_stack"):
        setattr(np, "row_stack", np.vstack)  # noqa: B010  named plainly, it is taken for a use of what has gone


def sources():
    """The files a kernel is made of."""
    here = Path(__file__).parent
    ours = (source for source in here.glob("*.py") if source.name not in _NO_KERNELS)
    return sorted([*ours, here.parents[1] / "rowmath.py", here.parents[1] / "state.py"])


def _digest_of_sources():
    each = " ".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources())
    return hashlib.sha256(each.encode()).hexdigest()[:16]


try:
    _DIGEST = _digest_of_sources()  # of what has been imported, whatever becomes of the files
except OSError:  # a package without them
    _DIGEST = None


def folder():
    """Where the kernels of these sources are kept, whoever compiled them; None where there is no such place."""
    return _DIGEST and cache.folder(f"cuda/{_DIGEST}")


def can_compile():
    """Whether all compilers are installed."""
    return len(_compilers()) == len(_COMPILERS)


@functools.cache
def _compilers():
    """The versions of those that are installed."""
    found = []
    for names in _COMPILERS:
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{name} {importlib.metadata.version(name)}")
                break
    return found


def _signature(function, ends):
    """The types of a kernel's arguments, which its parameters name."""
    from numba.cuda import types

    groups = _GROUPS | _ENDS[ends]

    def type_of(name):
        if name not in groups:
            return types.int64
        group = groups[name]
        kinds = [types.float64 if kind is float else types.int64 for kind in group.__annotations__.values()]
        return types.NamedTuple(kinds, group)

    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return types.void(*map(type_of, names))


@contextlib.contextmanager
def _without_device(architecture):
    """Numba-cuda asks the device for its architecture when a kernel calls a function; here the caller says it."""
    from numba.cuda import dispatcher

    before = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=architecture)
    try:
        yield
    finally:
        dispatcher.get_current_device = before


def function_of(ops, code):
    """The kernel as a Python function over ``ops``."""
    of_module = {gradients: (code.ends, code.written, code.entries), rows: (code.ends,)}
    module = KERNELS[code.name]
    return getattr(module.build(ops, code.kind, *of_module.get(module, ())), code.name)


def compile_code(code):
    """Machine code of one kernel, a cubin.

    Raises
    ------
    RuntimeError
        Where one of the compilers is not installed.
    """
    if not can_compile():
        raise RuntimeError(
            f"the kernel {code.name} for compute capability {'.'.join(map(str, code.architecture))} has not been "
            "compiled, and what compiles it is not installed: pip install fastxent[cuda13], or [cuda12], or compile it "
            "elsewhere with fastxent warmup --backend cuda --architecture"
        )
    return linked(intermediate_code(code), code.architecture)


def intermediate_code(code):
    """One kernel as LTO-IR, with all that it calls."""
    repair_numpy()
    from numba import cuda

    from fastxent.backends.cuda.primitives import OPS

    # of functions it calls numba-cuda keeps LLVM's modules, which are of no architecture yet
    function = function_of(OPS, code)
    threads = code.kind.threads * code.kind.rows
    with _without_device(code.architecture):
        ir, _ = cuda.compile(
            function, _signature(function, code.ends), device=False, abi="numba", cc=code.architecture, output="ltoir",
            launch_bounds=(threads, resident(code) * 256 // threads),
        )  # fmt: skip
    return ir


def linked(ltoir, architecture, ptx=False):
    """Machine code of LTO-IR, or the PTX it is made of.

    A product and a sum are fused where the kernel says so and nowhere else: where a compiler does, a formula has other
    bits in one kernel than in the next. (`cuda.core.LinkerOptions` cannot say that: its -fma=false is refused.)
    """
    from cuda.bindings import nvjitlink

    options = [f"-arch=sm_{''.join(map(str, architecture))}", "-lto", "-fma=0", *(["-ptx"] if ptx else [])]
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.LTOIR, ltoir, len(ltoir), "kernel")
        try:
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError as error:
            log = bytearray(nvjitlink.get_error_log_size(handle))
            nvjitlink.get_error_log(handle, log)
            raise RuntimeError(f"{error}: {log.decode(errors='replace')}") from error
        size, get = (
            (nvjitlink.get_linked_ptx_size, nvjitlink.get_linked_ptx) if ptx
            else (nvjitlink.get_linked_cubin_size, nvjitlink.get_linked_cubin)
        )  # fmt: skip
        code = bytearray(size(handle))
        get(handle, code)
    finally:
        nvjitlink.destroy(handle)
    return bytes(code)


def entry_of(cubin):
    """The kernel's name within its machine code."""
    (name,) = set(re.findall(rb"\.text\.([A-Za-z_][\w$]*)\x00", cubin))
    return name.decode()


def file_of(code):
    """Where a kernel's machine code is kept; None where there is no folder for it."""
    place = folder()
    made_of, makers = (hashlib.sha256(words.encode()).hexdigest() for words in (str(code), " ".join(_compilers())))
    return place and place / f"{code.name}-{code.kind.form}-{made_of[:32]}-{makers[:8]}.cubin"


def kept(file):
    """What a file holds of a kernel; where nothing can be compiled, what others have compiled; None for nothing."""
    with contextlib.suppress(OSError):
        return file.read_bytes()
    if not can_compile():
        made_of, _, _ = file.name.rpartition("-")
        for made_elsewhere in sorted(file.parent.glob(f"{made_of}-*.cubin")):
            with contextlib.suppress(OSError):
                return made_elsewhere.read_bytes()
    return None


def machine_code(code):
    """`compile_code`, from the disk where it has been kept before."""
    file = file_of(code)
    if file is None:
        return compile_code(code)
    found = kept(file)
    if found is not None:
        return found
    cubin = compile_code(code)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
        try:
            part.write(cubin)
            part.flush()
            Path(part.name).replace(file)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    return cubin
