"""Selection of training questions by what a policy answers correctly, and with which searches.

Each question is rolled out n times, and the searches of its correct episodes determine its class. A
training set mixes the classes, so that a policy sees questions that need a search and questions
that do not (MMSearch-R1, arXiv 2506.20670, the search-balanced subset).

    search_free      a correct episode made no search
    image_required   all correct episodes searched, for images only
    text_required    all correct episodes searched, for text only
    mix_required     all correct episodes searched, for images and text: each of them for both, or
                     some for one and some for the other
    never_correct    no episode was correct
    not_run          every episode failed with a technical error

Only the first four are trained on.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmsr1_jax.config import Rewards
from mmsr1_jax.config.errors import UserError
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.utils import checked_json

FREE, IMAGE, TEXT, MIX = "search_free", "image_required", "text_required", "mix_required"
NEVER, NOT_RUN = "never_correct", "not_run"
USEFUL = (FREE, IMAGE, TEXT, MIX)
CLASSES = (*USEFUL, NEVER, NOT_RUN)
# Parts that a mix may consist of, with the classes of each.
PARTS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in USEFUL},
    "search_required": (IMAGE, TEXT, MIX),
}
PAPER_MIX = "search_required=0.68,search_free=0.32"  # 3,400 and 1,600 of 5,000

# Amount of each part, as numbers of questions (int) or fractions of the set (float).
Mix = Mapping[str, int] | Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """The aspects of an episode that curation needs.

    Attributes:
      index: Index of the episode.
      question: Index of its question.
      ran: Whether the episode ran without a technical error.
      reward: Reward of the episode.
      search_kinds: Kinds of search that the episode made, of `image_search` and `text_search`.
    """

    index: int
    question: int
    ran: bool
    reward: reward_function.Reward
    search_kinds: frozenset[str]

    @property
    def correct(self) -> bool:
        """Whether the episode ran and its answer is correct."""
        return self.ran and bool(self.reward.correct)


def read_attempt(
    line: Mapping[str, Any],
    settings: Rewards,
    verdict: bool | None = None,
    step: int = 0,
) -> Attempt:
    """Convert a line of an evaluation's episodes (`evaluation/records.py`) to an attempt.

    Args:
      settings: Reward settings. They decide correctness if there is no verdict, whatever the line
        says.
      verdict: Verdict of a judge, if any.
      step: Training step, see `reward_function.compute_reward`.
    """
    turns = checked_json.convert(line["turns"], list[Turn], name="turns")
    searches = [call["action"] for call in line["calls"] if call["status"] != "refused"]
    if verdict is None:
        verdict = reward_function.matches(
            reward_function.final_answer(turns), line["answers"], settings
        )
    reward = reward_function.compute_reward(turns, verdict, settings, step, searches=len(searches))
    return Attempt(
        index=line["index"],
        question=line["group"],
        ran=line["end"] != "error",
        reward=reward,
        search_kinds=frozenset(searches),
    )


def classify(attempts: Sequence[Attempt]) -> str:
    """Return the class of a question from all its attempts; see the module docstring."""
    if not any(attempt.ran for attempt in attempts):
        return NOT_RUN
    correct = [attempt for attempt in attempts if attempt.correct]
    if not correct:
        return NEVER
    if not all(attempt.search_kinds for attempt in correct):
        return FREE
    kinds = frozenset().union(*(attempt.search_kinds for attempt in correct))
    return {frozenset({"image_search"}): IMAGE, frozenset({"text_search"}): TEXT}.get(kinds, MIX)


def cheapest(attempts: Sequence[Attempt], limit: int) -> list[Attempt]:
    """Return at most `limit` correct attempts at a question, in order of preference.

    Fewer searches come first, then well-formed before badly formed episodes, then lower indices.
    """
    correct = [attempt for attempt in attempts if attempt.correct]
    order = sorted(correct, key=lambda a: (a.reward.searches, not a.reward.format, a.index))
    return order[:limit]


def read_mix(text: str) -> Mix:
    """Parse `PART=AMOUNT,..` as a mix, with parts from `PARTS`.

    Whole numbers are numbers of questions. Numbers with a decimal point are fractions of the set,
    which must sum to 1. An empty text selects every question with a correct attempt.

    Raises:
      UserError: The text is not a valid mix.
    """
    mix: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, amount = (field.strip() for field in item.partition("="))
        if name not in PARTS:
            raise UserError(f"--mix: {item!r}: the part must be one of {', '.join(PARTS)}")
        if name in mix:
            raise UserError(f"--mix: {name} occurs twice; name each part once")
        try:
            mix[name] = float(amount) if "." in amount else int(amount)
        except ValueError:
            raise UserError(f"--mix: {item!r} must be {name}=NUMBER") from None
    if "search_required" in mix and set(mix) & set(PARTS["search_required"]):
        raise UserError(
            "--mix: search_required already includes image_required, text_required and mix_required"
        )
    fractions = [amount for amount in mix.values() if isinstance(amount, float)]
    if fractions and len(fractions) < len(mix):
        raise UserError(f"--mix={text}: use either numbers of questions or fractions, not both")
    if fractions and not (min(fractions) > 0 and math.isclose(sum(fractions), 1, abs_tol=1e-6)):
        raise UserError(
            f"--mix={text}: fractions must be above 0 and sum to 1, not {sum(fractions)}"
        )
    if mix and min(mix.values()) < 0:
        raise UserError(f"--mix={text}: numbers of questions must not be negative")
    return mix


def choose(classes: Sequence[str], mix: Mix, seed: int) -> list[int]:
    """Choose the questions of a set, and return their indices in ascending order.

    Args:
      classes: Class of each question.
      mix: Numbers of questions select that many of each part, or all available ones. Fractions
        select the largest set in which each part has its fraction, rounded to whole questions. An
        empty mix selects all questions of `USEFUL` classes.
      seed: Non-negative seed of the sampling. The sampling order does not depend on the mix, so a
        smaller number of a part selects a subset of what a larger one does.
    """
    if not mix:
        return [index for index, name in enumerate(classes) if name in USEFUL]
    members = {
        part: [index for index, name in enumerate(classes) if name in PARTS[part]] for part in mix
    }
    sizes = part_sizes(mix, {part: len(indices) for part, indices in members.items()})
    chosen: list[int] = []
    for part, indices in members.items():
        rng = np.random.default_rng([seed, list(PARTS).index(part)])
        chosen += rng.permutation(indices)[: sizes[part]].tolist()
    return sorted(chosen)


def part_sizes(mix: Mix, available: Mapping[str, int]) -> dict[str, int]:
    """Return the number of questions to choose per part, given those available; see `choose`."""
    if not any(isinstance(amount, float) for amount in mix.values()):
        return {part: min(int(amount), available[part]) for part, amount in mix.items()}
    total = int(min(available[part] / fraction for part, fraction in mix.items()) + 1e-9)
    exact = {part: round(fraction * total, 9) for part, fraction in mix.items()}
    sizes = {part: int(value) for part, value in exact.items()}
    # Round up the largest remainders (the first of equal ones). The questions for it exist.
    order = sorted(mix, key=lambda part: round(sizes[part] - exact[part], 9))
    for part in order[: total - sum(sizes.values())]:
        sizes[part] += 1
    return sizes


def summarize(
    attempts: Sequence[Sequence[Attempt]], classes: Sequence[str], chosen: Sequence[int], mix: Mix
) -> dict[str, Any]:
    """Return counts of questions by class and part, as data that JSON can represent.

    Args:
      attempts: Attempts at each question.
      classes: Class of each question.
      chosen: Indices of the questions in the set.
      mix: Mix that the set was drawn with.

    Returns:
      `questions`, `episodes`, `errors` (episodes that failed with a technical error) and `chosen`.
      `classes`: for each of `CLASSES`, its `questions`, their `fraction` of all questions,
      `accuracy` (mean fraction of a question's episodes that are correct) and the number `chosen`.
      `parts`: for each part of the mix, the amount `requested` (as in the mix), the number of
      questions `available` and the number `chosen`.
    """
    by_class: dict[str, Any] = {}
    chosen_classes = [classes[index] for index in chosen]
    for name in CLASSES:
        members = [group for group, own in zip(attempts, classes, strict=True) if own == name]
        accuracies = [sum(attempt.correct for attempt in group) / len(group) for group in members]
        by_class[name] = {
            "questions": len(members),
            "fraction": len(members) / len(classes),
            "accuracy": math.fsum(accuracies) / len(accuracies) if accuracies else None,
            "chosen": chosen_classes.count(name),
        }
    parts = {
        part: {
            "requested": amount,
            "available": sum(by_class[name]["questions"] for name in PARTS[part]),
            "chosen": sum(by_class[name]["chosen"] for name in PARTS[part]),
        }
        for part, amount in mix.items()
    }
    return {
        "questions": len(classes),
        "episodes": sum(map(len, attempts)),
        "errors": sum(not attempt.ran for group in attempts for attempt in group),
        "chosen": len(chosen),
        "classes": by_class,
        "parts": parts,
    }


def format_table(statistics: Mapping[str, Any]) -> str:
    """Format `summarize` for the terminal, with one line per class and one for all."""
    total = {"questions": statistics["questions"], "fraction": 1.0, "accuracy": None}
    rows = [*statistics["classes"].items(), ("all", total | {"chosen": statistics["chosen"]})]
    lines = [f"{'class':<16}{'questions':>10}{'% of all':>10}{'correct %':>11}{'chosen':>8}"]
    lines.append("-" * len(lines[0]))
    for name, row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        fraction = f"{100 * row['fraction']:.1f}"
        lines.append(
            f"{name:<16}{row['questions']:>10}{fraction:>10}{accuracy:>11}{row['chosen']:>8}"
        )
    return "\n".join(lines)
