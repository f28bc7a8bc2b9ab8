"""``python -m fuzz``: every target for its share of the time; ``python -m fuzz TARGET FILE``: one input again."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from fuzz import FUNCTIONS, READERS

TARGETS = [*READERS, *FUNCTIONS]
FOUND = Path(__file__).with_name("found")


def _one_target(name, corpus, seconds):
    """In a process of its own: libFuzzer ends it at the first finding."""
    import atheris

    with atheris.instrument_imports(include=["fastxent", "zarr", "numpy.lib"]):
        from fuzz import targets
    target = targets.find(name)
    warnings.simplefilter("ignore")
    flags = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=20", f"-artifact_prefix={FOUND}/{name}-"]
    atheris.Setup(
        [sys.argv[0], str(corpus), "-max_len=8192", "-print_final_stats=1", *flags], lambda data: target(data)
    )
    atheris.Fuzz()


def _run(name, seconds):
    from fuzz import targets

    with tempfile.TemporaryDirectory(prefix="corpus") as corpus:
        for number, seed in enumerate(targets.seeds(name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        command = [sys.executable, "-m", "fuzz", name, "--corpus", corpus, "--seconds", str(seconds)]
        environment = os.environ | {"NUMBA_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    executions = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    count = int(executions[1]) if executions else 0
    print(
        f"{name:36} {count:>9,} executions, {covered[-1] if covered else 0} edges, exit {done.returncode}", flush=True
    )
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-1000:], flush=True)
    return count, bool(done.returncode)


def main():
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    FOUND.mkdir(exist_ok=True)
    if chosen.corpus:
        _one_target(chosen.target, chosen.corpus, chosen.seconds)
    elif chosen.file:
        from fuzz import targets

        targets.find(chosen.target)(chosen.file.read_bytes())
    else:
        names = [chosen.target] if chosen.target else TARGETS
        if set(names) & set(FUNCTIONS):  # instrumented, they could not be compiled
            subprocess.run([sys.executable, "-m", "fastxent", "warmup"], check=True)
        ended = [_run(name, max(1, chosen.seconds // len(names))) for name in names]
        print(f"{sum(count for count, _ in ended):,} executions, {sum(found for _, found in ended)} findings")
        sys.exit(any(found for _, found in ended))


if __name__ == "__main__":
    main()
