"""The registry, and the contract between backends: the same verbs with the same signatures."""

import importlib
import inspect
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import fastxent
from fastxent import backends
from fastxent.bench.limits import Limits

VERBS = (
    "accumulate",
    "binary",
    "count",
    "divergences",
    "gradient",
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
    module, reference = importlib.import_module(f"fastxent.backends.{name}"), backends.get("reference")
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
    assert backends.why_unavailable("abacus") == "there is no backend 'abacus'; the backends are cpu, cuda, reference"


def test_cuda_says_what_it_lacks():
    """No device is visible to this process, so there is always a reason."""
    code = "from fastxent import backends; print(backends.why_unavailable('cuda')); backends.get('cuda')"
    environment = {name: value for name, value in os.environ.items() if name != "FASTXENT_CUDA_SIMULATED"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    reasons = ("is not installed: pip install fastxent[cuda13]", "there is no NVIDIA driver", "finds no GPU")
    assert any(reason in done.stdout for reason in reasons)
    assert "BackendUnavailableError" in done.stderr


def test_cuda_is_only_taken_when_asked_for(monkeypatch):
    monkeypatch.setenv("FASTXENT_CUDA_SIMULATED", "1")
    monkeypatch.delenv("FASTXENT_BACKEND", raising=False)
    assert "cuda" in backends.available()
    assert backends.choose() is backends.get("cpu")
    assert backends.choose("cuda") is backends.get("cuda")


def test_explain_says_what_and_why(monkeypatch):
    monkeypatch.delenv("FASTXENT_BACKEND", raising=False)
    said = backends.explain((512, 32_000))
    assert said.startswith("cpu (the default): logits of shape (512, 32000) in float32 are 65.5 MB")
    assert "limits measured now" in said
    monkeypatch.setenv("FASTXENT_BACKEND", "reference")
    assert backends.chosen() == ("reference", "(asked for by FASTXENT_BACKEND)")
    assert "reference (asked for by FASTXENT_BACKEND)" in backends.explain((2, 3), np.float64)
    assert backends.explain((2, 3)).endswith("How long that takes is known of the cpu backend alone.")


def test_explain_expects_what_the_limits_say():
    slow = Limits(read=1e9, copy=0.5e9, elements=1e12, dtype="float64", threads=3)
    said = backends.explain((1000, 1000), "float64", "cpu", limits=slow)
    assert said.endswith("(limits as given, 3 threads): expect 8.0 ms and 32.0 ms, or somewhat more.")
    said = backends.explain((1000, 1000), "float64", "cpu", limits=replace(slow, elements=1e7))
    assert "expect 100.0 ms and 100.0 ms" in said
    with pytest.raises(ValueError, match="limits must be those of float32, not of float64"):
        backends.explain((2, 3), "float32", "cpu", limits=slow)
