"""The published tables: ``python -m fastxent.bench.publish`` writes those of docs/results/compare.json into the pages,
and of docs/results/gpu.json, where a GPU has been measured, what that says.

In a page a table stands between two comments that name it; what is between is replaced. Run at the root of a clone.
"""

import json
import re
from itertools import groupby
from pathlib import Path

import click

from fastxent.bench import gpu_tables, report
from fastxent.bench.record import NOISY, Comparison, lengths

RECORD, OF_GPU = Path("docs/results/compare.json"), Path("docs/results/gpu.json")
_README_DTYPE = "float32"


def grid(comparison: Comparison):
    """A line a problem: our time, its share of the limit, its error, and how many times longer each peer took."""
    lines = _conditions(comparison)
    tables: dict = {}
    for limit in comparison.limits:
        tables.setdefault((limit.problem.operation, limit.problem.threads), []).append(limit)
    for (operation, threads), limits in tables.items():
        cells = [cell for limit in limits for cell in comparison.of(limit.problem)]
        there = dict.fromkeys(cell.candidate for cell in cells if not report.is_absent(cell))
        peers = [name for name in there if name not in ("fastxent", "fastxent reference")]
        wide = len(limits[0].problem.shape) > 2
        headings = ["shape" if wide else "classes", "dtype", "fastxent", "GB/s", "of the limit", "ulp", *peers]
        lines += [f"**{operation}, {threads} thread{'s' * (threads > 1)}**", "", _row(headings)]
        lines += ["|" + "---:|" * len(headings)]
        for limit in limits:
            shape, by_name = limit.problem.shape, {cell.candidate: cell for cell in comparison.of(limit.problem)}
            ours = by_name["fastxent"]
            about = lengths(shape if wide else shape[1:]), limit.problem.dtype
            own = [report.seconds(ours.seconds.median), report.number(ours.gigabytes_per_second)]
            own += [report.share(ours.of_limit), report.number(ours.worst_ulps)]
            lines.append(_row([*about, *own, *(_times_longer(by_name.get(peer), ours) for peer in peers)]))
        lines.append("")
    return "\n".join(lines)


def summary(comparison: Comparison):
    """A line a number of classes: ours beside the fastest peer, float32, all threads."""
    threads = max(limit.problem.threads for limit in comparison.limits)
    chosen = [
        limit.problem
        for limit in comparison.limits
        if (limit.problem.dtype, limit.problem.threads) == (_README_DTYPE, threads) and len(limit.problem.shape) == 2
    ]
    headings = ["classes", "loss", "of reading", "the fastest peer", "with gradient", "of copying", "the fastest peer"]
    lines = [*_conditions(comparison), _row(headings), "|" + "---:|" * len(headings)]
    for shape, problems in groupby(sorted(chosen, key=lambda one: one.shape[1]), key=lambda one: one.shape):
        cells = []
        for problem in sorted(problems, key=lambda one: one.operation):
            by_name = {cell.candidate: cell for cell in comparison.of(problem) if cell.seconds}
            ours, peers = by_name["fastxent"], [cell for cell in by_name.values() if not cell.is_ours]
            peer = min(peers, key=lambda cell: cell.seconds.median)
            cells += [report.seconds(ours.seconds.median), report.share(ours.of_limit)]
            cells += [f"{peer.candidate} {_times_longer(peer, ours)}"]
        lines.append(_row([lengths(shape[1:]), *cells]))
    return "\n".join([*lines, ""])


# page, name of the table, the record it is of, how that is read, and the table
PAGES = (
    (Path("docs/performance.md"), "grid", RECORD, Comparison.from_json, grid),
    (Path("README.md"), "summary", RECORD, Comparison.from_json, summary),
    (Path("docs/performance.md"), "gpu", OF_GPU, json.loads, gpu_tables.section),
)


def tables(root=Path()):
    """``page, name, table`` of every record that is there."""
    for page, name, record, read, table in PAGES:
        if (root / record).exists():
            yield root / page, name, table(read((root / record).read_text("utf-8")))


def replaced(text, name, table):
    """``text`` with ``table`` between the comments that name it; a ValueError where there are none."""
    marks = f"<!-- {name}: python -m fastxent.bench.publish -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"(?<={re.escape(marks[0])}\n).*?(?={re.escape(marks[1])})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no {marks[0]} with {marks[1]} after it")
    return pattern.sub(lambda _: f"\n{table.strip()}\n\n", text)


def _conditions(comparison):
    noise = "" if comparison.noise is None else f"; noise {comparison.noise:.0%}"
    noisy = ", too much to tell small differences" if noise and comparison.noise > NOISY else ""
    return [f"{report.machine(comparison)}; measured {comparison.measured}{noise}{noisy}", ""]


def _times_longer(cell, ours):
    if cell is None or not cell.seconds:
        return "absent" if cell is None else cell.note.split(":")[0]
    return f"{cell.seconds.median / ours.seconds.median:.1f} x"


def _row(cells):
    return f"| {' | '.join(cells)} |"


@click.command()
def main():
    """Write the tables into README.md and docs/performance.md."""
    for page, name, table in tables():
        page.write_text(replaced(page.read_text("utf-8"), name, table), "utf-8")
        click.echo(f"{page}: {name}")


if __name__ == "__main__":
    main()
