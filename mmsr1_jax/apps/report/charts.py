"""Charts of the metrics of a run, drawn by matplotlib as SVG images.

A chart is plain data for JSON: `title`, `alt` (its content as a sentence), `svg`, and `series`, for
the table of its values: the label and the metric of each curve.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Chart = dict[str, Any]
Values = Sequence[float | None]

# Colours of the curves, in a cycle. All are readable on a light and on a dark background.
_COLORS = (
    "#2f7fd6", "#d9701e", "#169c80", "#c2479a", "#808791", "#a8850f", "#7d63d1", "#5a9a33"
)  # fmt: skip
_GRAY = "#808791"
_SMOOTHING = 25  # a thick curve is the mean over the last 1/25 of the run
_MAX_MARKED = 12  # curves with at most as many points have markers
_FONT_SIZE = 8  # points; the SVG is 4.6 inches wide
_MAX_VALUE = 1e150  # larger values would overflow in matplotlib
# Text follows the colour scheme of the reader.
_STYLE = """
text { font-family: system-ui, sans-serif !important; fill: #3d4856 !important }
@media (prefers-color-scheme: dark) { text { fill: #c3ccd8 !important } }
"""
_SVG = "http://www.w3.org/2000/svg"

_SEARCHES = {"any": "any", "image": "image only", "text": "text only", "both": "both",
             "none": "none"}  # fmt: skip
_NO_PHASE = ("time/step", "time/tokens_per_second", "time/compiles")


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A chart of several metrics.

    Attributes:
      title: Title of the chart.
      labels: Labels of the curves, by metric. Metrics that the run does not have are skipped.
      stacked: Whether the values are stacked as areas.
    """

    title: str
    labels: Mapping[str, str]
    stacked: bool = False


def draw_charts(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the charts of a run.

    Args:
      curves: Metrics by step, see `reader.ReportData`.

    Returns:
      `{"panels": [chart, ..], "metrics": {name: chart of this metric alone}}`, or `{}` without
      metrics.
    """
    if not curves:
        return {}
    steps, metrics = curves["steps"], curves["metrics"]
    panels = []
    for panel in _panels(metrics):
        labels = {name: label for name, label in panel.labels.items() if name in metrics}
        if labels:
            panels.append(_chart(panel.title, steps, metrics, labels, stacked=panel.stacked))
    single = {name: _chart(name, steps, metrics, {name: name}, zero=False) for name in metrics}
    return {"panels": panels, "metrics": dict(sorted(single.items()))}


def _panels(metrics: Iterable[str]) -> list[_Panel]:
    def prefixed(prefix: str, excluded: Sequence[str] = ()) -> dict[str, str]:
        names = (name for name in metrics if name.startswith(prefix) and name not in excluded)
        return {name: name.removeprefix(prefix) for name in names}

    return [
        _Panel("Reward and accuracy", {
            "reward": "reward", "accuracy": "accuracy", "format": "correct format",
            "validation/accuracy": "validation accuracy",
        }),
        _Panel("Fraction of episodes that search",
               {f"search/{kind}": label for kind, label in _SEARCHES.items()}),
        _Panel("Fraction of episodes that search, by category", prefixed("search_by_category/")),
        _Panel("Accuracy by category", prefixed("accuracy_by_category/")),
        _Panel("Searches and turns per episode", {"searches": "searches", "turns": "turns"}),
        _Panel("Tokens per episode", {"tokens_sampled": "sampled", "tokens": "all"}),
        _Panel("Fraction of episodes by end", prefixed("end/")),
        _Panel("Fraction of failed tool calls", {"tool/failed": "failed"}),
        _Panel("Step time in seconds", prefixed("time/", _NO_PHASE), stacked=True),
    ]  # fmt: skip


def _chart(
    title: str, steps: Sequence[int], metrics: Mapping[str, Values], labels: Mapping[str, str],
    *, stacked: bool = False, zero: bool = True,
) -> Chart:  # fmt: skip
    """Draw one chart; `zero`: whether the vertical axis includes 0."""
    values = {label: metrics[name] for name, label in labels.items()}
    x = np.array(steps, float)
    y = {label: np.array(series, float) for label, series in values.items()}  # None becomes NaN

    def draw(axes: "Axes") -> None:
        if stacked:
            heights = np.nan_to_num(np.stack(list(y.values())))
            names = list(map(_printable, y))
            axes.stackplot(x, heights, labels=names, colors=_COLORS, alpha=0.85)
        else:
            for index, (label, series) in enumerate(y.items()):
                _plot_curve(axes, x, series, label, _COLORS[index % len(_COLORS)])
        if zero and axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)

    return {
        "title": title,
        "alt": _description(title, steps, values),
        "svg": _svg(draw, legend=len(values) > 1),
        "series": [{"label": label, "metric": name} for name, label in labels.items()],
    }


def _plot_curve(axes: "Axes", x: np.ndarray, y: np.ndarray, label: str, color: str) -> None:
    """Plot a smoothed curve over its values, or the values alone if there are few.

    Steps without a value, as between two validations, are skipped.

    Args:
      axes: Axes of the chart.
      x, y: float[n], steps and values, NaN for a step without a value.
      label, color: Label and colour of the curve.
    """
    num_steps, known = len(x), np.isfinite(y)
    x, y = x[known], np.clip(y[known], -_MAX_VALUE, _MAX_VALUE)
    label = _printable(label)
    if len(y) < num_steps / 2 or len(y) <= _MAX_MARKED:
        axes.plot(x, y, color=color, label=label, marker="o", markersize=2.5, linewidth=1.4)
        return
    window = -(-num_steps // _SMOOTHING)
    if window > 1:
        axes.plot(x, y, color=color, alpha=0.3, linewidth=0.7)
    sums, end = np.cumsum(np.concatenate([[0.0], y])), np.arange(1, len(y) + 1)
    start = np.maximum(0, end - window)
    smooth = (sums[end] - sums[start]) / (end - start)
    axes.plot(x, smooth, color=color, label=label, linewidth=1.4)


def _printable(text: str) -> str:
    """Return a label without characters that XML cannot contain.

    Matplotlib's legends omit labels that begin with an underscore, so those get a space before it.
    """
    text = "".join(character if character.isprintable() else "?" for character in text)
    return f" {text}" if text.startswith("_") else text


def _svg(draw: Callable[["Axes"], None], *, legend: bool) -> str:
    """Return a figure with a transparent background, and with its text as text."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "mmsr1_jax", "text.parse_math": False,
        "font.size": _FONT_SIZE, "axes.edgecolor": _GRAY, "xtick.color": _GRAY,
        "ytick.color": _GRAY, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that matplotlib's own font lacks
        figure = Figure(figsize=(4.6, 2.4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(axis="y", color=_GRAY, alpha=0.25, linewidth=0.6)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        if legend:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        out = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    return _compact(out.getvalue())


def _compact(svg: str) -> str:
    """Round the coordinates of an SVG image to 0.1 points and add `_STYLE`."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for path in root.iter(f"{{{_SVG}}}path"):
        words = path.get("d", "").split()
        path.set("d", " ".join(w if w.isalpha() else f"{float(w):.1f}" for w in words))
    style = ElementTree.Element(f"{{{_SVG}}}style")
    style.text = _STYLE
    root.insert(0, style)
    return ElementTree.tostring(root, encoding="unicode")


def _description(title: str, steps: Sequence[int], values: Mapping[str, Values]) -> str:
    """Describe a chart by the first and last value of each curve."""
    ends = []
    for label, series in values.items():
        known = [value for value in series if value is not None]
        ends.append(f"{label} from {known[0]:.4g} to {known[-1]:.4g}")
    return f"{title}, steps {steps[0]} to {steps[-1]}: {'; '.join(ends)}."
