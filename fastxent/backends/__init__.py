"""The registry of backends, and the only place where one is chosen.

A backend is a module with the verbs of `fastxent.backends.reference`: ``statistics``, ``statistics_and_gradient``,
``accumulate``, ``gradient``, ``score``, ``count``, ``divergences``, ``logsumexp``, ``log_softmax``, ``softmax``,
``binary`` and ``why_unavailable``. It is imported when first used.
"""

import functools
import importlib
import os

__all__ = [
    "BackendUnavailableError",
    "available",
    "choose",
    "chosen",
    "explain",
    "get",
    "why_unavailable",
]

NAMES = ("cpu", "cuda", "reference")


class BackendUnavailableError(RuntimeError):
    """The backend asked for is unknown or cannot run here; the message says which and why."""


def available():
    """The names of the backends that can run here.

    Returns
    -------
    list of str

    Examples
    --------
    >>> from fastxent import backends
    >>> {"cpu", "reference"} <= set(backends.available())
    True
    """
    return [name for name in NAMES if why_unavailable(name) is None]


def why_unavailable(name):
    """Why backend ``name`` cannot run here, in a sentence; None when it can.

    Parameters
    ----------
    name : str

    Returns
    -------
    str or None

    Examples
    --------
    >>> from fastxent import backends
    >>> backends.why_unavailable("abacus")
    "there is no backend 'abacus'; the backends are cpu, cuda, reference"
    """
    if name not in NAMES:
        return f"there is no backend {name!r}; the backends are {', '.join(NAMES)}"
    return _module(name).why_unavailable()


def get(name):
    """The module of backend ``name``.

    Parameters
    ----------
    name : {"cpu", "cuda", "reference"}

    Returns
    -------
    module
        With the verbs of `fastxent.backends.reference`.

    Raises
    ------
    BackendUnavailableError
        If the name is unknown or the backend cannot run here.

    Examples
    --------
    >>> from fastxent import backends
    >>> backends.get("reference").__name__
    'fastxent.backends.reference'
    """
    reason = why_unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(reason)
    return _module(name)


def choose(name=None):
    """The backend ``name``, else the environment's FASTXENT_BACKEND, else cpu: the others only where asked for.

    Parameters
    ----------
    name : {"cpu", "cuda", "reference"}, optional

    Returns
    -------
    module
        As `get` gives it.

    Raises
    ------
    BackendUnavailableError
        As `get`, for FASTXENT_BACKEND too.

    Examples
    --------
    >>> from fastxent import backends
    >>> backends.choose("reference") is backends.get("reference")
    True
    """
    return get(name or os.environ.get("FASTXENT_BACKEND") or "cpu")


def for_device(name=None, module="device"):
    """The module that takes logits which are on a CUDA device, or with "linear" hidden states; ``name`` can be that of
    its backend alone.

    Raises
    ------
    TypeError
        If ``name`` is another backend.
    BackendUnavailableError
        If no GPU can be used.
    """
    if name not in (None, "cuda"):
        raise TypeError(f"arrays on a device are the cuda backend's; move them to the host for backend={name!r}")
    return _for_device(module)


@functools.cache
def _for_device(module):
    """Why there is no GPU to be used is asked until there is one."""
    get("cuda")
    return _module(f"cuda.{module}")


def chosen(name=None):
    """What `choose` takes and why: its name, and a reason in brackets.

    Parameters
    ----------
    name : str, optional
        As for `choose`.

    Returns
    -------
    name, why : str

    Raises
    ------
    BackendUnavailableError
        As `choose`.

    Examples
    --------
    >>> from fastxent import backends
    >>> backends.chosen("reference")
    ('reference', '(asked for by name)')
    """
    why = "asked for by name" if name else "asked for by FASTXENT_BACKEND" if os.environ.get("FASTXENT_BACKEND") else ""
    return choose(name).__name__.rsplit(".", 1)[-1], f"({why or 'the default'})"


def explain(shape, dtype="float32", backend=None, limits=None):
    """What would run for logits of ``shape`` and ``dtype``, why, and how long it should take, in a paragraph.

    Parameters
    ----------
    shape : tuple of int
        Of the logits.
    dtype : dtype or str
        Theirs.
    backend : str, optional
        As for every function.
    limits : fastxent.bench.limits.Limits, optional
        What the machine can do, as ``fastxent.bench.limits.measure(dtype, classes=shape[-1])`` gives it; by default
        measured now, which takes some tenths of a second, or seconds where the kernel is not compiled yet.

    Returns
    -------
    str

    Raises
    ------
    BackendUnavailableError
        If the backend is unknown or cannot run here.
    ValueError
        If ``limits`` are of another dtype.

    Examples
    --------
    >>> import textwrap
    >>> from fastxent import backends
    >>> from fastxent.bench.limits import Limits
    >>> limits = Limits(read=20e9, copy=20e9, elements=10e9, dtype="float32", threads=2)
    >>> print(textwrap.fill(backends.explain((512, 32000), backend="cpu", limits=limits), 100))
    cpu (asked for by name): logits of shape (512, 32000) in float32 are 65.5 MB, read once for a loss,
    read and written once for a loss with its gradient. Reading takes 3.3 ms at 20.0 GB/s, reading and
    writing 6.6 ms at 20.0 GB/s, the arithmetic 1.6 ms (limits as given, 2 threads): expect 3.3 ms and
    6.6 ms, or somewhat more.
    """
    import ml_dtypes  # noqa: F401, so that NumPy knows the names of its dtypes
    import numpy as np

    name, why = chosen(backend)
    dtype, elements = np.dtype(dtype), int(np.prod(shape))
    size = elements * dtype.itemsize
    said = (
        f"{name} {why}: logits of shape {tuple(shape)} in {dtype} are {size / 1e6:,.1f} MB, read once for a loss, "
        "read and written once for a loss with its gradient."
    )
    if name != "cpu":
        return f"{said} How long that takes is known of the cpu backend alone."
    source = "as given"
    if limits is None:
        # the one look upwards: it measures what a module below cannot
        from fastxent.bench.limits import measure

        limits, source = measure(dtype, classes=max(1, shape[-1])), "measured now"
    if limits.dtype != dtype.name:
        raise ValueError(f"limits must be those of {dtype.name}, not of {limits.dtype}")
    read, copy, arithmetic = size / limits.read, 2 * size / limits.copy, elements / limits.elements
    threads = f"{limits.threads} thread{'s' * (limits.threads > 1)}"
    return (
        f"{said} Reading takes {read * 1e3:,.1f} ms at {limits.read / 1e9:.1f} GB/s, reading and writing "
        f"{copy * 1e3:,.1f} ms at {limits.copy / 1e9:.1f} GB/s, the arithmetic {arithmetic * 1e3:,.1f} ms (limits "
        f"{source}, {threads}): expect {max(read, arithmetic) * 1e3:,.1f} ms and {max(copy, arithmetic) * 1e3:,.1f} "
        "ms, or somewhat more."
    )


@functools.cache
def _module(name):
    return importlib.import_module(f"fastxent.backends.{name}")
