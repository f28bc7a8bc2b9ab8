"""The tables of a GPU, in Markdown, of what ``fastxent compare --suite gpu --json`` wrote."""

from typing import Any

from fastxent.bench import report
from fastxent.bench.gpu_bars import GRADIENT, HOST, IN_PLACE, LOSS, OURS
from fastxent.bench.record import lengths

_PLAIN, _SCORE = "plain", "score with top 5"


def section(record):
    """The conditions, a table of shapes, one of options, and which bars are met."""
    known: dict[Any, dict[Any, Any]] = {}
    for one in record["times"]:
        if one["seconds"]:
            known.setdefault((tuple(one["shape"]), one["dtype"]), {})[one["candidate"], one["operation"]] = one
    judged = [bar for bar in record["bars"] if bar["met"] is not None]
    missed = [bar["said"] for bar in judged if not bar["met"]]
    parts = [
        conditions(record),
        _of_shapes({about: found for about, found in known.items() if (OURS, LOSS) in found}),
        _of_options({about: found for about, found in known.items() if (_PLAIN, LOSS) in found}),
        _of_the_host(found for found in known.values() if (HOST, LOSS) in found),
        f"Of {len(judged)} bars that were measured {len(judged) - len(missed)} are met."
        + "".join(f"\n- {said}" for said in missed),
    ]
    return "\n\n".join(part for part in parts if part)


def conditions(record):
    """Which device, which versions, when, and how its checks went."""
    checks = record["checks"]
    right = sum(check["right"] is True for check in checks)
    return f"{report.gpu(record)}; {right:,} of {len(checks):,} checks right"


def _of_shapes(known):
    peers = dict.fromkeys(name for found in known.values() for name, operation in found
                          if name != OURS and operation == GRADIENT)  # fmt: skip
    lines = ["shape", "dtype", "loss", "of a copy", "with gradient", "of a copy", "in place", "with scores", *peers]
    rows = []
    for (shape, dtype), found in known.items():
        loss, gradient, in_place, score = (found.get((OURS, name)) for name in (LOSS, GRADIENT, IN_PLACE, _SCORE))
        others = [_times(found.get((peer, GRADIENT)), gradient) for peer in peers]
        rows.append([
            lengths(shape), dtype, _median(loss), _share(loss), _median(gradient), _share(gradient), _share(in_place),
            _times(score, loss), *others,
        ])  # fmt: skip
    return _table(lines, rows)


def _of_options(known):
    rows = []
    for (shape, dtype), found in known.items():
        for option in dict.fromkeys(candidate for candidate, _ in found):
            if option in (_PLAIN, OURS) or (option, LOSS) not in found:
                continue
            each = [_times(found.get((option, name)), found.get((_PLAIN, name))) for name in (LOSS, GRADIENT)]
            rows.append([lengths(shape), dtype, option, *each])
    return _table(["shape", "dtype", "option", "loss, times without", "with gradient, times without"], rows)


def _of_the_host(each):
    return "\n".join(
        f"The host's part of a {operation}: {_median(one)}."
        for found in each for (candidate, operation), one in found.items() if candidate == HOST
    )  # fmt: skip


def _table(headings, rows):
    if not rows:
        return ""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _median(one):
    return "" if one is None else report.seconds(one["seconds"]["median"])


def _share(one):
    return "" if one is None else report.share(one["of_ceiling"])


def _times(above, below):
    if above is None or below is None:
        return ""
    return f"{above['seconds']['median'] / below['seconds']['median']:.2f} x"
