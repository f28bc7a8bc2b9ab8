"""What makes a build fail beside its warnings: pages that load from elsewhere, and examples that take long.

And in which order the gallery shows its examples.
"""

import re
import time
from pathlib import Path

import numpy as np
from sphinx.errors import ExtensionError

import fastxent

LOADED = re.compile(r"<(?:script|img|iframe|source|embed)\b[^>]*?\ssrc=[\"']([^\"']+)", re.IGNORECASE)
LINKED = re.compile(r"<link\b[^>]*>", re.IGNORECASE)
STYLES = re.compile(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)
ALLOWED = "https://cdn.jsdelivr.net/npm/mathjax@"
SECONDS = 30  # of processor time; by the clock an example is no slower than that on an idle machine

# from a first classifier to what the digits are for; what is not run comes last
TAUGHT = (
    "digits", "sigmoid", "autoencoder", "attention", "calibration", "overfitting", "distillation",
    "error_against_margin", "stall", "byte_model",
)  # fmt: skip

_begun: dict[str, float] = {}


def external(text):
    """Addresses of other servers that a page or style sheet makes a browser load; links to click are none."""
    found = LOADED.findall(text) + STYLES.findall(text)
    for link in LINKED.findall(text):
        attributes = dict(re.findall(r"(\w+)=[\"']([^\"']*)", link))
        if attributes.get("rel") not in ("canonical", "next", "prev", "author", "index", "search"):
            found.append(attributes.get("href", ""))
    return [address for address in found if re.match(r"(?:https?:)?//", address) and not address.startswith(ALLOWED)]


def loads_nothing(app, exception):
    """Stop where a page of the site loads from another server what is not MathJax."""
    if exception is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css") and (addresses := external(path.read_text("utf-8"))):
            raise ExtensionError(f"{path.relative_to(app.outdir)} loads {', '.join(sorted(set(addresses)))}")


def compile_kernels(app):
    """Those of the examples, which are compiled once and kept, so that no example is charged for them."""
    logits, targets = np.eye(200, 10, dtype=np.float32), np.zeros(200, int)
    fastxent.cross_entropy_with_grad(logits, targets)
    fastxent.score(logits, targets, top_k=3)


def clock(gallery_conf, fname, when):
    """Called by the gallery before and after an example."""
    if when == "before":
        _begun[fname] = time.process_time()
    elif fname in _begun and time.process_time() - _begun.pop(fname) > SECONDS:
        raise ExtensionError(f"{fname} takes more than {SECONDS} seconds of processor time")


class AsTaught:
    """The gallery's sort key."""

    def __init__(self, src_dir):
        self.src_dir = src_dir

    def __call__(self, filename):
        """The place of an example, by name where it has none."""
        name = Path(filename).stem.removeprefix("plot_")
        return TAUGHT.index(name) if name in TAUGHT else len(TAUGHT), name


def setup(app):
    """Compile before the examples run, look at the pages once all are written."""
    app.connect("builder-inited", compile_kernels, priority=100)  # before the gallery's
    app.connect("build-finished", loads_nothing)
    return {"parallel_read_safe": True}
