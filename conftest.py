"""What pytest is not to import in search of examples: modules that speak to numba-cuda, which may not be there."""

collect_ignore = [f"fastxent/backends/cuda/{name}.py" for name in ("codecs", "lanes", "primitives")]
