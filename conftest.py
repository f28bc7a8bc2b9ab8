"""Which modules pytest cannot import here: those made of a library that is not installed."""

import importlib.util

collect_ignore = []
if importlib.util.find_spec("numba_cuda") is None:
    collect_ignore += [f"fastxent/backends/cuda/{name}.py" for name in ("codecs", "lanes", "primitives")]
collect_ignore += [f"fastxent/{name}" for name in ("jax", "torch") if importlib.util.find_spec(name) is None]
