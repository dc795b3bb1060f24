"""Paired comparison of two workflows or two policies on the same questions."""

import collections
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.metrics import CRITERIA, Outcome, confidence_interval
from mmsr1_jax.evaluation.table import format_comparison
from mmsr1_jax.evaluation.workflows import WORKFLOWS


class ComparisonError(UserError):
    """Evaluations that cannot be compared; the message gives the reason."""


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947).

    The null hypothesis is that neither side is better: discordant pairs follow a binomial
    distribution with p = 1/2.

    Args:
      only_a, only_b: Number of questions that only one side answers correctly.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(a: Sequence[Outcome], b: Sequence[Outcome], criterion: str) -> dict[str, Any]:
    """Compare two sets of episodes, question by question.

    Args:
      a, b: Outcomes of one workflow each. Questions are paired by source, id and text.
      criterion: One of `metrics.CRITERIA`.

    Returns:
      A dict with these keys:
        `criterion`: The argument.
        `questions`: Number of questions that both sides have, with a verdict.
        `skipped`: Number of questions that only one side has, or without a verdict.
        `accuracy`: [accuracy of a, accuracy of b].
        `difference`: Accuracy of a minus accuracy of b.
        `interval`: Confidence interval of the difference over questions, see
          `metrics.confidence_interval`.
        `correct`: Number of questions that `both`, `only_a`, `only_b` or `neither` answers
          correctly.
        `p`: p-value, see `mcnemar`. `correct` and `p` are None if any question has several
          episodes, and for `criterion="score"`.

    Raises:
      ComparisonError: The two sides have no question in common.
    """
    correct_a, correct_b = _group_by_question(a, criterion), _group_by_question(b, criterion)
    shared = [key for key, values in correct_a.items() if values and correct_b.get(key)]
    if not shared:
        raise ComparisonError(f"the two sides have no judged question in common, by {criterion!r}")
    pairs = [(correct_a[key], correct_b[key]) for key in shared]
    accuracies = np.array([[np.mean(x), np.mean(y)] for x, y in pairs])
    differences = accuracies[:, 0] - accuracies[:, 1]
    counts = p = None
    if criterion != "score" and all(len(x) == len(y) == 1 for x, y in pairs):
        outcomes = collections.Counter((x[0], y[0]) for x, y in pairs)
        counts = {
            "both": outcomes[True, True], "only_a": outcomes[True, False],
            "only_b": outcomes[False, True], "neither": outcomes[False, False],
        }  # fmt: skip
        p = mcnemar(counts["only_a"], counts["only_b"])
    return {
        "criterion": criterion,
        "questions": len(shared),
        "skipped": len(correct_a.keys() | correct_b.keys()) - len(shared),
        "accuracy": [float(x) for x in accuracies.mean(axis=0)],
        "difference": float(differences.mean()),
        "interval": confidence_interval(differences, bounds=(-1.0, 1.0)),
        "correct": counts,
        "p": p,
    }


def compare_workflows(
    by_workflow: Mapping[str, Sequence[Outcome]], criterion: str
) -> list[dict[str, Any]]:
    """Compare each pair of workflows that have questions in common."""
    comparisons = []
    for a, b in itertools.combinations(by_workflow, 2):
        try:
            result = compare(by_workflow[a], by_workflow[b], criterion)
        except ComparisonError:
            continue
        comparisons.append({"a": a, "b": b, **result})
    return comparisons


def _group_by_question(
    outcomes: Sequence[Outcome], criterion: str
) -> dict[tuple[str | int, ...], list[float]]:
    """Group the episodes' correctness by question. A duplicate row counts as its own question."""
    row_numbers: dict[tuple[str, ...], dict[int, int]] = {}
    groups: dict[tuple[str | int, ...], list[float]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.index, outcome.sample)):
        question = (outcome.source, outcome.id, outcome.question)
        rows = row_numbers.setdefault(question, {})
        row = rows.setdefault(outcome.index, len(rows))
        group = groups.setdefault((*question, row), [])
        value = outcome.correct[criterion]
        if value is not None:
            group.append(value)
    return groups


def compare_files(names: Sequence[str]) -> str:
    """Compare two evaluations question by question; return one line for each criterion of both.

    Args:
      names: Two directories of results, each with `:workflow`. Without workflows, each workflow
        that both evaluations have is compared.

    Raises:
      UserError: The number of names is not two, a workflow does not exist, or the evaluations have
        no question in common.
    """
    if len(names) != 2:
        raise ComparisonError(f"--compare: must name two directories, not {len(names)}")
    sides = [_split_name(name) for name in names]
    outcomes = [_read_outcomes(folder, workflow) for folder, workflow in sides]
    pairs = list(itertools.product(*outcomes))
    if not all(workflow for _, workflow in sides):
        pairs = [(name, name) for name in outcomes[0] if name in outcomes[1]]
    if not pairs:
        raise ComparisonError(f"--compare: {' and '.join(names)} have no workflow in common")
    lines = []
    for workflow_a, workflow_b in pairs:
        a, b = outcomes[0][workflow_a], outcomes[1][workflow_b]
        for criterion in CRITERIA:
            if all(any(o.correct[criterion] is not None for o in side) for side in (a, b)):
                (folder_a, _), (folder_b, _) = sides
                labels = {"a": f"{folder_a}:{workflow_a}", "b": f"{folder_b}:{workflow_b}"}
                lines.append(format_comparison({**labels, **compare(a, b, criterion)}))
    return "\n".join(lines)


def _split_name(name: str) -> tuple[str, str]:
    """Split `DIR:workflow` into (DIR, workflow), and `DIR` into (DIR, ""). DIR may have colons."""
    folder, _, workflow = name.rpartition(":")
    is_workflow = workflow in (*WORKFLOWS, records.RECORDED)
    return (folder, workflow) if folder and is_workflow else (name, "")


def _read_outcomes(folder: str, workflow: str) -> dict[str, list[Outcome]]:
    """Read the outcomes in a directory by workflow; an empty `workflow` selects all workflows."""
    path = pathlib.Path(folder)
    by_workflow: dict[str, list[Outcome]] = {}
    for _, _, line in records.scan(path / records.EPISODES if path.is_dir() else path):
        if workflow in ("", line["workflow"]):
            by_workflow.setdefault(line["workflow"], []).append(records.to_outcome(line))
    if not by_workflow:
        raise ComparisonError(f"{folder}: no episode of {workflow or 'any workflow'}")
    return by_workflow
