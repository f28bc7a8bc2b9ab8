"""Reference pages of packages that need torch or JAX, read from their sources: the site is built without either."""

import ast
import inspect
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("fastxent.torch", "fastxent.jax")


def public(package):
    """The definition of each name in the package's ``__all__``, in its order."""
    tree = _parse(package)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith(package):
            found |= {of.name: of for of in _parse(node.module).body if isinstance(of, ast.FunctionDef | ast.ClassDef)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
    (listed,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    return {name: found[name] for name in ast.literal_eval(listed)}


def _parse(module):
    path = ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))


def signature(node):
    """As `inspect.signature` prints it, without types; of a named tuple, its fields."""
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
        for argument in filter(None, (arguments.vararg, arguments.kwarg)):
            argument.annotation = None
        arguments.args = [argument for argument in arguments.args if argument.arg != "self"]
        return f"({ast.unparse(arguments)})"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return signature(method)
    fields = (of for of in node.body if isinstance(of, ast.AnnAssign))
    return f"({', '.join(of.target.id + (f'={ast.unparse(of.value)}' if of.value else '') for of in fields)})"


def page(name, node):
    """The page of a function or class as reStructuredText, its docstring rendered by numpydoc."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    lines = [name, "=" * len(name), "", *_described(kind, name, node)]
    for method in node.body if kind == "class" else ():
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            lines += ["   " + line for line in _described("method", method.name, method)]
    return "\n".join(lines) + "\n"


def _described(kind, name, node):
    from numpydoc.docscrape_sphinx import SphinxDocString  # the tests, which have no numpydoc, ask for signatures

    text = str(SphinxDocString(ast.get_docstring(node), config={"show_class_members": False}))
    return [f".. py:{kind}:: {name}{signature(node)}", "", *("   " + line for line in text.splitlines()), ""]


def first(node):
    """The first sentence or two of a docstring, on one line."""
    return " ".join(inspect.cleandoc(ast.get_docstring(node)).split("\n\n")[0].split())


def listing(package, names):
    """The table of a package, which links to its pages."""
    lines = [".. list-table::", "   :widths: 35 65", ""]
    for name, node in names.items():
        lines += [f"   * - :py:obj:`~{package}.{name}`", f"     - {first(node)}"]
    pages = [f"   generated/{package}.{name}" for name in names]
    return "\n".join([*lines, "", ".. toctree::", "   :hidden:", "", *pages, ""])


def write(folder):
    """Write all pages and tables; what has not changed is left alone, so that it is not built again."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        names = public(package)
        texts = {f"{package}.{name}.rst": page(f"{package}.{name}", node) for name, node in names.items()}
        for file, text in (texts | {f"{package}.txt": listing(package, names)}).items():
            path = folder / file
            if not path.exists() or path.read_text("utf-8") != text:
                path.write_text(text, "utf-8")


def setup(app):
    """Write the pages before anything is read."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "reference" / "generated"))
    return {"parallel_read_safe": True}
