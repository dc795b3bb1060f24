"""Selection of training questions by what a policy answers correctly, and with which searches.

Each question is rolled out n times, and the searches of its correct episodes determine its class. A
training set mixes the classes, so that a policy sees questions that need a search and questions
that do not (MMSearch-R1, arXiv 2506.20670, the search-balanced subset).

    search_free      a correct episode made no search
    image_required   all correct episodes searched, for images only
    text_required    all correct episodes searched, for text only
    mix_required     all correct episodes searched, for images and text: each of them for both, or
                     some for one and some for the other
    never_right      no episode was correct
    not_run          no episode could be run, so nothing is known about the question

Only the first four are trained on.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmsr1_jax.config import Rewards
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.rewards import reward_function
from mmsr1_jax.utils import checked_json

FREE, IMAGE, TEXT, MIX = "search_free", "image_required", "text_required", "mix_required"
NEVER, NOT_RUN = "never_right", "not_run"
USEFUL = (FREE, IMAGE, TEXT, MIX)
CLASSES = (*USEFUL, NEVER, NOT_RUN)
# Parts that a mix may consist of, with the classes of each.
PARTS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in USEFUL},
    "search_required": (IMAGE, TEXT, MIX),
}
PAPER_MIX = "search_required=0.68,search_free=0.32"  # 3,400 and 1,600 of 5,000

# Amount of each part, as numbers of questions (int) or shares of the set (float).
Mix = Mapping[str, int] | Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """The aspects of an episode that curation needs.

    Attributes:
      index: Number of the episode.
      question: Number of its question.
      ran: Whether the episode could be run.
      reward: Reward of the episode.
      kinds: Kinds of search that the episode made, of `image_search` and `text_search`.
    """

    index: int
    question: int
    ran: bool
    reward: reward_function.Reward
    kinds: frozenset[str]

    @property
    def right(self) -> bool:
        return self.ran and bool(self.reward.correct)


def attempt_of(
    line: Mapping[str, Any],
    scoring: Rewards,
    verdict: bool | None = None,
    step: int = 0,
) -> Attempt:
    """Convert a line of an evaluation's episodes (`evaluation/records.py`) to an attempt.

    Args:
      scoring: Reward settings. They decide correctness if there is no verdict, whatever the line
        says.
      verdict: Verdict of a judge, if any.
      step: Training step, see `reward_function.score`.
    """
    turns = checked_json.convert(line["turns"], list[Turn], name="turns")
    made = [call["action"] for call in line["calls"] if call["status"] != "refused"]
    if verdict is None:
        verdict = reward_function.matches(
            reward_function.answer_of(turns), line["answers"], scoring
        )
    return Attempt(
        index=line["index"],
        question=line["group"],
        ran=line["end"] != "error",
        reward=reward_function.score(turns, verdict, scoring, step, searches=len(made)),
        kinds=frozenset(made),
    )


def class_of(attempts: Sequence[Attempt]) -> str:
    """Return the class of a question from all its attempts; see the module docstring."""
    if not any(attempt.ran for attempt in attempts):
        return NOT_RUN
    right = [attempt for attempt in attempts if attempt.right]
    if not right:
        return NEVER
    if not all(attempt.kinds for attempt in right):
        return FREE
    kinds = frozenset().union(*(attempt.kinds for attempt in right))
    return {frozenset({"image_search"}): IMAGE, frozenset({"text_search"}): TEXT}.get(kinds, MIX)


def cheapest(attempts: Sequence[Attempt], most: int) -> list[Attempt]:
    """Return at most `most` correct attempts at a question, in order of preference.

    Fewer searches come first, then well-formed before badly formed episodes, then lower numbers.
    """
    right = [attempt for attempt in attempts if attempt.right]
    order = sorted(right, key=lambda a: (a.reward.searches, not a.reward.format, a.index))
    return order[:most]


def read_mix(text: str) -> Mix:
    """Parse `PART=AMOUNT,..` as a mix, with parts from `PARTS`.

    Whole numbers are numbers of questions. Numbers with a decimal point are shares, which must sum
    to 1. An empty text selects every question with a correct attempt.

    Raises:
      ValueError: The text is not a valid mix.
    """
    mix: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, _, amount = (word.strip() for word in item.partition("="))
        if name not in PARTS:
            raise ValueError(f"--mix: {item!r}: the part must be one of {', '.join(PARTS)}")
        if name in mix:
            raise ValueError(f"--mix: {name} comes twice")
        try:
            mix[name] = float(amount) if "." in amount else int(amount)
        except ValueError:
            raise ValueError(f"--mix: {item!r}: must be {name}=NUMBER") from None
    if "search_required" in mix and set(mix) & set(PARTS["search_required"]):
        raise ValueError("--mix: search_required is image_, text_ and mix_required together")
    shares = [amount for amount in mix.values() if isinstance(amount, float)]
    if shares and len(shares) < len(mix):
        raise ValueError(f"--mix={text}: must be numbers of questions or shares, not both")
    if shares and not (min(shares) > 0 and math.isclose(sum(shares), 1, abs_tol=1e-6)):
        raise ValueError(f"--mix={text}: shares must be over 0 and sum to 1, not {sum(shares)}")
    if mix and min(mix.values()) < 0:
        raise ValueError(f"--mix={text}: a number of questions must not be negative")
    return mix


def choose(classes: Sequence[str], mix: Mix, seed: int) -> list[int]:
    """Choose the questions of a set, and return their numbers in ascending order.

    Args:
      classes: Class of each question.
      mix: Numbers of questions select that many of each part, or all available ones. Shares select
        the largest set in which each part has its share, rounded to whole questions. An empty mix
        selects all questions of `USEFUL` classes.
      seed: Non-negative seed of the sampling. The sampling order does not depend on the mix, so a
        smaller number of a part selects a subset of what a larger one does.
    """
    if not mix:
        return [number for number, name in enumerate(classes) if name in USEFUL]
    members = {
        part: [number for number, name in enumerate(classes) if name in PARTS[part]] for part in mix
    }
    sizes = sizes_of(mix, {part: len(numbers) for part, numbers in members.items()})
    chosen: list[int] = []
    for part, numbers in members.items():
        rng = np.random.default_rng([seed, list(PARTS).index(part)])
        chosen += rng.permutation(numbers)[: sizes[part]].tolist()
    return sorted(chosen)


def sizes_of(mix: Mix, there: Mapping[str, int]) -> dict[str, int]:
    """Return the number of questions per part, given those available (`there`); see `choose`."""
    if not any(isinstance(amount, float) for amount in mix.values()):
        return {part: min(int(amount), there[part]) for part, amount in mix.items()}
    total = int(min(there[part] / share for part, share in mix.items()) + 1e-9)
    exact = {part: round(share * total, 9) for part, share in mix.items()}
    sizes = {part: int(value) for part, value in exact.items()}
    # Round up the largest remainders (the first of equal ones). The questions for it exist.
    order = sorted(mix, key=lambda part: round(sizes[part] - exact[part], 9))
    for part in order[: total - sum(sizes.values())]:
        sizes[part] += 1
    return sizes


def figures(
    attempts: Sequence[Sequence[Attempt]], classes: Sequence[str], chosen: Sequence[int], mix: Mix
) -> dict[str, Any]:
    """Return counts of questions by class and part, as data that JSON can represent.

    Args:
      attempts: Attempts at each question.
      classes: Class of each question.
      chosen: Numbers of the questions in the set.
      mix: Mix that the set was drawn with.

    Returns:
      `questions`, `episodes`, `errors` (episodes that could not be run) and `chosen`. `classes`:
      for each of `CLASSES`, its `questions`, their `share` of all questions, `right` (mean fraction
      of a question's episodes that are correct) and the number `chosen`. `parts`: for each part of
      the mix, the amount `wanted` (as in the mix), the number available (`there`) and the number
      `chosen`.
    """
    found: dict[str, Any] = {}
    taken = [classes[number] for number in chosen]
    for name in CLASSES:
        members = [some for some, own in zip(attempts, classes, strict=True) if own == name]
        rights = [sum(attempt.right for attempt in some) / len(some) for some in members]
        found[name] = {
            "questions": len(members),
            "share": len(members) / len(classes),
            "right": math.fsum(rights) / len(rights) if rights else None,
            "chosen": taken.count(name),
        }
    parts = {
        part: {
            "wanted": amount,
            "there": sum(found[name]["questions"] for name in PARTS[part]),
            "chosen": sum(found[name]["chosen"] for name in PARTS[part]),
        }
        for part, amount in mix.items()
    }
    return {
        "questions": len(classes),
        "episodes": sum(map(len, attempts)),
        "errors": sum(not attempt.ran for some in attempts for attempt in some),
        "chosen": len(chosen),
        "classes": found,
        "parts": parts,
    }


def table(found: Mapping[str, Any]) -> str:
    """Format `figures` for the terminal, with one line per class and one for all."""
    total = {"questions": found["questions"], "share": 1.0, "right": None}
    rows = [*found["classes"].items(), ("all", total | {"chosen": found["chosen"]})]
    lines = [f"{'class':<16}{'questions':>10}{'share %':>9}{'right %':>9}{'chosen':>8}"]
    lines.append("-" * len(lines[0]))
    for name, one in rows:
        right = "-" if one["right"] is None else f"{100 * one['right']:.1f}"
        share = f"{100 * one['share']:.1f}"
        lines.append(f"{name:<16}{one['questions']:>10}{share:>9}{right:>9}{one['chosen']:>8}")
    return "\n".join(lines)
