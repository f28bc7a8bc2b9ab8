"""Pictures of a comparison as SVG, by Matplotlib: one colour a candidate, ours stronger, limits dashed."""

import io
import itertools
from functools import partial
from itertools import groupby

import numpy as np

from fastxent.bench.record import Comparison, lengths
from fastxent.page import require

_OURS, _LIMIT, _PALE = "#1f6f8b", "#8a8f98", "#b9c0c9"
_COLOURS = (
    "#d1603d", "#7a9e3f", "#c79a2b", "#8d5a97", "#4c78a8", "#b0617a", "#5f8f83", "#a07855", "#6b6f76", "#9aa84f",
)  # fmt: skip
_MARKERS = "osD^vPX*<>"
_DASHES = ("--", ":", "-.", (0, (6, 1)))
_WIDE = 4.6  # inches: what fits beside another, and alone on a narrow screen


class _Styles:
    """The same colour and marker for a candidate in every picture: ours are blue, the others as they come."""

    def __init__(self, comparison):
        names = dict.fromkeys(cell.candidate for cell in comparison.cells if cell.seconds)
        others = [name for name in names if not name.startswith("fastxent")]
        beside = [name for name in names if name.startswith("fastxent") and name != "fastxent"]
        self._of = {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(others)}
        shades = ("#5aa3bd", "#8cc3d6", "#2f4858", "#74a9a1")
        self._of |= {name: (shades[i % len(shades)], "hdp8"[i % 4]) for i, name in enumerate(beside)}
        self._of["fastxent"] = _OURS, "o"

    def line(self, name):
        """Keywords of a line with markers."""
        colour, marker = self._of[name]
        ours = name == "fastxent"
        return {
            "color": colour, "marker": marker, "markersize": 5, "label": name,
            "linewidth": 2.2 if ours else 1.2, "zorder": 3 if ours else 2,
        }  # fmt: skip

    def colour(self, name):
        """Its colour."""
        return self._of[name][0]


def bars(comparison: Comparison):
    """One picture with a panel a problem: how much of the limit each candidate reaches, with its time."""
    panels = _bar_panels(comparison)
    across = min(3, len({limit.problem.shape for limit in comparison.limits}) or 1)
    down = -(-len(panels) // across) or 1
    figure = _figure(_WIDE * across, max((height for height, _ in panels), default=1) * down)
    places = np.ravel(figure.subplots(down, across, squeeze=False))
    for axes, (_, draw) in zip(places, panels, strict=False):
        draw(axes)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return _svg(figure)


def bar_panels(comparison: Comparison):
    """The same as a picture a problem."""
    return [_alone(draw, _WIDE, height) for height, draw in _bar_panels(comparison)]


def _bar_panels(comparison):
    """``height, draw`` of each problem of which something was timed."""
    styles = _Styles(comparison)
    limits = [limit for limit in comparison.limits if _timed(comparison, limit.problem)]
    limits.sort(key=lambda limit: (limit.problem.threads, limit.problem.dtype, limit.problem.operation))
    return [
        (1.1 + 0.24 * len(cells), partial(_bars, limit=limit, cells=cells, styles=styles))
        for limit in limits
        for cells in [_timed(comparison, limit.problem)]
    ]


def _bars(axes, limit, cells, styles):
    names = [cell.candidate for cell in cells]
    widths = [cell.of_limit for cell in cells]
    axes.barh(names, widths, color=[styles.colour(name) for name in names], height=0.72)
    for place, cell in enumerate(cells):
        inside = cell.of_limit > 0.6
        text = f"{cell.seconds.median * 1e3:,.3g} ms" if cell.seconds.median < 1 else f"{cell.seconds.median:.2f} s"
        axes.text(
            cell.of_limit - 0.02 if inside else cell.of_limit + 0.02, place, text, va="center", fontsize=8,
            ha="right" if inside else "left", color="white" if inside else "#1c2430",
        )  # fmt: skip
    about = f"{lengths(limit.problem.shape)} {limit.problem.dtype}, {_in_threads(limit.problem.threads)}"
    axes.set_xlim(0, max(1.08, *widths))
    limited = f"of the limit, {limit.name}: {limit.seconds.median * 1e3:,.3g} ms"
    _of_limit(axes, f"{limit.problem.operation}\n{about}", limited)


def _of_limit(axes, title, label):
    """Bars that end where the limit is, the first on top."""
    axes.axvline(1.0, color=_LIMIT, linestyle="--", linewidth=1)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(label, fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(labelsize=8, length=0)
    axes.invert_yaxis()
    _open(axes)


def against_classes(comparison: Comparison):
    """Time an element against the number of classes: a picture an operation, dtype and number of threads that was
    measured at two numbers of classes or more.
    """
    styles = _Styles(comparison)
    return [
        _alone(partial(_draw_classes, key=key, limits=limits, comparison=comparison, styles=styles), legend=3)
        for key, limits in _lines_of(comparison).items()
    ]


def _lines_of(comparison):
    found = {}
    flat = [limit for limit in comparison.limits if len(limit.problem.shape) == 2]
    for key, limits in groupby(sorted(flat, key=_kind), key=_kind):
        ordered = sorted(limits, key=lambda limit: limit.problem.shape[1])
        if len({limit.problem.shape[1] for limit in ordered}) > 1:
            found[key] = ordered
    return found


def _kind(limit):
    return limit.problem.dtype, limit.problem.threads, limit.problem.operation


def _draw_classes(axes, key, limits, comparison, styles):
    dtype, threads, operation = key
    lines: dict[str, list] = {}
    for limit in limits:
        for cell in _timed(comparison, limit.problem):
            lines.setdefault(cell.candidate, []).append((limit.problem.shape[1], cell.ns_per_element))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), **styles.line(name))
    cut = [(limit.problem.shape[1], _ns_of(limit)) for limit in limits]
    axes.plot(*zip(*cut, strict=True), color=_LIMIT, linestyle="--", linewidth=1.4, label=f"limit: {limits[0].name}")
    axes.set(xscale="log", yscale="log", xlabel="classes", ylabel="ns an element")
    axes.set_title(f"Time against classes: {operation}, {dtype}, {_in_threads(threads)}", fontsize=9, loc="left")
    ticks = [classes for classes, _ in cut]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30, ha="right", fontsize=8)
    axes.minorticks_off()


def _ns_of(limit):
    rows, classes = limit.problem.shape
    return limit.seconds.median / (rows * classes) * 1e9


def rooflines(comparison: Comparison):
    """Exponentials a second against exponentials for each byte moved, under the roofs of memory and of each dtype's
    arithmetic: a picture a number of threads.
    """
    styles, found = _Styles(comparison), dict[int, list]()
    for limit in comparison.limits:
        if limit.gigabytes_per_second and _timed(comparison, limit.problem):
            found.setdefault(limit.problem.threads, []).append(limit)
    return [
        _alone(partial(_draw_roofline, threads=threads, limits=limits, comparison=comparison, styles=styles), legend=2)
        for threads, limits in found.items()
        if any(one.threads == threads for one in comparison.arithmetic)
    ]


def _draw_roofline(axes, threads, limits, comparison, styles):
    places: dict[str, list] = {}
    for limit in limits:
        for cell in _timed(comparison, limit.problem):
            point = 1 / (cell.gigabytes_per_second * cell.ns_per_element), 1e9 / cell.ns_per_element
            places.setdefault(cell.candidate, []).append(point)
    for name, points in places.items():
        axes.plot(*zip(*points, strict=True), **styles.line(name) | {"linestyle": "", "alpha": 0.8})
    marks = sorted({round(place, 4) for points in places.values() for place, _ in points})
    ends = marks[0] / 2, marks[-1] * 3
    memory = max(limit.gigabytes_per_second for limit in limits) * 1e9
    grid, dtypes = np.geomspace(*ends, 200), {limit.problem.dtype for limit in limits}
    roofs = [one for one in comparison.arithmetic if one.threads == threads and one.dtype in dtypes]
    for one, dashes in zip(roofs, itertools.cycle(_DASHES), strict=False):
        label = f"{one.dtype} arithmetic, {one.elements_per_second / 1e9:.1f} G/s"
        roof = np.minimum(grid * memory, one.elements_per_second)
        axes.plot(grid, roof, color=_LIMIT, linestyle=dashes, linewidth=1.4, label=label)
    near = {"fontsize": 8, "color": _LIMIT, "textcoords": "offset points"}
    axes.annotate(f"memory, {memory / 1e9:.0f} GB/s", (ends[0], ends[0] * memory), xytext=(14, 0), va="top", **near)
    axes.set(xscale="log", yscale="log", xlabel="exponentials for each byte moved", ylabel="exponentials a second")
    axes.set_xticks(marks, [f"1/{1 / mark:.3g}" for mark in marks], fontsize=8)
    axes.xaxis.minorticks_off()
    axes.set_title(f"Roofline, {_in_threads(threads)}", fontsize=9, loc="left")


def confidence(comparison: Comparison):
    """Relative error against the margin of the target: a picture an operation and dtype."""
    styles, found = _Styles(comparison), dict[tuple, list]()
    timed = {cell.candidate for cell in comparison.cells if cell.seconds}
    for one in comparison.confident:
        if one.candidate in timed:
            found.setdefault((one.operation, one.dtype), []).append(one)
    return [
        _alone(partial(_draw_confidence, key=key, curves=curves, styles=styles), legend=3)
        for key, curves in found.items()
    ]


def _draw_confidence(axes, key, curves, styles):
    operation, dtype = key
    least = 1e-17 if dtype == "float64" else 1e-9
    for one in curves:
        axes.plot(one.margins, np.clip(one.errors, least, None), **styles.line(one.candidate) | {"marker": ""})
    what = f"Confident rows: {'loss' if operation == 'loss' else 'gradient at the target'}"
    axes.set(yscale="log", xlabel="the target's logit above the rest", ylabel="relative error", ylim=(least / 2, 8))
    axes.axhline(1.0, color=_PALE, linewidth=0.8)
    axes.text(0, 1.25, "100%: no digit right", fontsize=8, color=_LIMIT)
    if dtype == "float16" and operation != "loss":
        axes.text(0, least, "float16 holds no gradient below 6e-8, anybody's", fontsize=8, color=_LIMIT)
    axes.set_title(f"{what}, {dtype}", fontsize=9, loc="left")


def of_times(times):
    """Bars of a GPU suite's times, of losses with gradients: a picture a shape and dtype."""
    groups: dict[tuple, list] = {}
    for one in times:
        if one["of_ceiling"] and one["operation"] == "loss and gradient":
            groups.setdefault((tuple(one["shape"]), one["dtype"]), []).append(one)
    return [_alone(partial(_draw_times, about=about, each=each), _WIDE, 2.4) for about, each in groups.items()]


def _draw_times(axes, about, each):
    each = sorted(each, key=lambda one: one["seconds"]["median"])
    colours = [_OURS if one["candidate"] == "fastxent" else _PALE for one in each]
    axes.barh([one["candidate"] for one in each], [one["of_ceiling"] for one in each], color=colours, height=0.72)
    _of_limit(axes, f"{lengths(about[0])} {about[1]}", "of a copy in the device's memory")


def _timed(comparison, problem):
    return sorted((cell for cell in comparison.of(problem) if cell.seconds), key=lambda cell: cell.seconds.median)


def _open(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    axes.tick_params(color=_PALE)


def _in_threads(number):
    return f"{number} thread{'s' * (number > 1)}"


def _alone(draw, width=_WIDE, height=4.4, legend=0):
    """A picture of one panel, a legend of so many columns below it."""
    figure = _figure(width, height)
    axes = figure.subplots()
    draw(axes)
    _open(axes)
    if legend:
        figure.legend(loc="outside lower center", ncols=legend, frameon=False, fontsize=8)
    return _svg(figure)


def _figure(width, height):
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _svg(figure):
    text = io.StringIO()
    with require("matplotlib").rc_context({"svg.hashsalt": "fastxent", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
