"""Do the tests notice? Mutations of the arithmetic and of the checks, each run against a short battery.

``python -m tests.mutation`` draws 60 by seed from all that Cosmic Ray makes of `SOURCES`, and prints a table. The draw
belongs to one state of the sources: a line more anywhere is another draw, so the table names the commit. A mutant lives
in a copy of the package with a folder of its own for compiled kernels. It is killed by a test that fails, a crash or
more than `HANGS` seconds of its own processor's time, never by the clock, by memory that others need or by a battery
that did not run: such an end is unclear. A survivor must have its reason in `EQUIVALENT`; one without, and an end that
is unclear, fail the command.

The battery takes at most `SECONDS` with compiled kernels, which is measured; to compile those of a mutant comes on top.

Not drawn: `fastxent/backends/cpu/__init__.py`, which cuts work into launches, where most mutants change the speed
alone; and the CUDA kernels, which take their formulas from `rowmath` and run here on a simulator, 50 ms a row.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).with_name("mutants.toml")
NO_ARITHMETIC = {"__init__.py", "cache.py", "twins.py", "warmup.py"}
SOURCES = [
    *(f"fastxent/{name}.py" for name in ("rowmath", "state", "reduction", "arguments", "checks", "terms")),
    *sorted(
        f"fastxent/backends/cpu/{path.name}"
        for path in (ROOT / "fastxent/backends/cpu").glob("*.py")
        if path.name not in NO_ARITHMETIC
    ),
]
# the cheapest first: a battery ends at the first failure
BATTERY = [
    f"tests/test_{name}.py"
    for name in (
        "reduction", "terms", "arguments", "rowmath", "strided", "information", "binary", "losses", "divergences",
        "targets", "scoring", "softmax", "state", "shards", "curvature", "bounds",
    )
] + ["tests/test_cpu.py::TestSameBits::test_for_any_number_of_segments"]  # fmt: skip
# other dtypes, what reads files beside the package, what compiles kernels every time, and the test of a test
_LONG = "float16 or bfloat16 or float8 or costs_four_places or know_no_option or indices_checked or would_be_seen"
# which compile apart; the reference backend is NumPy, and its tests in float32 say all
PARTS = f"not ({_LONG} or float64)", f"float64 and not ({_LONG} or reference)"
SECONDS = 30  # of a processor, for the battery with compiled kernels
HANGS = 600  # seconds of a processor for a part of the battery; with every kernel to compile both take 120
NEVER = 4 * HANGS  # seconds by the clock, after which a part is given up
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}


def drawn(number, seed):
    """So many mutations of all, in the order of the sources; and how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        found = _all_mutations(Path(folder) / "all.sqlite")
    chosen = random.Random(seed).sample(found, min(number, len(found)))  # noqa: S311
    return sorted(chosen, key=lambda mutation: (SOURCES.index(mutation.source), mutation.line)), len(found)


def _all_mutations(database):
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    with use_db(str(database), WorkDB.Mode.create) as work:
        init([ROOT / source for source in SOURCES], work, {})
        specs = [item.mutations[0] for item in work.work_items]
    mutations = [
        SimpleNamespace(
            source=str(spec.module_path.relative_to(ROOT)),
            operator=spec.operator_name,
            occurrence=spec.occurrence,
            line=spec.start_pos[0],
        )
        for spec in specs
    ]
    return sorted(mutations, key=lambda mutation: (mutation.source, mutation.operator, mutation.occurrence))


def mutate(mutation):
    """``code, before, after, occurrence``: the mutated source, the lines that change and what becomes of them, and the
    how manieth of its like the first of them is in the file.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = (ROOT / mutation.source).read_text("utf-8")
    mutated = mutate_code(code, get_operator(mutation.operator)(), mutation.occurrence)
    lines, before, after = code.splitlines(), code.splitlines(), mutated.splitlines()
    for end in (0, -1):
        while before and after and before[end] == after[end]:
            del before[end], after[end]
        if end == 0:
            first = len(lines) - len(before)
    return mutated, *(" ".join(line.strip() for line in part) for part in (before, after)), occurrence(lines, first)


def occurrence(lines, index):
    """1 where no line before ``lines[index]`` says the same, 2 where one does."""
    return sum(line.strip() == lines[index].strip() for line in lines[: index + 1])


def run(mutation, kernels):
    """What the battery says of a mutation: a dict for the table."""
    code, before, after, number = mutate(mutation)
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        folder = _copy(Path(name), kernels)
        (folder / mutation.source).write_text(code, "utf-8")
        outcome, test = battery(folder)
    where = {"source": mutation.source, "line": mutation.line, "occurrence": number}
    return where | {
        "before": before,
        "after": after,
        "operator": mutation.operator.removeprefix("core/"),
        "outcome": outcome,
        "test": test,
    }


def _copy(folder, kernels):
    """What the battery needs, in ``folder``."""
    for part in ("fastxent", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / part, folder)
    shutil.copytree(kernels, folder / "kernels")
    return folder


def battery(folder):
    """Run the tests of a copy: ``outcome, test``, the outcome "survived" where all pass."""
    for part in PARTS:
        outcome, test = _tests(folder, part)
        if outcome == "unclear":  # memory that others needed, perhaps; what was compiled is kept
            outcome, test = _tests(folder, part)
        if outcome != "survived":
            break
    return outcome, test


def _tests(folder, part):
    options = ["-x", "-v", "-p", "no:cacheprovider", "-k", part]
    chosen = {"FASTXENT_CACHE_DIR": str(folder / "kernels"), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    chosen |= {"PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}
    # a loop without end is seen by what it computes, however many share the processors, in children of tests too
    limited = ["sh", "-c", f'ulimit -c 0 && ulimit -S -t {HANGS} && exec "$@"', "sh", sys.executable, "-m", "pytest"]
    try:
        done = subprocess.run(
            [*limited, *options, *BATTERY],
            cwd=folder, env=os.environ | chosen, capture_output=True, text=True, timeout=NEVER,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "unclear", f"not done after {NEVER} s"
    return ended(done.returncode, done.stdout)


def ended(code, said):
    """``outcome, test`` of a run of pytest -v by its exit code and what it said.

    A mutant is killed by nothing but a failed test, a module that cannot be collected, a crash, or a loop without end.
    """
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    failed = failed[1].removeprefix("tests/") if failed else ""
    begun = re.findall(r"^tests/(\S+::\S+)", said, re.MULTILINE)
    last = begun[-1] if begun else ""
    if code == 0:
        return "survived", ""
    if (code == 1 or (code == 2 and "during collection" in said)) and failed:
        return "killed", failed
    if code == -signal.SIGXCPU:
        return "hung", last
    if code < 0 and -code in CRASHES:
        return f"killed by {signal.Signals(-code).name}", last
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "unclear", f"{how} {f'in {last}' if last else ''}".strip()


def warm(kernels):
    """Compile what the battery needs of the package as it is, which must pass; the seconds it then takes of a processor
    and by the clock.
    """
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        folder = _copy(Path(name), kernels)
        first, _ = _timed(folder)
        print(f"the battery with kernels to compile: {first:.0f} s of a processor", file=sys.stderr, flush=True)
        shutil.copytree(folder / "kernels", kernels, dirs_exist_ok=True)
        return _timed(folder)


def _timed(folder):
    before, start = os.times(), time.perf_counter()
    found = battery(folder)
    assert found == ("survived", ""), f"the battery fails on the package as it is: {found}"
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, time.perf_counter() - start


@functools.cache
def _reasons():
    return {
        (entry["source"], entry["before"], entry["after"], number): entry
        for entry in tomllib.loads(EQUIVALENT.read_text("utf-8")).get("mutant", [])
        for number in entry["occurrences"]
    }


def verdict(result):
    """How a mutant of the table ended, in words; "survived" alone where it must not."""
    if result["outcome"] != "survived":
        return f"{result['outcome']}: {result['test']}" if result["test"] else result["outcome"]
    reason = _reasons().get((result["source"], result["before"], result["after"], result["occurrence"]))
    return "survived" if reason is None else f"equivalent: {' '.join(reason['because'].split())}"


def commit():
    """The state of the sources in a word, "-dirty" where they are not what was committed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def table(results, total, seed):
    """The report, in Markdown."""
    words = [verdict(result) for result in results]
    counts = {what: sum(word.startswith(what) for word in words) for what in ("equivalent", "survived", "unclear")}
    counts = {"killed": len(results) - sum(counts.values())} | counts
    ends = ", ".join(f"{number} {what}" for what, number in counts.items())
    lines = [
        f"{len(results)} of {total:,} mutations of commit {commit()}, seed {seed}: {ends}.",
        "",
        "| where | before | after | outcome |",
        "|---|---|---|---|",
    ]
    for result in results:
        before, after = (f"`{result[key]}`".replace("|", "\\|") for key in ("before", "after"))
        where = f"{result['source'].removeprefix('fastxent/')}:{result['line']}"
        lines.append(f"| {where} | {before} | {after} | {verdict(result)} |")
    return "\n".join(lines)


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--results", type=Path, help="keep what is done here, and go on from there: with what lived or is unclear again"
    )
    parser.add_argument("--kernels", type=Path, help="compiled kernels of the package as it is, to save their making")
    chosen = parser.parse_args()
    mutations, total = drawn(chosen.number, chosen.seed)
    done = {}
    if chosen.results and chosen.results.exists():
        kept = map(json.loads, chosen.results.read_text("utf-8").splitlines())
        done = {entry["key"]: entry for entry in kept if entry["outcome"] not in ("survived", "unclear")}
    with tempfile.TemporaryDirectory(prefix="kernels") as kernels:
        if chosen.kernels:
            shutil.copytree(chosen.kernels, kernels, dirs_exist_ok=True)
        spent, elapsed = warm(kernels)
        print(f"the battery: {spent:.1f} s of a processor, {elapsed:.1f} s by the clock", file=sys.stderr, flush=True)
        if spent > SECONDS:
            sys.exit(f"the battery may take {SECONDS} s")
        with concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
            left = {key(mutation): mutation for mutation in mutations if key(mutation) not in done}
            running = {pool.submit(run, mutation, kernels): name for name, mutation in left.items()}
            for end in concurrent.futures.as_completed(running):
                result, name = end.result(), running[end]
                done[name] = result | {"key": name}
                print(f"{result['source']}:{result['line']}: {verdict(result)}", file=sys.stderr, flush=True)
                if chosen.results:
                    with chosen.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(done[name]) + "\n")
    results = [done[key(mutation)] for mutation in mutations]
    print(table(results, total, chosen.seed))
    print(f"\nThe battery with compiled kernels: {spent:.1f} s of a processor.")
    sys.exit(any(verdict(result).startswith(("survived", "unclear")) for result in results))


def key(mutation):
    """What tells a mutation from every other: the code it makes."""
    return hashlib.sha256(mutation.source.encode() + mutate(mutation)[0].encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
