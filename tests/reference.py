"""The page that lists what the site's build cannot import, and the lines it must hold."""

import inspect
from pathlib import Path

# as one line, since the file wraps
PAGE = " ".join((Path(__file__).parent.parent / "docs/reference/torch_jax.md").read_text("utf-8").split())


def lines(module):
    """Of each public name: the signature without types, and the first sentences of its docstring."""
    for name in module.__all__:
        value = getattr(module, name)
        signature = inspect.signature(value)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        signature = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        first = inspect.getdoc(value).split("\n\n")[0].replace("``", "`")
        yield " ".join(f"`{module.__name__}.{name}{signature}`\\ {first}".split())
