"""Interleaved timing: every candidate once a round, so that a drifting machine hurts all alike."""

import time

import numpy as np


def interleaved(candidates, rounds=7):
    """Median seconds of each of ``candidates`` (a mapping of names to zero-argument callables), after one warm-up."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}
