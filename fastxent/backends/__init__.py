"""The registry of backends, and the only place where one is chosen.

A backend is a module with the verbs of `fastxent.backends.reference`: ``statistics``, ``statistics_and_gradient``,
``accumulate``, ``gradient``, ``score``, ``count``, ``divergences``, ``logsumexp``, ``log_softmax``, ``softmax``,
``binary`` and ``why_unavailable``. It is imported when first used.
"""

import functools
import importlib
import os

NAMES = ("cpu", "cuda", "reference")


class BackendUnavailableError(RuntimeError):
    """The backend asked for is unknown or cannot run here; the message says which and why."""


def available():
    """The names of the backends that can run here.

    Examples
    --------
    >>> from fastxent import backends
    >>> {"cpu", "reference"} <= set(backends.available())
    True
    """
    return [name for name in NAMES if why_unavailable(name) is None]


def why_unavailable(name):
    """Why backend ``name`` cannot run here, in a sentence; None when it can."""
    if name not in NAMES:
        return f"there is no backend {name!r}; the backends are {', '.join(NAMES)}"
    return _module(name).why_unavailable()


def get(name):
    """The module of backend ``name``.

    Raises
    ------
    BackendUnavailableError
        If the name is unknown or the backend cannot run here.
    """
    reason = why_unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(reason)
    return _module(name)


def choose(name=None):
    """The backend ``name``, else the environment's FASTXENT_BACKEND, else the fastest; never `reference` by itself."""
    return get(name or os.environ.get("FASTXENT_BACKEND") or "cpu")


def explain(shape, dtype="float32", backend=None):
    """What would run for logits of ``shape`` and ``dtype``, in a paragraph.

    Examples
    --------
    >>> from fastxent import backends
    >>> backends.explain((512, 32000), backend="cpu")[:62]
    'cpu (asked for by name): logits of shape (512, 32000) in float'
    """
    import numpy as np

    name = backend or os.environ.get("FASTXENT_BACKEND")
    module = choose(name)
    why = "asked for by name" if backend else "asked for by FASTXENT_BACKEND" if name else "the fastest available"
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return (
        f"{module.__name__.rsplit('.', 1)[-1]} ({why}): logits of shape {tuple(shape)} in {np.dtype(dtype)} are "
        f"{size / 1e6:,.1f} MB, read once for a loss, read and written once for a loss with its gradient."
    )


@functools.cache
def _module(name):
    return importlib.import_module(f"fastxent.backends.{name}")
