"""Paired comparison of two workflows or two policies on the same questions."""

import collections
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.metrics import MATCHES, Outcome, interval
from mmsr1_jax.evaluation.table import compared
from mmsr1_jax.evaluation.workflows import WORKFLOWS


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


def compare(a: Sequence[Outcome], b: Sequence[Outcome], match: str) -> dict[str, Any]:
    """Compare two sets of episodes, question by question.

    Args:
      a, b: Outcomes of one workflow each. Questions are paired by source, id and text.
      match: One of `metrics.MATCHES`.

    Returns:
      A dict with these keys:
        `match`: The argument.
        `questions`: Number of questions that both sides have, with a verdict.
        `left_out`: Number of questions that only one side has, or without a verdict.
        `accuracy`: [accuracy of a, accuracy of b].
        `difference`: Accuracy of a minus accuracy of b.
        `interval`: Confidence interval of the difference over questions, see `metrics.interval`.
        `right`: Number of questions that `both`, `only_a`, `only_b` or `neither` answers correctly.
        `p`: p-value, see `mcnemar`. `right` and `p` are None if any question has several episodes,
          and for `match="score"`.

    Raises:
      ValueError: The two sides have no question in common.
    """
    of_a, of_b = _rights(a, match), _rights(b, match)
    shared = [key for key in of_a if key in of_b and of_a[key] and of_b[key]]
    if not shared:
        raise ValueError(f"no question is in both, with a verdict by {match!r}")
    pairs = [(of_a[key], of_b[key]) for key in shared]
    shares = np.array([[np.mean(x), np.mean(y)] for x, y in pairs])
    difference = shares[:, 0] - shares[:, 1]
    right = p = None
    if match != "score" and all(len(x) == len(y) == 1 for x, y in pairs):
        count = collections.Counter((x[0], y[0]) for x, y in pairs)
        right = {
            "both": count[True, True], "only_a": count[True, False],
            "only_b": count[False, True], "neither": count[False, False],
        }  # fmt: skip
        p = mcnemar(right["only_a"], right["only_b"])
    return {
        "match": match,
        "questions": len(shared),
        "left_out": len(of_a.keys() | of_b.keys()) - len(shared),
        "accuracy": [float(x) for x in shares.mean(axis=0)],
        "difference": float(difference.mean()),
        "interval": interval(difference, bounds=(-1.0, 1.0)),
        "right": right,
        "p": p,
    }


def pairs_of(by_workflow: Mapping[str, Sequence[Outcome]], match: str) -> list[dict[str, Any]]:
    """Compare each pair of workflows that have questions in common."""
    found = []
    for a, b in itertools.combinations(by_workflow, 2):
        try:
            found.append({"a": a, "b": b, **compare(by_workflow[a], by_workflow[b], match)})
        except ValueError:
            continue
    return found


def _rights(outcomes: Sequence[Outcome], match: str) -> dict[tuple, list[float]]:
    """Group the episodes' correctness by question. A duplicate row counts as its own question."""
    numbers: dict[tuple, dict[int, int]] = {}
    found: dict[tuple, list[float]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.index, outcome.sample)):
        name = (outcome.source, outcome.id, outcome.question)
        seen = numbers.setdefault(name, {})
        place = seen.setdefault(outcome.index, len(seen))
        rights = found.setdefault((*name, place), [])
        if outcome.right[match] is not None:
            rights.append(outcome.right[match])
    return found


def compare_files(names: Sequence[str]) -> str:
    """Compare two evaluations question by question; return one line for each metric of both.

    Args:
      names: Two directories of results, each with `:workflow`. Without workflows, each workflow
        that both evaluations have is compared.

    Raises:
      ValueError: The number of names is not two, a workflow does not exist, or the evaluations have
        no question in common.
    """
    if len(names) != 2:
        raise ValueError(f"--compare: two directories are needed, not {len(names)}")
    parted = [_parted(name) for name in names]
    sides = [_outcomes(*one) for one in parted]
    pairs = list(itertools.product(*sides))
    if not all(workflow for _, workflow in parted):
        pairs = [(name, name) for name in sides[0] if name in sides[1]]
    if not pairs:
        raise ValueError(f"--compare: no workflow is in both, {' and '.join(names)}")
    said = []
    for a, b in pairs:
        for match in MATCHES:
            outcomes = sides[0][a], sides[1][b]
            if all(any(o.right[match] is not None for o in side) for side in outcomes):
                found = compare(*outcomes, match)
                (a_folder, _), (b_folder, _) = parted
                a_name, b_name = f"{a_folder}:{a}", f"{b_folder}:{b}"
                said.append(compared({"a": a_name, "b": b_name, **found}))
    return "\n".join(said)


def _parted(name: str) -> tuple[str, str]:
    """Split `DIR:workflow` into (DIR, workflow), and `DIR` into (DIR, ""). DIR may have colons."""
    folder, _, workflow = name.rpartition(":")
    known = workflow in (*WORKFLOWS, records.RECORDED)
    return (folder, workflow) if folder and known else (name, "")


def _outcomes(folder: str, workflow: str) -> dict[str, list[Outcome]]:
    """Read the outcomes in a directory by workflow; an empty `workflow` selects all workflows."""
    path = pathlib.Path(folder)
    found: dict[str, list[Outcome]] = {}
    for _, _, line in records.scan(path / records.EPISODES if path.is_dir() else path):
        if workflow in ("", line["workflow"]):
            found.setdefault(line["workflow"], []).append(records.outcome_of(line))
    if not found:
        raise ValueError(f"{folder}: no episode of {workflow or 'any workflow'}")
    return found
