"""A digest of scores as one HTML file that needs no network: tables by Jinja, pictures by Matplotlib as inline SVG.

The layout serves the pages of `fastxent.bench` too.
"""

import importlib
import io
import math

import numpy as np

from fastxent.digest import EDGES

_SURE, _OTHER, _GREY = "#1f6f8b", "#d1603d", "#8a8f98"

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
  .sub { color: #5a6472; margin-top: .2rem; overflow-wrap: anywhere; }
  .figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem; }
  .figure { border: 1px solid #dfe3e8; border-radius: 8px; padding: .6rem .8rem; }
  .figure b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
  .figure span { color: #5a6472; font-size: .85rem; }
  .pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; margin-top: 1.5rem; }
  .pictures svg { max-width: 100%; height: auto; }
  .wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
  .dense { font-size: .85rem; } .dense th, .dense td { padding: .25rem .45rem; }
  th { color: #5a6472; font-weight: 500; } td:first-child, th:first-child { text-align: left; }
  .note { color: #5a6472; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="sub">{{ subtitle }}</p>
<div class="figures">
{% for label, value in figures %}<div class="figure"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
<div class="pictures">{% for picture in pictures %}{{ picture | safe }}{% endfor %}</div>
{% for heading, note, columns, rows in tables %}
<h2>{{ heading }}</h2>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
<div class="wide"><table{% if columns | length > 9 %} class="dense"{% endif %}>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
</body>
</html>
"""


class MissingPackageError(ImportError):
    """A package that a page needs is not installed; the message says how to install it."""


def check():
    """A MissingPackageError without Matplotlib or Jinja."""
    for name in ("matplotlib.figure", "jinja2"):
        require(name)


def render(digest, title, subtitle):
    """The page of a `fastxent.digest.Digest` as text.

    Raises
    ------
    MissingPackageError
        Without Matplotlib or Jinja.
    """
    pictures = [_losses(digest), *([_calibration(digest.calibration)] if digest.calibration else [])]
    return lay_out(title, subtitle, _figures(digest), pictures, list(_tables(digest)))


def lay_out(title, subtitle, figures, pictures, tables):
    """A page as text: figures are ``label, value``, pictures SVG, tables ``heading, note, columns, rows``.

    Raises
    ------
    MissingPackageError
        Without Jinja.
    """
    environment = require("jinja2").Environment(autoescape=True)
    return environment.from_string(_TEMPLATE).render(
        title=title, subtitle=subtitle, figures=figures, pictures=pictures, tables=tables
    )


def require(name):
    """The module ``name``, or a MissingPackageError that says how to have it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(f"a page needs {name.split('.')[0]}; pip install fastxent[report]") from None


def _number(value, spec=".4g"):
    return "" if isinstance(value, float) and math.isnan(value) else format(value, spec)


def _figures(digest):
    of_all = digest.metrics
    yield "rows", f"{of_all.rows[0]:,}"
    yield "valid", f"{of_all.valid[0]:,}"
    if of_all.nan[0]:
        yield "NaN", f"{of_all.nan[0]:,}"
    yield "mean NLL, nats", f"{_number(of_all.mean_nll[0], '.5g')} ± {_number(of_all.nll_error[0], '.2g')}"
    yield "perplexity", f"{_number(of_all.perplexity[0], '.5g')} ± {_number(of_all.perplexity_error[0], '.2g')}"
    yield "accuracy", _number(of_all.accuracy[0], ".2%")
    if of_all.top_k_accuracy.shape[1] > 1:
        yield f"in the top {of_all.top_k_accuracy.shape[1]}", _number(of_all.top_k_accuracy[0, -1], ".2%")
    yield "mean reciprocal rank", _number(of_all.mean_reciprocal_rank[0])
    yield "mean entropy, nats", _number(of_all.entropy[0])
    for label, values in (("bits per byte", of_all.bits_per_byte), ("word perplexity", of_all.word_perplexity)):
        if not np.isnan(values[0]):
            yield label, _number(values[0], ".5g")
    if digest.calibration is not None:
        yield "expected calibration error", _number(digest.calibration.expected_error, ".2%")


def _tables(digest):
    if digest.models is not None:
        models = digest.models
        low, high = models.perplexity_interval
        rows = [
            ("perplexity of the first", _number(models.perplexity, ".6g")),
            ("perplexity of the second", _number(models.other_perplexity, ".6g")),
            ("change, with its 95% interval", f"{models.perplexity_change:+.4g}  [{low:+.4g}, {high:+.4g}]"),
            ("same largest class", _number(models.same_argmax, ".2%")),
            ("mean KL divergence, nats", _number(models.kl_mean)),
            *((f"KL divergence, {q}% of rows below", _number(kl)) for q, kl in models.kl_percentiles.items()),
            ("mean Jensen-Shannon divergence, nats", _number(models.js_mean)),
            ("change of the target's probability, mean", f"{models.probability_change_mean:+.4g}"),
            ("change of the target's probability, rms", _number(models.probability_change_rms)),
        ]
        yield "Two models", f"{models.rows:,} rows compared", ("", ""), rows
    if digest.groups is not None:
        yield _group_table(digest.groups)
    columns = [
        name for name in ("row", "log_prob", "rank", "argmax", "entropy", "kl") if name in digest.hardest.dtype.names
    ]
    cells = [
        [_number(record[name].item(), "," if record[name].dtype.kind == "i" else ".5g") for name in columns]
        for record in digest.hardest
    ]
    yield "Hardest rows", "The targets with the smallest log-probabilities.", columns, cells


def _group_table(groups, most=200):
    order = np.argsort(-groups.mean_nll, kind="stable")[:most]
    columns = ["group", "rows", "mean NLL", "±", "perplexity", "accuracy", "bits per byte"]
    rows = [
        (
            str(groups.group[i]),
            f"{groups.valid[i]:,}",
            _number(groups.mean_nll[i]),
            _number(groups.nll_error[i], ".2g"),
            _number(groups.perplexity[i]),
            _number(groups.accuracy[i], ".1%"),
            _number(groups.bits_per_byte[i]),
        )
        for i in order
    ]
    note = f"{len(groups):,} groups, the hardest first" + (f"; {most} of them" if len(groups) > most else "")
    return "Groups", note, columns, rows


def _drawing(size, draw):
    figure = require("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with require("matplotlib").rc_context({"svg.hashsalt": "fastxent", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _losses(digest):
    """A histogram over decades; what lies outside of them stands in the bins at the ends."""
    counts, edges = digest.histogram, EDGES.copy()
    edges[0], edges[-1] = edges[1] / 10 ** (1 / 8), edges[-2] * 10 ** (1 / 8)
    there = np.flatnonzero(counts)

    def draw(axes):
        axes.stairs(counts, edges, fill=True, color=_SURE, alpha=0.85)
        axes.set(xscale="log", xlabel="loss of a row, nats", ylabel="rows", title="Losses")
        if there.size:
            axes.set_xlim(edges[max(0, there[0] - 2)], edges[min(len(edges) - 1, there[-1] + 3)])
            mean = digest.metrics.mean_nll[0]
            if 0.0 < mean < np.inf:
                axes.axvline(mean, color=_OTHER, linewidth=1.5, label=f"mean {mean:.4g}")
                axes.legend(frameon=False)

    return _drawing((6.4, 3.6), draw)


def _calibration(calibration):
    there = calibration.count > 0

    def draw(axes):
        widths = np.diff(calibration.edges)
        axes.bar(
            calibration.edges[:-1][there], calibration.accuracy[there], widths[there],
            align="edge", color=_SURE, alpha=0.85, edgecolor="white", label="right",
        )  # fmt: skip
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--", label="as often as sure")
        axes.plot(calibration.confidence[there], calibration.accuracy[there], "o", color=_OTHER, markersize=4)
        axes.set(
            xlabel="probability of the largest class", ylabel="how often it is the target", xlim=(0, 1), ylim=(0, 1)
        )
        axes.set_title(f"Calibration, expected error {calibration.expected_error:.2%}")
        axes.legend(frameon=False, loc="upper left")

    return _drawing((4.6, 3.6), draw)
