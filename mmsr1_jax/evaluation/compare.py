"""Two workflows or two policies on the same questions, side by side."""

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
    """The probability of pairs that differ as unevenly, or more, if neither is better: exact and
    two-sided (McNemar 1947, by the binomial distribution with p = 1/2).

    Args:
      only_a, only_b: questions that only the one, or only the other, has right.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def compare(a: Sequence[Outcome], b: Sequence[Outcome], match: str) -> dict[str, Any]:
    """Compares two sets of episodes, question by question.

    Args:
      a, b: each of one workflow. Questions are the same where source, id and text are.
      match: one of `figures.MATCHES`.

    Returns:
      `questions`: in both, with a verdict; `left_out`: in one of them only, or without a verdict;
      `accuracy`: [of a, of b]; `difference`: of a from b, with its `interval` over questions, see
      `figures.interval`; `right`: questions by who has them right, `both`, `only_a`, `only_b`,
      `neither`, and `p`, see `mcnemar`: both None where questions have several episodes, and by
      `score`.

    Raises:
      ValueError: no question is in both.
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
    """Each two workflows compared, as far as they have questions in common."""
    found = []
    for a, b in itertools.combinations(by_workflow, 2):
        try:
            found.append({"a": a, "b": b, **compare(by_workflow[a], by_workflow[b], match)})
        except ValueError:
            continue
    return found


def _rights(outcomes: Sequence[Outcome], match: str) -> dict[tuple, list[float]]:
    """Whether the episodes of each question are right; one that comes twice is two questions."""
    numbers: dict[tuple, dict[int, int]] = {}
    found: dict[tuple, list[float]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: (outcome.number, outcome.sample)):
        name = (outcome.source, outcome.id, outcome.question)
        seen = numbers.setdefault(name, {})
        place = seen.setdefault(outcome.number, len(seen))
        rights = found.setdefault((*name, place), [])
        if outcome.right[match] is not None:
            rights.append(outcome.right[match])
    return found


def compare_files(names: Sequence[str]) -> str:
    """Two evaluations compared question by question, a line for each match that both have.

    Args:
      names: two directories of results, each with `:workflow`, or neither: then each workflow is
        compared that both have.

    Raises:
      ValueError: not two, no such workflow, or no question in common.
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
    """(DIR, workflow) of `DIR:workflow`, (DIR, "") of `DIR`, in which colons may be, too."""
    folder, _, workflow = name.rpartition(":")
    known = workflow in (*WORKFLOWS, records.RECORDED)
    return (folder, workflow) if folder and known else (name, "")


def _outcomes(folder: str, workflow: str) -> dict[str, list[Outcome]]:
    """By workflow, those of a directory of results; of all workflows where `workflow` is empty."""
    path = pathlib.Path(folder)
    found: dict[str, list[Outcome]] = {}
    for _, _, line in records.scan(path / records.EPISODES if path.is_dir() else path):
        if workflow in ("", line["workflow"]):
            found.setdefault(line["workflow"], []).append(records.outcome_of(line))
    if not found:
        raise ValueError(f"{folder}: no episode of {workflow or 'any workflow'}")
    return found
