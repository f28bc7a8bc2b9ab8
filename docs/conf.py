"""The site: `sphinx-build -W -b html docs docs/_build/html`."""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

# numba and torch print to the terminal in colours; the pages show plain text
os.environ["NO_COLOR"] = "1"
# the examples alternate small products of NumPy and small losses: the threads of each would spin in the other's way,
# which made the autoencoder take 50 seconds of processor time on a busy machine instead of 2
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

project = "fastxent"
author = "The fastxent developers"
copyright = author  # noqa: A001, Sphinx's name
version = release = version_of("fastxent")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.towncrier.ext",
    "sitechecks",
    "unimported",
]
exclude_patterns = ["_build", "_templates", "results"]
templates_path = ["_templates"]
default_role = "py:obj"  # a name in single backticks links to its page, if it has one
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
towncrier_draft_autoversion_mode = "draft"
towncrier_draft_working_directory = Path(__file__).parent.parent
autodoc_typehints = "none"
numpydoc_show_class_members = False
autosummary_generate = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/plot_",
    "abort_on_example_error": True,
    "show_memory": False,
    "min_reported_time": 0,
    "write_computation_times": False,  # a page that loads its scripts from elsewhere
    "reset_modules": ("matplotlib", "sitechecks.clock"),
    "reset_modules_order": "both",
    "within_subsection_order": "sitechecks.AsTaught",
    "default_thumb_file": str(Path(__file__).parent / "pictures" / "not_run.svg"),
    "show_signature": False,
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "fastxent"
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 6,
}
html_sidebars = {page: [] for page in ("index", "concepts", "numerics")}  # nothing lies below them
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
