"""Compare a policy before and after training: a table of workflows, and curves as a PNG.

    python -m mmsr1_jax.scripts.demo --before=OUT --after=OUT[,OUT ..] \\
        --runs=RUN[,RUN ..] --png=FILE

OUT is an output directory of `evaluate`, for the policy before training and for the trained
policies. Metrics are averaged over several trained policies, such as runs with different seeds.
Each source of questions has its own table, with a row for each workflow and a column for each
category of questions. RUN is an output directory of `train`.
"""

import itertools
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.compare import compare
from mmsr1_jax.evaluation.metrics import Outcome, compute_metrics
from mmsr1_jax.evaluation.table import align_columns
from mmsr1_jax.training.metrics import read as read_metrics
from mmsr1_jax.utils import outputs

NO_SEARCH = "free"  # category of questions that need no search (`data/tiny_world/world.py`)
_CATEGORY_PREFIX = "search_by_category/"  # prefix of the metrics of a category
_CURVES = {
    "reward and accuracy": ("reward", "accuracy"),
    "episodes that search": ("search/any", "search/text", "search/image", "search/both"),
}

Metrics = dict[str, Any]  # see `evaluation.metrics.compute_metrics`


def main(argv: Sequence[str]) -> None:
    del argv
    before = read_outcomes(pathlib.Path(_BEFORE.value))
    after = [read_outcomes(pathlib.Path(name)) for name in _AFTER.value]
    for source in sorted({outcome.source for outcome in before}):
        print(f"{source}\n{format_table(before, after, source)}\n")
    if _RUNS.value and _PNG.value:
        plot_curves([pathlib.Path(run) for run in _RUNS.value], pathlib.Path(_PNG.value))
        print(f"training curves: {_PNG.value}")


def read_outcomes(folder: pathlib.Path) -> list[Outcome]:
    """Return the outcomes of the episodes of an evaluation.

    Raises:
      DataError, OSError: The results cannot be read.
    """
    return [records.to_outcome(line) for _, _, line in records.scan(folder / records.EPISODES)]


def format_table(before: Sequence[Outcome], after: Sequence[Sequence[Outcome]], source: str) -> str:
    """Format a table of metrics by workflow for one source of questions, with a summary.

    Args:
      before: Outcomes of the policy before training.
      after: Outcomes of each trained policy.
      source: Source of the questions.

    Raises:
      UserError: `before` or one of `after` has no episodes of a workflow, or one of `after` has no
        episodes of a category that `before` has.
    """
    rows = {
        "direct": [_metrics(outcomes, source, "direct") for outcomes in after],
        "forced search": [_metrics(outcomes, source, "rag") for outcomes in after],
        "on demand, before": [_metrics(before, source, "on_demand")],
        "on demand, after": [_metrics(outcomes, source, "on_demand") for outcomes in after],
    }
    if any(outcome.workflow == "agent" for outcome in itertools.chain(*after)):
        rows["agent"] = [_metrics(outcomes, source, "agent") for outcomes in after]
    categories = sorted(rows["on demand, before"][0]["by_category"])
    head = ["workflow", "correct", "searches/question", "search", *categories]
    cells = [_row(name, policies, categories, source) for name, policies in rows.items()]
    lines = [
        align_columns([head, *cells]),
        "by category: correct / episodes that search, in percent",
        _gain_summary(after, rows, source),
    ]
    if NO_SEARCH in categories:
        lines.append(_search_summary(after, source, categories))
    return "\n".join(lines)


def _row(
    name: str, policies: Sequence[Metrics], categories: Sequence[str], source: str
) -> list[str]:
    """Return the cells of a row: means over policies, of all questions and of each category."""
    for metrics, category in itertools.product(policies, categories):
        if category not in metrics["by_category"]:
            raise UserError(
                f"{name}: no episodes of --after about questions of {source!r} of the category "
                f"{category!r}, which --before has"
            )
    groups = [[m["by_category"][category] for m in policies] for category in categories]
    return [
        name,
        _percent(_accuracy(policies)),
        _decimal(_searches(policies)),
        _percent(_search_rate(policies)),
        *(f"{_percent(_accuracy(group))} / {_percent(_search_rate(group))}" for group in groups),
    ]


def _gain_summary(
    after: Sequence[Sequence[Outcome]], rows: dict[str, list[Metrics]], source: str
) -> str:
    """Compare on-demand with forced search: accuracy and number of searches."""
    outcomes = [outcome for outcome in itertools.chain(*after) if outcome.source == source]
    on_demand, rag = ([o for o in outcomes if o.workflow == w] for w in ("on_demand", "rag"))
    comparison = compare(on_demand, rag, "em")
    low, high = comparison["interval"]
    text = f"on demand, after, against forced search: {100 * comparison['difference']:+.1f} points"
    made, forced = _searches(rows["on demand, after"]), _searches(rows["forced search"])
    if forced and made is not None:
        text += f" with {_percent(made / forced)} % of the searches"
    return f"{text}; 95 % interval: {100 * low:+.1f} to {100 * high:+.1f} points"


def _search_summary(
    after: Sequence[Sequence[Outcome]], source: str, categories: Sequence[str]
) -> str:
    """Say how many on-demand episodes search, for questions that do and do not need it."""
    rates = {
        "need it": _on_demand_search_rate(after, source, set(categories) - {NO_SEARCH}),
        "do not": _on_demand_search_rate(after, source, {NO_SEARCH}),
    }
    return "episodes that search: " + ", ".join(
        f"{_percent(rate)} % of questions that {name}"
        for name, rate in rates.items()
        if rate is not None
    )


def plot_curves(runs: Sequence[pathlib.Path], file: pathlib.Path) -> None:
    """Plot the training curves of several runs in the same panels, and save the figure."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    steps_of_runs = [read_metrics(run / "metrics.jsonl") for run in runs]
    category_curves = sorted(
        {name for step in steps_of_runs[0] for name in step if name.startswith(_CATEGORY_PREFIX)}
    )
    curves = _CURVES | {"episodes that search, by category": category_curves}
    figure, panels = pyplot.subplots(1, len(curves), figsize=(15, 4.2), layout="constrained")
    for panel, (title, names) in zip(panels, curves.items(), strict=True):
        for color, name in enumerate(names):
            for run, steps in enumerate(steps_of_runs):
                points = [(step["step"], step[name]) for step in steps if name in step]
                label = name.rpartition("/")[2] if run == 0 else None
                panel.plot(*zip(*points, strict=True), color=f"C{color}", alpha=0.8, label=label)
        panel.set(title=title, xlabel="step", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    with outputs.new_file(file) as partial:
        figure.savefig(partial, dpi=100, format=file.suffix[1:] or "png")


def _metrics(outcomes: Sequence[Outcome], source: str, workflow: str) -> Metrics:
    selected = [o for o in outcomes if o.source == source and o.workflow == workflow]
    if not selected:
        raise UserError(f"no episodes of {workflow} about questions of {source!r}")
    return compute_metrics(selected)


def _on_demand_search_rate(
    after: Sequence[Sequence[Outcome]], source: str, categories: set[str]
) -> float | None:
    """Return the fraction of on-demand episodes that search, for questions of some categories."""
    return _mean(
        outcome.searches > 0
        for outcome in itertools.chain(*after)
        if outcome.source == source and outcome.workflow == "on_demand"
        and outcome.category in categories and outcome.end != "error"
    )  # fmt: skip


def _accuracy(policies: Sequence[Metrics]) -> float | None:
    return _mean(metrics["accuracy"]["em"]["mean"] for metrics in policies)


def _searches(policies: Sequence[Metrics]) -> float | None:
    return _mean(metrics["searches"]["per_episode"] for metrics in policies)


def _search_rate(policies: Sequence[Metrics]) -> float | None:
    return _mean(metrics["searches"]["episode_fraction"] for metrics in policies)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if there are no values or one is None (no episode could be run)."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(known) else None


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    _BEFORE = flags.DEFINE_string(
        "before", None, "results of the policy before training", required=True
    )
    _AFTER = flags.DEFINE_list("after", None, "results of the trained policies", required=True)
    _RUNS = flags.DEFINE_list("runs", [], "runs whose training curves are plotted")
    _PNG = flags.DEFINE_string("png", None, "file for the curves")
    cli.run(main)
