"""Importing the package is light, and its public names are what they say."""

import subprocess
import sys

import fastxent

HEAVY = ("numba", "torch", "jax", "dask", "matplotlib", "rich", "click", "scipy")


def test_import_brings_nothing_heavy():
    code = f"import sys, fastxent; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_public_names():
    for name in fastxent.__all__:
        assert getattr(fastxent, name).__doc__, name
