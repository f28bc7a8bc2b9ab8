"""Interleaved timing: every candidate once a round, so that a drifting machine hurts all alike."""

import time

import numpy as np

from fastxent.bench.record import Seconds


def interleaved(candidates, rounds=7):
    """Median seconds of each of ``candidates`` (a mapping of names to zero-argument callables), after one warm-up."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(_seconds(run))
    return {name: float(np.median(times)) for name, times in seconds.items()}


def within(candidates, seconds, least=3, most=31):
    """`Seconds` of each of ``candidates``, which are warm, in about so many ``seconds`` in all; of one that fails, its
    exception.

    Each has the same share of the time. In each of up to ``most`` rounds it runs if what it has taken lags behind the
    rounds' share of it, so that a slow one runs in fewer rounds, spread over all; and it runs in ``least`` at the
    beginning, once where that alone is beyond its share. Each round begins with another one, as what runs before leaves
    its data in the cache and its threads awake.
    """
    share, names = seconds / len(candidates), list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, Exception] = {}
    for round_number in range(1, most + 1):
        first = (round_number - 1) % len(names)
        for name in names[first:] + names[:first]:
            taken = samples[name]
            allowed = share if len(taken) < least else share * round_number / most
            if name not in failures and (not taken or sum(taken) + min(taken) <= allowed):
                try:
                    taken.append(_seconds(candidates[name]))
                except Exception as failure:  # a library's own; the others go on
                    failures[name] = failure
    return {name: failures.get(name) or Seconds.of(samples[name]) for name in names}


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
