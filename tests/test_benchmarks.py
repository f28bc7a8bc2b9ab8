"""Every asv benchmark runs, on one small setting of its parameters."""

import importlib
import inspect
import itertools
import sys
from pathlib import Path

import numba
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmarks():
    sys.path.insert(0, str(FOLDER))
    try:
        for name in ("linear", "losses", "package"):
            module = importlib.import_module(f"benchmarks.{name}")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                for method, _ in inspect.getmembers(kind, inspect.isfunction):
                    if method.startswith(("time_", "track_", "peakmem_")):
                        yield kind, method
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def keep_threads():
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize(("kind", "method"), list(benchmarks()), ids=lambda part: getattr(part, "__name__", part))
def test_benchmark_runs(kind, method):
    for setting in itertools.islice(itertools.product(*getattr(kind, "params", ())), 1):
        benchmark = kind()
        benchmark.setup(*setting)
        result = getattr(benchmark, method)(*setting)
        assert method.startswith(("time_", "peakmem_")) or result > 0
