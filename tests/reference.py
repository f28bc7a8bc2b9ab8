"""The reference of packages that the site's build cannot import: what it read from the sources is what Python sees."""

import importlib.util
import inspect
from pathlib import Path

_FILE = Path(__file__).parent.parent / "docs" / "unimported.py"
_specification = importlib.util.spec_from_file_location("unimported", _FILE)
unimported = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(unimported)

# a line for each name: the signature without types, and the first sentences of its docstring
PAGE = [
    f"{package}.{name}{unimported.signature(node)} {unimported.first(node)}"
    for package in unimported.PACKAGES
    for name, node in unimported.public(package).items()
]


def lines(module):
    """Of each public name what the module itself says."""
    for name in module.__all__:
        value = getattr(module, name)
        signature = inspect.signature(value)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        first = " ".join(inspect.getdoc(value).split("\n\n")[0].split())
        yield f"{module.__name__}.{name}{signature} {first}"
