"""Shows what training changed: a table of workflows, and curves as a PNG.

    python -m mmsr1_jax.scripts.demo --before=OUT --after=OUT[,OUT ..] \\
        --runs=RUN[,RUN ..] --png=FILE

OUT is a directory of `evaluate`, of the policy before training and of those after it (runs that
differ in their seed, say: figures are means over them). A line of the table is a workflow, a column
a category of questions; each source of questions has a table of its own. A RUN is a directory of
`train`.
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

NEEDLESS = "free"  # the category of questions that need no search (`data/tiny_world/world.py`)
_OF = "search_of/"  # of a category
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
    except (ValueError, OSError) as error:  # no such results, or others
        sys.exit(f"error: {error}")


def outcomes(folder: pathlib.Path) -> list[Outcome]:
    """What came of the episodes of an evaluation. Raises DataError, OSError."""
    return [records.outcome_of(line) for _, _, line in records.scan(folder / records.EPISODES)]


def table(before: Sequence[Outcome], after: Sequence[Sequence[Outcome]], source: str) -> str:
    """Workflows by what they reach with the questions of a source, and what that says.

    Args:
      before: of the policy before training.
      after: of each trained policy.

    Raises:
      ValueError: one of `after` has no episodes of a workflow, or of a category of `before`.
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
    """Draws the curves of some runs, one over the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no window
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
    """How much more is right on demand than by forced search, and its interval over questions."""
    chosen = [outcome for outcome in itertools.chain(*after) if outcome.source == source]
    workflows = ([o for o in chosen if o.workflow == name] for name in ("on_demand", "rag"))
    found = compare(*workflows, "em")
    return found["difference"], found["interval"]


def _searching(
    after: Sequence[Sequence[Outcome]], source: str, categories: Sequence[str]
) -> float | None:
    """Share of the episodes on demand that search, of questions of some categories."""
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
    """None where there are none, or one of them is None: of a policy no episode could be run."""
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
