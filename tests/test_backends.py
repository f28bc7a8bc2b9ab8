"""The registry, and the contract between backends: the same verbs with the same signatures."""

import inspect

import numpy as np
import pytest

import fastxent
from fastxent import backends

VERBS = (
    "accumulate",
    "binary",
    "divergences",
    "log_softmax",
    "logsumexp",
    "score",
    "softmax",
    "statistics",
    "statistics_and_gradient",
    "why_unavailable",
)


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_has_the_same_verbs(name):
    module, reference = backends.get(name), backends.get("reference")
    functions = [
        verb
        for verb, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not verb.startswith("_")
    ]
    assert tuple(sorted(set(functions) - {"describe"})) == VERBS
    for verb in VERBS:
        assert inspect.signature(getattr(module, verb)) == inspect.signature(getattr(reference, verb)), verb


def test_choice(monkeypatch):
    monkeypatch.delenv("FASTXENT_BACKEND", raising=False)
    assert backends.choose() is backends.get("cpu")
    assert backends.choose("reference") is backends.get("reference")
    monkeypatch.setenv("FASTXENT_BACKEND", "reference")
    assert backends.choose() is backends.get("reference")
    assert backends.choose("cpu") is backends.get("cpu")


def test_environment_that_names_no_backend(monkeypatch):
    monkeypatch.setenv("FASTXENT_BACKEND", "abacus")
    with pytest.raises(backends.BackendUnavailableError, match="there is no backend 'abacus'"):
        fastxent.cross_entropy(np.zeros((1, 2)), [0])


def test_why_unavailable():
    assert backends.why_unavailable("cpu") is None
    assert backends.why_unavailable("abacus") == "there is no backend 'abacus'; the backends are cpu, reference"


def test_explain_says_what_and_why(monkeypatch):
    monkeypatch.delenv("FASTXENT_BACKEND", raising=False)
    assert "cpu (the fastest available)" in backends.explain((512, 32_000))
    assert "65.5 MB" in backends.explain((512, 32_000))
    monkeypatch.setenv("FASTXENT_BACKEND", "reference")
    assert "reference (asked for by FASTXENT_BACKEND)" in backends.explain((2, 3), np.float64)
