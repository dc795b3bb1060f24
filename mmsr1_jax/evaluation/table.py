"""Evaluation results as a text table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {"em": "EM", "subem": "SubEM", "judge": "judge", "score": "its score"}


def table(results: Mapping[str, Any]) -> str:
    """Format the results of an evaluation.

    Args:
      results: Results as written to `results.json` by `evaluate`.

    Returns:
      Lines of text: a table with one row for each workflow; if questions have categories, a table
      with the accuracy, share of episodes that search and number of questions of each category;
      then the number of failed verdicts, what was scored for answers about documents, and the
      comparisons.
    """
    workflows = results["workflows"]
    matches = [m for m in _NAMES if any(m in one["accuracy"] for one in workflows.values())]
    head = ["workflow", *(f"right by {_NAMES[m]} [95 %]" for m in matches)]
    head += ["searches a question", "made/allowed", "episodes that search", "turns", "tokens"]
    rows = []
    for name, one in workflows.items():
        made = one["searches"]
        rows.append([
            name,
            *(_with_interval(one["accuracy"].get(m)) for m in matches),
            _decimal(made["an_episode"], 2),
            _percent(made["made_of_allowed"]),
            _percent(made["share"]),
            _decimal(one["turns"], 2),
            _decimal(one["tokens"], 0),
        ])  # fmt: skip
    text = aligned([head, *rows])
    categories = sorted({c for one in workflows.values() for c in one["by_category"]})
    if categories:
        match = main_match(results)
        head = ["by category", *categories]
        rows = []
        for name, one in workflows.items():
            parts = [one["by_category"].get(category) for category in categories]
            rows.append([name, *(_of_category(part, match) for part in parts)])
        text += f"\n\n{aligned([head, *rows])}\n"
        text += f"right by {_NAMES[match]} / episodes that search, of so many questions"
    if results.get("no_verdict"):
        text += f"\nof {results['no_verdict']} answers the judge said nothing: --rescore asks again"
    if "scored" in results:
        text += f"\n{_NAMES['score']} is of: {results['scored']}"
    if results.get("no_extraction"):
        text += f"\n{results['no_extraction']} answers have no score, as the judge's server failed "
        text += "to bring them into a short form: --rescore asks again"
    if results.get("pages_left_out", {}).get("pages"):
        left_out = results["pages_left_out"]
        text += f"\n{left_out['pages']} pages of {left_out['questions']} questions were left out: "
        text += "they do not fit into eval.page_tokens"
    for pair in results.get("comparisons", ()):
        text += f"\n{compared(pair)}"
    return text


def compared(pair: Mapping[str, Any]) -> str:
    """Format a comparison (`compare.compare`, with the names `a` and `b`) as one line."""
    low, high = pair["interval"]
    line = (
        f"{pair['a']} - {pair['b']}: {100 * pair['difference']:+.1f} "
        f"[{100 * low:+.1f}, {100 * high:+.1f}] by {_NAMES[pair['match']]}, "
        f"{pair['questions']} questions"
    )
    if pair["p"] is not None:
        right = pair["right"]
        line += f", {right['only_a']} against {right['only_b']}, p = {pair['p']:.2g}"
    if pair["left_out"]:
        line += f"; {pair['left_out']} questions left out: in only one of them, or not judged"
    return line


def main_match(results: Mapping[str, Any]) -> str:
    """Return the main metric: the first available of benchmark score, judge and exact match."""
    found = {match for one in results["workflows"].values() for match in one["accuracy"]}
    return next(match for match in ("score", "judge", "em") if match in found)


def _of_category(part: Mapping[str, Any] | None, match: str) -> str:
    if part is None:
        return "-"
    right = part["accuracy"].get(match)
    share = _percent(part["searches"]["share"])
    return f"{_percent(right and right['mean'])} / {share} of {part['questions']}"


def _with_interval(right: Mapping[str, Any] | None) -> str:
    if right is None or right["mean"] is None:
        return "-"
    low, high = right["interval"]
    missing = f", {right['no_verdict']} open" if right["no_verdict"] else ""
    return f"{100 * right['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]{missing}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _decimal(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align rows into columns: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
