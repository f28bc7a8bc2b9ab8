"""What a comparison found, as tables to print or to put into a page."""

from itertools import groupby

HEADINGS = ("", "time", "GB/s", "of the limit", "fastxent is faster by", "worst error", "ulp")


def rows(cells):
    """The cells of one operation on one problem as rows of text under `HEADINGS`."""
    ours = cells[0]["seconds"]
    for cell in cells:
        errors = ["", ""]
        if cell["worst_error"] is not None:
            errors = [f"{cell['worst_error']:.1e}", _short(cell["worst_ulps"])]
        if cell["seconds"] is None:
            yield cell["candidate"], cell["note"], "", "", "", *errors
            continue
        ratio = "" if cell is cells[0] or ours is None else f"{cell['seconds'] / ours:.1f} x"
        time, speed = f"{cell['seconds'] * 1e3:.2f} ms", _short(cell["gigabytes_per_second"])
        yield cell["candidate"], time, speed, f"{cell['of_limit']:.0%}", ratio, *errors


def title(cell):
    """What a table of cells is about."""
    threads = f"{cell['threads']} thread{'s' * (cell['threads'] > 1)}"
    return f"{cell['operation']}, {_lengths(cell['shape'])} {cell['dtype']}, {threads}"


def markdown(record):
    """The machine and the tables of a record written by ``fastxent compare --json``, a line for each problem.

    A peer's column says how many times longer it took than the first candidate.
    """
    lines = ["; ".join(f"{name} {value}" for name, value in record["machine"].items()), ""]
    tables: dict = {}
    for cell in record["cells"]:
        tables.setdefault((cell["operation"], cell["threads"]), []).append(cell)
    for (operation, threads), cells in tables.items():
        ours, *peers = dict.fromkeys(cell["candidate"] for cell in cells)
        headings = [
            "shape" if len(cells[0]["shape"]) > 2 else "classes",
            "dtype",
            ours,
            "GB/s",
            "of the limit",
            "ulp",
            *peers,
        ]
        lines += [f"**{operation}, {threads} thread{'s' * (threads > 1)}**", "", f"| {' | '.join(headings)} |"]
        lines += ["|" + "---:|" * len(headings)]
        for (shape, dtype), group in groupby(cells, lambda cell: (tuple(cell["shape"]), cell["dtype"])):
            lengths = _lengths(shape if len(shape) > 2 else shape[1:])
            lines.append(f"| {lengths} | {dtype} | {' | '.join(_line(list(group), peers))} |")
        lines.append("")
    return "\n".join(lines)


def _line(cells, peers):
    by_name = {cell["candidate"]: cell for cell in cells}
    own = cells[0]
    yield f"{own['seconds'] * 1e3:.2f} ms"
    yield _short(own["gigabytes_per_second"])
    yield f"{own['of_limit']:.0%}"
    yield _short(own["worst_ulps"])
    for peer in peers:
        cell = by_name.get(peer, {"seconds": None, "note": "absent"})
        yield f"{cell['seconds'] / own['seconds']:.1f} x" if cell["seconds"] else cell["note"].split(":")[0]


def _lengths(shape):
    return " x ".join(f"{length:,}" for length in shape)


def _short(number):
    if number is None:
        return ""
    return f"{number:.1f}" if number < 1000 else f"{number:.0e}"
