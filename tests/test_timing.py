"""What the clock, the kernel's count of memory, and the limits say."""

import time

import numpy as np
import pytest

import fastxent
from fastxent import backends
from fastxent.bench import limits, margins, memory, timing
from fastxent.bench.candidates import LOSS, LOSS_AND_GRADIENT


def test_rounds_are_interleaved():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    timing.within(candidates, 60.0, most=5)
    assert "".join(calls) == "abcbcacababcbca"  # and each is now behind one, now behind another


def test_a_slow_one_takes_no_more_than_its_share_and_is_spread_over_the_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_seconds", lambda run: run())  # each says itself how long it took
    calls = []

    def taking(name, seconds):
        calls.append(name)
        return seconds

    candidates = {"slow": lambda: taking("slow", 0.02), "fast": lambda: taking("fast", 1e-6)}
    found = timing.within(candidates, 0.3, most=30)
    assert (found["slow"].rounds, found["fast"].rounds) == (7, 30)
    assert calls[:6] == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert "slow" in calls[-8:]
    assert found["slow"].least == found["slow"].low == found["slow"].median == found["slow"].high == 0.02


def test_one_without_time_runs_once(monkeypatch):
    monkeypatch.setattr(timing, "_seconds", lambda run: run())
    found = timing.within({"slow": lambda: 0.02, "other": lambda: 1e-6}, 0.0)
    assert {name: taken.rounds for name, taken in found.items()} == {"slow": 1, "other": 1}


def test_one_that_fails_ends_nothing():
    calls = []

    def broken():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no bead left")

    found = timing.within({"broken": broken, "other": lambda: None}, 1.0, most=5)
    assert (str(found["broken"]), found["other"].rounds, len(calls)) == ("no bead left", 5, 2)


def test_seconds_are_those_of_the_clock():
    found = timing.within({"sleeper": lambda: time.sleep(0.02)}, 0.0)
    assert found["sleeper"].least >= 0.02


def test_memory_that_is_taken_and_given_back():
    extra, result = memory.peak_extra(lambda: np.ones(40_000_000, np.uint8).sum())
    assert result == 40_000_000
    if extra is None:
        pytest.skip("this kernel does not tell the peak of resident memory")
    assert 39e6 < extra < 60e6
    assert memory.peak_extra(lambda: None)[0] < 5e6


def test_limits():
    found = limits.measure(megabytes=1)
    assert found.dtype == "float32"
    assert found.threads == fastxent.get_num_threads()
    assert min(found.read, found.copy, found.elements) > 1e6


def test_what_is_read_and_copied_was_written(monkeypatch):
    """Pages that nobody wrote are one page of zeros, which never leaves the cache."""
    seen = []
    monkeypatch.setattr(limits, "read", lambda array: seen.append(array[::4096].all()))
    monkeypatch.setattr(limits, "copy", lambda array, out: seen.append(array[::4096].all() and out[::4096].all()))
    limits.measure(megabytes=1, rounds=1)
    assert len(seen) == 4
    assert all(seen)


def test_arithmetic_is_that_of_the_number_of_classes(monkeypatch):
    shapes = []
    loss = fastxent.cross_entropy
    monkeypatch.setattr(
        fastxent, "cross_entropy", lambda x, *more, **named: shapes.append(x.shape) or loss(x, *more, **named)
    )
    for dtype, classes, shape in (
        ("float32", 1000, (2097, 1000)), ("float64", 1000, (1048, 1000)), ("float32", 1, (1 << 18, 1)),
        ("float32", 10**6, (64, 1 << 15)),
    ):  # fmt: skip
        shapes.clear()
        assert limits.elements(dtype, classes, rounds=1) > 0
        assert set(shapes) == {shape, (shape[0] // 2, shape[1])}
    shapes.clear()
    backends.explain((7, 123), "float32", "cpu")
    assert {shape[1] for shape in shapes} == {123}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("table", "with_gradient"), [(LOSS, False), (LOSS_AND_GRADIENT, True)])
def test_ours_is_flat_over_margins(dtype, table, with_gradient):
    found = margins.measure("loss", dtype, "fastxent", table["fastxent"], with_gradient)
    # a gradient of few bits is rounded once
    assert max(found.errors) < (2**-8 if dtype == "bfloat16" and with_gradient else 5e-7)
    assert found.margins[-1] == 60.0


def test_the_usual_formula_falls_to_nothing_right():
    found = margins.measure("loss", "float32", "numpy", LOSS["numpy"], False)
    assert found.errors[0] < 1e-6
    assert found.errors[-1] == 1.0


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_no_number_has_no_digit_right(value):
    found = margins.measure("loss", "float32", "abacus", lambda x, t: lambda: np.full(len(x), value), False)
    assert set(found.errors) == {1.0}
