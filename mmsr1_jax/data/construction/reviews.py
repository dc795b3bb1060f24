"""Decisions of people about constructed questions, and their agreement.

A file of decisions is what `review.html` saves, one per person:

    {"reviewer": "Ann", "decisions": {ID: {"verdict": "accept"}}}

A verdict is `accept`, `reject`, or `edit` with the fields `question` and `answer`. A question is
accepted if more people accept or edit it than reject it. Its text is the one that most of them
chose; an edit counts before the original if they are tied. Questions with as many votes for as
against are listed as disagreements and left out, until another person decides.
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

from mmsr1_jax.config.errors import UserError
from mmsr1_jax.data.parquet import Question, write_parquet
from mmsr1_jax.data.questions import QuestionSource
from mmsr1_jax.utils import checked_json

Verdict = Literal["accept", "edit", "reject"]
_MAX_TEXT = 2000  # characters of an edited question or answer
_MAX_LISTED = 20  # disagreements that are printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """A person's decision about a question.

    Attributes:
      verdict: Verdict.
      question, answer: Edited text, for the verdict `edit`.
    """

    verdict: Verdict
    question: str = ""
    answer: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """Decisions of one person, keyed by the ID of the question."""

    reviewer: str
    decisions: dict[str, Decision]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of several reviews.

    Attributes:
      num_accepted: Number of accepted questions, of which `num_edited` are edited.
      num_rejected: Number of rejected questions.
      num_open: Number of questions that nobody decided on.
      disagreements: IDs of tied questions.
      kappas: Cohen's kappa of each two people, or None if it is undefined, with the number of
        questions that both decided on.
    """

    num_accepted: int
    num_edited: int
    num_rejected: int
    num_open: int
    disagreements: tuple[str, ...]
    kappas: dict[tuple[str, str], tuple[float | None, int]]


def read(path: pathlib.Path) -> Review:
    """Read the decisions of one person.

    Raises:
      UserError: The file is not one of decisions; the message names the field.
    """
    review = checked_json.load(path, Review)
    for name, decision in review.decisions.items():
        texts = decision.question.strip(), decision.answer.strip()
        if decision.verdict == "edit" and not all(0 < len(text) <= _MAX_TEXT for text in texts):
            raise UserError(
                f"{path}: decisions.{name}: an edit must have a question and an answer of 1 to "
                f"{_MAX_TEXT} characters"
            )
    return review


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa of two people's verdicts (Cohen 1960).

    kappa = (p_o - p_e) / (1 - p_e), with the observed share p_o of equal verdicts, and the share
    p_e that is expected if both draw from their own frequencies. None if p_e is 1 or there are no
    verdicts.
    """
    count = len(first)
    if not count:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    left, right = collections.Counter(first), collections.Counter(second)
    expected = sum(left[verdict] * right[verdict] for verdict in left) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def decide(question: Question, decisions: Sequence[Decision]) -> Question | Literal["tied"] | None:
    """Return the accepted text of a question, None if it is rejected, or "tied".

    Args:
      question: Constructed question.
      decisions: Decisions about it, at least one.
    """
    num_rejected = sum(decision.verdict == "reject" for decision in decisions)
    if 2 * num_rejected == len(decisions):
        return "tied"
    if 2 * num_rejected > len(decisions):
        return None
    texts = collections.Counter(
        (d.question.strip(), d.answer.strip()) if d.verdict == "edit" else None
        for d in decisions
        if d.verdict != "reject"
    )
    edits = {text: count for text, count in texts.items() if text is not None}
    best = max(edits.values(), default=0)
    if best < texts[None] or not edits:
        return question
    winners = [text for text, count in edits.items() if count == best]
    if len(winners) > 1:
        return "tied"
    text, answer = winners[0]
    answers = question.answers if answer == question.answers[0] else (answer,)
    return dataclasses.replace(question, question=text, answers=answers)


def apply(path: pathlib.Path, reviews: Sequence[Review], target: pathlib.Path) -> Outcome:
    """Write the questions that people accept.

    Args:
      path: Parquet file of the constructed questions.
      reviews: Reviews of different people.
      target: Parquet file to write; not written if no question is accepted.

    Raises:
      UserError: Two reviews have the same reviewer, or decide on questions that `path` lacks.
      DataError: `path` cannot be read.
    """
    names = [review.reviewer for review in reviews]
    if len(set(names)) < len(names):
        raise UserError(f"--reviews: two files of the same reviewer: {', '.join(sorted(names))}")
    source = QuestionSource(path)
    known = {question.id for question in source}
    for review in reviews:
        if unknown := sorted(set(review.decisions) - known):
            raise UserError(
                f"--reviews: {review.reviewer} decided on {len(unknown)} questions that {path} "
                f"does not contain, such as {unknown[0]}; use the page of the same construction"
            )
    accepted: list[Question] = []
    counts: collections.Counter[str] = collections.Counter()
    tied: list[str] = []
    for question in source:
        decisions = [r.decisions[question.id] for r in reviews if question.id in r.decisions]
        result = decide(question, decisions) if decisions else "open"
        if isinstance(result, Question):
            accepted.append(result)
            counts["edited"] += result != question
        elif result == "tied":
            tied.append(question.id)
        else:
            counts["open" if result == "open" else "rejected"] += 1
    if accepted:
        write_parquet(target, accepted)
    else:
        target.unlink(missing_ok=True)
    return Outcome(
        num_accepted=len(accepted), num_edited=counts["edited"], num_rejected=counts["rejected"],
        num_open=counts["open"], disagreements=tuple(tied), kappas=agreements(reviews),
    )  # fmt: skip


def agreements(reviews: Sequence[Review]) -> dict[tuple[str, str], tuple[float | None, int]]:
    """Return Cohen's kappa of each two people, and the number of questions both decided on."""
    result = {}
    for first, second in itertools.combinations(reviews, 2):
        common = sorted(set(first.decisions) & set(second.decisions))
        verdicts = [_verdicts(review.decisions, common) for review in (first, second)]
        result[first.reviewer, second.reviewer] = kappa(*verdicts), len(common)
    return result


def _verdicts(decisions: Mapping[str, Decision], names: Sequence[str]) -> list[str]:
    return [decisions[name].verdict for name in names]


def format_outcome(outcome: Outcome) -> str:
    """Format the result of reviews as lines."""
    lines = [
        f"accepted {outcome.num_accepted} questions ({outcome.num_edited} edited), rejected "
        f"{outcome.num_rejected}, undecided {outcome.num_open}, tied {len(outcome.disagreements)}"
    ]
    for (first, second), (value, count) in outcome.kappas.items():
        text = "undefined" if value is None else f"{value:.2f}"
        lines.append(f"Cohen's kappa of {first} and {second}: {text} ({count} questions)")
    lines += [f"tied: {name}" for name in outcome.disagreements[:_MAX_LISTED]]
    return "\n".join(lines)
