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
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from mmsr1_jax import cli
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.compare import compare
from mmsr1_jax.evaluation.metrics import Outcome, figures
from mmsr1_jax.evaluation.table import aligned
from mmsr1_jax.training import metrics
from mmsr1_jax.utils import outputs

NEEDLESS = "free"  # category of questions that need no search (`data/tiny_world/world.py`)
_OF = "search_by_category/"  # prefix of the metrics of a category
_CURVES = {
    "reward and accuracy": ("reward", "accuracy"),
    "episodes that search": ("search/any", "search/text", "search/image", "search/both"),
}


def main(argv) -> None:
    del argv
    try:
        before = outcomes(pathlib.Path(_BEFORE.value))
        after = [outcomes(pathlib.Path(name)) for name in _AFTER.value]
        for source in sorted({outcome.source for outcome in before}):
            print(f"{source}\n{table(before, after, source)}\n")
        if _RUNS.value and _PNG.value:
            draw([pathlib.Path(run) for run in _RUNS.value], pathlib.Path(_PNG.value))
            print(f"{_PNG.value}: the curves")
    except (ValueError, OSError) as error:  # missing or inconsistent results
        sys.exit(f"error: {error}")


def outcomes(folder: pathlib.Path) -> list[Outcome]:
    """Return the outcomes of the episodes of an evaluation.

    Raises:
      DataError, OSError: The results cannot be read.
    """
    return [records.outcome_of(line) for _, _, line in records.scan(folder / records.EPISODES)]


def table(before: Sequence[Outcome], after: Sequence[Sequence[Outcome]], source: str) -> str:
    """Format a table of metrics by workflow for one source of questions, with a summary.

    Args:
      before: Outcomes of the policy before training.
      after: Outcomes of each trained policy.
      source: Source of the questions.

    Raises:
      ValueError: `before` or one of `after` has no episodes of a workflow, or one of `after` has no
        episodes of a category that `before` has.
    """
    rows = {
        "direct": [_of(one, source, "direct") for one in after],
        "forced search": [_of(one, source, "rag") for one in after],
        "on demand, before": [_of(before, source, "on_demand")],
        "on demand, after": [_of(one, source, "on_demand") for one in after],
    }
    if any(outcome.workflow == "agent" for outcome in itertools.chain(*after)):
        rows["agent"] = [_of(one, source, "agent") for one in after]
    categories = sorted(rows["on demand, before"][0]["by_category"])
    head = ["workflow", "right", "searches a question", "search", *categories]
    body = []
    for name, found in rows.items():
        for one, category in itertools.product(found, categories):
            if category not in one["by_category"]:
                raise ValueError(
                    f"{name}: no episodes of --after about questions of {source!r} of the category "
                    f"{category!r}, which --before has"
                )
        parts = [[one["by_category"][category] for one in found] for category in categories]
        body.append([
            name,
            _percent(_right(found)),
            _decimal(_searches(found)),
            _percent(_share(found)),
            *(f"{_percent(_right(part))} / {_percent(_share(part))}" for part in parts),
        ])  # fmt: skip
    text = aligned([head, *body]) + "\nof a category: right / episodes that search, in percent"
    gain, (low, high) = _gain(after, source)
    text += f"\non demand, after, against forced search: {100 * gain:+.1f} points"
    made, forced = _searches(rows["on demand, after"]), _searches(rows["forced search"])
    if forced and made is not None:
        text += f" with {_percent(made / forced)} % of the searches"
    text += f"; 95 % interval: {100 * low:+.1f} to {100 * high:+.1f} points"
    if NEEDLESS in categories:
        share = {
            "need it": _searching(after, source, [c for c in categories if c != NEEDLESS]),
            "do not": _searching(after, source, [NEEDLESS]),
        }
        text += "\nepisodes that search: " + ", ".join(
            f"{_percent(part)} % of questions that {name}"
            for name, part in share.items()
            if part is not None
        )
    return text


def draw(runs: Sequence[pathlib.Path], file: pathlib.Path) -> None:
    """Plot the training curves of several runs in the same panels, and save the figure."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    found = [metrics.read(run / "metrics.jsonl") for run in runs]
    of_categories = sorted({name for step in found[0] for name in step if name.startswith(_OF)})
    curves = _CURVES | {"episodes that search, by category": of_categories}
    figure, panels = pyplot.subplots(1, len(curves), figsize=(15, 4.2), layout="constrained")
    for panel, (title, names) in zip(panels, curves.items(), strict=True):
        for place, name in enumerate(names):
            for number, steps in enumerate(found):
                points = [(step["step"], step[name]) for step in steps if name in step]
                label = name.rpartition("/")[2] if number == 0 else None
                panel.plot(*zip(*points, strict=True), color=f"C{place}", alpha=0.8, label=label)
        panel.set(title=title, xlabel="step", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    with outputs.new_file(file) as partial:
        figure.savefig(partial, dpi=100, format=file.suffix[1:] or "png")


def _of(found: Sequence[Outcome], source: str, workflow: str) -> dict[str, Any]:
    chosen = [o for o in found if o.source == source and o.workflow == workflow]
    if not chosen:
        raise ValueError(f"no episodes of {workflow} about questions of {source!r}")
    return figures(chosen)


def _gain(after: Sequence[Sequence[Outcome]], source: str) -> tuple[float, list[float]]:
    """Return the accuracy gain of on-demand over forced search, and its confidence interval."""
    chosen = [outcome for outcome in itertools.chain(*after) if outcome.source == source]
    workflows = ([o for o in chosen if o.workflow == name] for name in ("on_demand", "rag"))
    found = compare(*workflows, "em")
    return found["difference"], found["interval"]


def _searching(
    after: Sequence[Sequence[Outcome]], source: str, categories: Sequence[str]
) -> float | None:
    """Return the fraction of on-demand episodes that search, for questions of some categories."""
    return _mean(
        outcome.searches > 0
        for outcome in itertools.chain(*after)
        if outcome.source == source and outcome.workflow == "on_demand"
        and outcome.category in categories and outcome.end != "error"
    )  # fmt: skip


def _right(found: Sequence[dict[str, Any]]) -> float | None:
    return _mean(one["accuracy"]["em"]["mean"] for one in found)


def _searches(found: Sequence[dict[str, Any]]) -> float | None:
    return _mean(one["searches"]["an_episode"] for one in found)


def _share(found: Sequence[dict[str, Any]]) -> float | None:
    return _mean(one["searches"]["share"] for one in found)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if there are no values or one is None (no episode could be run)."""
    values = list(values)
    return None if not values or None in values else statistics.fmean(values)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    _BEFORE = flags.DEFINE_string("before", None, "results of the policy before", required=True)
    _AFTER = flags.DEFINE_list("after", None, "results of policies after training", required=True)
    _RUNS = flags.DEFINE_list("runs", [], "runs whose curves are drawn")
    _PNG = flags.DEFINE_string("png", None, "file for the curves")
    cli.run(main)
