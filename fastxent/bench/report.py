"""What a comparison found, as a table to print or to put into a page."""

from itertools import groupby

HEADINGS = ("", "time", "of the limit", "fastxent is faster by", "worst error")


def rows(cells):
    """The cells of one operation on one problem as rows of text under `HEADINGS`."""
    ours = cells[0]["seconds"]
    for cell in cells:
        if cell["seconds"] is None:
            error = "" if cell["worst_error"] is None else f"{cell['worst_error']:.1e}"
            yield cell["candidate"], cell["note"], "", "", error
            continue
        ratio = "" if cell is cells[0] or ours is None else f"{cell['seconds'] / ours:.1f} x"
        time, limit = f"{cell['seconds'] * 1e3:.2f} ms", f"{cell['of_limit']:.0%}"
        yield cell["candidate"], time, limit, ratio, f"{cell['worst_error']:.1e}"


def title(cell):
    """What a table of cells is about."""
    return f"{cell['operation']}, {cell['shape'][0]:,} x {cell['shape'][1]:,} {cell['dtype']}"


def markdown(record):
    """The machine and every table of a record written by ``fastxent compare --json``."""
    lines = ["; ".join(f"{name} {value}" for name, value in record["machine"].items()), ""]
    for name, cells in groupby(record["cells"], title):
        lines += [f"| {name} | {' | '.join(HEADINGS[1:])} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
        lines += [f"| {' | '.join(row)} |" for row in rows(list(cells))] + [""]
    return "\n".join(lines)
