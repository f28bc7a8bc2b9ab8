"""Importing the package is light, and its public functions say what they take, return and raise."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys

import pytest

import fastxent

HEAVY = ("numba", "torch", "jax", "dask", "matplotlib", "rich", "click", "scipy")
# the public functions are those in a module's __all__, or where it has none the ones named here
PUBLIC = {
    "fastxent": (),
    "fastxent.backends": (),
    "fastxent.bench": (),
    "fastxent.bench.limits": ("measure",),
    "fastxent.dask": (),
    "fastxent.information": (),
    "fastxent.jax": (),
    "fastxent.metrics": ("calibrate", "measure"),
    "fastxent.shards": (),
    "fastxent.torch": (),
}
NEEDS = {"fastxent.dask": "dask", "fastxent.jax": "jax", "fastxent.torch": "torch"}
RAISES_NOTHING = {"available", "get_num_threads", "release_memory", "why_unavailable"}
SECTION = re.compile(r"^(\w+)\n-+\n", re.MULTILINE)


def test_import_brings_nothing_heavy():
    code = f"import sys, fastxent; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_public_names():
    for name in fastxent.__all__:
        assert getattr(fastxent, name).__doc__, name


def public_functions():
    for module, names in PUBLIC.items():
        needed = NEEDS.get(module)
        if needed and importlib.util.find_spec(needed) is None:
            skip = pytest.mark.skip(reason=f"needs {needed}: pip install fastxent[{needed}]")
            yield pytest.param(None, None, id=module, marks=skip)
            continue
        loaded = importlib.import_module(module)
        for name in names or loaded.__all__:
            function = getattr(loaded, name)
            if callable(function) and not inspect.isclass(function):
                yield pytest.param(name, function, id=f"{module}.{name}")


def sections_of(text):
    """The sections of a docstring in numpydoc's format, by name."""
    _, *found = SECTION.split(text)
    return dict(zip(found[::2], found[1::2], strict=True))


def documented(section):
    """The names that a section ``Parameters`` describes: several may share a line, and what is indented describes."""
    lines = [line.partition(" :")[0] for line in section.splitlines() if line and not line.startswith(" ")]
    return [name for line in lines for name in line.split(", ")]


@pytest.mark.parametrize(("name", "function"), list(public_functions()))
def test_docstrings_are_complete(name, function):
    signature = inspect.signature(function)
    starred = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    takes = [starred.get(of.kind, "") + of.name for of in signature.parameters.values() if not of.name.startswith("_")]
    wanted = {"Examples"} | ({"Parameters"} if takes else set())
    wanted |= {"Raises"} if name not in RAISES_NOTHING else set()
    wanted |= {"Returns"} if signature.return_annotation is not None else set()
    sections = sections_of(inspect.getdoc(function))
    assert wanted <= sections.keys(), wanted - sections.keys()
    assert ">>> " in sections["Examples"]
    described = documented(sections.get("Parameters", ""))
    assert sorted(described) == sorted(takes)
