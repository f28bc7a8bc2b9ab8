"""What an option costs: the places that know its name, and what the kernels are told instead."""

import io
import tokenize
from pathlib import Path

import numpy as np
import pytest

import fastxent
from fastxent import arguments, backends, terms
from fastxent.bench.cases import Case

PACKAGE = Path(fastxent.__file__).parent


def files_that_name(option):
    """The files of the package whose code, not prose, holds the name."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        if any(token.type == tokenize.NAME and token.string == option for token in tokens):
            found.add(path.relative_to(PACKAGE).as_posix())
    return found


@pytest.mark.parametrize("option", ["z_loss", "denominator", "sample_weight"])
def test_an_option_of_rows_costs_four_places(option):
    """And what has a signature of its own, the bridges to torch and JAX, and what does the same for arrays that stay on
    a device; sample weights are cut with their rows.
    """
    known_elsewhere = {"denominator": {"reduction.py"}, "sample_weight": {"dask.py", "shards.py"}}.get(option, set())
    device = {"backends/cuda/device.py", "backends/cuda/losses.py"}
    within = {file for file in files_that_name(option) if not file.startswith(("torch/", "jax/"))}
    assert within - known_elsewhere - device <= {"arguments.py", "losses.py", "terms.py", "bench/cases.py"}


def test_kernels_know_no_option():
    names = [field for field in arguments.Options._fields if field not in ("weight", "axis")]
    for option in names:
        kernels = {file for file in files_that_name(option) if file.startswith("backends/cpu/")}
        assert kernels <= {"backends/cpu/__init__.py"}, option


def test_rows_with_the_same_coefficients_share_them():
    logits, targets, _ = Case(50, 7).build()
    of_rows = terms.of(arguments.normalise(logits, targets, {"label_smoothing": 0.1, "z_loss": 0.1}))
    assert {len(column) for column in of_rows.coefficients(np.float64(1.0))} == {1}
    of_rows = terms.of(arguments.normalise(logits, targets, {"weight": np.ones(7)}))
    assert len(of_rows.coefficients(np.float64(1.0)).hit) == 50


@pytest.mark.parametrize("backend", backends.available())
def test_a_backend_leaves_what_was_not_wanted(backend):
    logits, targets, _ = Case(5, 300).build()
    found = backends.get(backend).statistics(logits, targets, wanted=("lse",))
    assert [len(getattr(found, field)) for field in ("nll", "target_logit", "peak", "lse", "gap")] == [5, 0, 0, 5, 0]
