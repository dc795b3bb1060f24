"""Evaluation results as a text table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_CRITERIA = {"em": "EM", "subem": "SubEM", "judge": "judge", "score": "benchmark score"}


def format_results(results: Mapping[str, Any]) -> str:
    """Format the results of an evaluation.

    Args:
      results: Results as written to `results.json` by `evaluate`.

    Returns:
      Lines of text: a table with one row for each workflow; if questions have categories, a table
      with the accuracy, fraction of episodes that search and number of questions of each category;
      then notes on missing verdicts and scores, and the comparisons.
    """
    text = _workflow_table(results)
    if any(metrics["by_category"] for metrics in results["workflows"].values()):
        text += f"\n\n{_category_table(results)}"
    lines = [text, *_notes(results)]
    lines += [format_comparison(pair) for pair in results.get("comparisons", ())]
    return "\n".join(lines)


def _workflow_table(results: Mapping[str, Any]) -> str:
    workflows = results["workflows"]
    criteria = [c for c in _CRITERIA if any(c in m["accuracy"] for m in workflows.values())]
    head = ["workflow", *(f"correct by {_CRITERIA[c]} [95 %]" for c in criteria)]
    head += ["searches/question", "made/allowed", "episodes that search", "turns", "tokens"]
    rows = []
    for name, metrics in workflows.items():
        searches = metrics["searches"]
        rows.append([
            name,
            *(_with_interval(metrics["accuracy"].get(c)) for c in criteria),
            _decimal(searches["per_episode"], 2),
            _percent(searches["fraction_of_allowed"]),
            _percent(searches["episode_fraction"]),
            _decimal(metrics["turns"], 2),
            _decimal(metrics["tokens"], 0),
        ])  # fmt: skip
    return align_columns([head, *rows])


def _category_table(results: Mapping[str, Any]) -> str:
    workflows = results["workflows"]
    categories = sorted({c for metrics in workflows.values() for c in metrics["by_category"]})
    criterion = main_criterion(results)
    rows = [["by category", *categories]]
    for name, metrics in workflows.items():
        groups = [metrics["by_category"].get(category) for category in categories]
        rows.append([name, *(_category_cell(group, criterion) for group in groups)])
    legend = f"correct by {_CRITERIA[criterion]} / episodes that search, of number of questions"
    return f"{align_columns(rows)}\n{legend}"


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = []
    if results.get("no_verdict"):
        notes.append(f"{results['no_verdict']} answers have no verdict; --rescore retries them")
    if "scored" in results:
        notes.append(f"the {_CRITERIA['score']} is computed from {results['scored']}")
    if results.get("no_extraction"):
        notes.append(
            f"{results['no_extraction']} answers have no score, because the judge's server did not "
            "extract their short form; --rescore retries them"
        )
    dropped = results.get("omitted_pages", {})
    if dropped.get("pages"):
        notes.append(
            f"{dropped['pages']} pages of {dropped['questions']} questions were dropped, because "
            "they exceed eval.page_tokens"
        )
    return notes


def format_comparison(pair: Mapping[str, Any]) -> str:
    """Format a comparison (`compare.compare`, with the names `a` and `b`) as one line."""
    low, high = pair["interval"]
    line = (
        f"{pair['a']} - {pair['b']}: {100 * pair['difference']:+.1f} "
        f"[{100 * low:+.1f}, {100 * high:+.1f}] by {_CRITERIA[pair['criterion']]}, "
        f"{pair['questions']} questions"
    )
    if pair["p"] is not None:
        correct = pair["correct"]
        line += f", {correct['only_a']} against {correct['only_b']}, p = {pair['p']:.2g}"
    if pair["skipped"]:
        line += f"; skipped {pair['skipped']} questions that only one side has or are not judged"
    return line


def main_criterion(results: Mapping[str, Any]) -> str:
    """Return the first available of benchmark score, judge and exact match."""
    available = {c for metrics in results["workflows"].values() for c in metrics["accuracy"]}
    return next(c for c in ("score", "judge", "em") if c in available)


def _category_cell(group: Mapping[str, Any] | None, criterion: str) -> str:
    if group is None:
        return "-"
    accuracy = group["accuracy"].get(criterion)
    correct = _percent(accuracy and accuracy["mean"])
    searching = _percent(group["searches"]["episode_fraction"])
    return f"{correct} / {searching} of {group['questions']}"


def _with_interval(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None or accuracy["mean"] is None:
        return "-"
    low, high = accuracy["interval"]
    missing = f", {accuracy['no_verdict']} not judged" if accuracy["no_verdict"] else ""
    return f"{100 * accuracy['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]{missing}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Align rows into columns: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
