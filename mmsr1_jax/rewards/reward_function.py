"""Reward of an episode: r = (1 - a) * correct * penalty + a * format.

    correct   1 if the answer matches a gold answer, or if the judge accepts it (`tools/judge.py`)
    penalty   1 - p if the answer is correct and the episode used a search, else 1
    format    1 if every turn is well formed and the actions follow an allowed sequence, else 0

As in MMSearch-R1 (arXiv 2506.20670, section 3.3), with a = p = 0.1. All functions are pure
functions of the turns that `episodes/turns.py` parses; they need neither an accelerator nor tokens.
"""

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmsr1_jax.config.rewards import SEQUENCES, Rewards
from mmsr1_jax.episodes.turns import Turn, extract_answer, requests_search

if TYPE_CHECKING:
    from mmsr1_jax.episodes.episode import Episode

# Names of actions in `Rewards.sequences`.
ACTION_NAMES: dict[str, str] = {
    "answer": "answer",
    "image_search": "image",
    "text_search": "text",
}

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclasses.dataclass(frozen=True)
class Reward:
    """Reward of an episode and its components.

    Attributes:
      reward: Total reward r.
      correct: Correctness of the answer, in [0, 1]; False if there is no answer.
      format: Whether the format is correct.
      searches: Number of searches made.
      penalty: Factor on `correct`; 1 if no penalty applies.
      judge: Outcome of the judge; empty if none is configured. `match`: no request was needed;
        `verdict`: `correct` is the judge's verdict; `unreadable`: the reply contained no verdict,
        which counts as wrong; `failed`: the request failed, so the reward is meaningless.
    """

    reward: float
    correct: bool | float
    format: bool
    searches: int
    penalty: float
    judge: str = dataclasses.field(default="", compare=False)

    @property
    def known(self) -> bool:
        """Whether the answer was judged or matched, so that the reward is meaningful."""
        return self.judge != "failed"


def normalise(text: str) -> str:
    """Normalise a text for matching, as for SQuAD (Rajpurkar et al. 2016).

    The steps are, in this order: lower-case, remove ASCII punctuation, remove the words a, an and
    the, collapse white space. As a consequence, `3.5` and `35` are equal.
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str | None, golds: Sequence[str]) -> bool:
    """Return whether the answer equals one of the gold answers after `normalise`.

    Blank answers never match, and blank gold answers are ignored. As published, a gold answer that
    normalises to nothing (`A`, `The The`, `+`) matches any answer that does so too.
    """
    golds = _check_list(golds)
    if not answer or not answer.strip():
        return False
    return normalise(answer) in {normalise(gold) for gold in golds if gold.strip()}


def sub_exact_match(answer: str | None, golds: Sequence[str]) -> bool:
    """Return whether a gold answer is a substring of the answer after `normalise`.

    In the published code, every answer matches a gold answer that normalises to nothing. Here such
    a gold answer matches if `exact_match` holds, or if it occurs verbatim in the answer outside of
    a word, ignoring case: `A` is in `It is A.` and in `Vitamin A`, but not in `Tagus`.
    """
    golds = _check_list(golds)
    if not answer:
        return False
    normalised, verbatim = normalise(answer), _collapse_spaces(answer)
    for gold in golds:
        part = normalise(gold)
        if part and part in normalised:
            return True
        if not part and gold.strip() and _occurs_outside_words(_collapse_spaces(gold), verbatim):
            return True
    return exact_match(answer, golds)


def final_answer(turns: Sequence[Turn]) -> str | None:
    """Return the last `<answer>..</answer>` of the last turn, or None if it is missing or blank."""
    if not turns:
        return None
    last = turns[-1]
    if last.text is not None:
        return extract_answer(last.text) or None
    return (last.payload or None) if last.action == "answer" else None


def count_searches(turns: Sequence[Turn]) -> int:
    """Return the number of turns that ask for a search, by `turns.requests_search`.

    As published, a search next to the answer in the last of several turns does not count.
    """
    is_search = [
        turn.action in ("image_search", "text_search")
        if turn.text is None
        else requests_search(turn.text)
        for turn in turns
    ]
    if len(turns) > 1 and final_answer(turns) is not None:
        is_search.pop()
    return sum(is_search)


def has_valid_format(
    turns: Sequence[Turn], allowed: Sequence[str] = SEQUENCES, *, strict: bool = False
) -> bool:
    """Return whether each turn is well formed and the actions form an `allowed` sequence.

    Args:
      turns: Parsed turns. Their actions are taken from their forms, which in texts from other
        programs may differ from the actions that the engine would execute.
      allowed: See `Rewards.sequences`.
      strict: See `Rewards.strict_form`.
    """
    forms = [turn.strict_form if strict else turn.form for turn in turns]
    names = [ACTION_NAMES[form] for form in forms if form is not None]
    return len(names) == len(forms) and ",".join(names) in allowed


def penalty_at(settings: Rewards, step: int) -> float:
    """Return the search penalty p_t at a training step, counted from 0."""
    p, steps = settings.search_penalty, settings.penalty_warmup
    return -p + 2 * p * min(step / steps, 1.0) if steps else p


def compute_reward(
    turns: Sequence[Turn],
    correct: bool | float,
    settings: Rewards,
    step: int = 0,
    *,
    searches: int | None = None,
) -> Reward:
    """Return the reward of an episode, given the correctness of its answer.

    Args:
      turns: Turns parsed by `turns.parse`.
      correct: Correctness of the answer, in [0, 1]; treated as 0 if the last turn has no answer.
      settings: Settings of the rewards.
      step: Training step, from 0, for the warm-up of the penalty.
      searches: Number of searches made. None counts them with `count_searches`, which uses only the
        turns; the two differ if the engine refused a search, see `episode_reward`.

    Raises:
      ValueError: `correct` is outside [0, 1].
    """
    if final_answer(turns) is None:
        correct = False
    if not 0 <= correct <= 1:
        raise ValueError(f"correct={correct} must be in [0, 1]")
    searches = count_searches(turns) if searches is None else searches
    penalty = 1.0
    if correct and searches:
        count = searches if settings.per_search_penalty else 1
        penalty = (1.0 - penalty_at(settings, step)) ** count
    valid = has_valid_format(turns, settings.sequences, strict=settings.strict_form)
    a = settings.format_penalty
    return Reward((1.0 - a) * correct * penalty + a * valid, correct, valid, searches, penalty)


def episode_reward(
    episode: "Episode",
    answers: Sequence[str],
    settings: Rewards,
    step: int = 0,
    correct: bool | float | None = None,
) -> Reward:
    """Return the reward of an episode that the engine generated.

    A search refused for exceeding a limit does not count, since no tool was called. A search that
    failed or found nothing does count.

    Args:
      episode: Finished episode.
      answers: Gold answers, including aliases.
      settings: Settings of the rewards.
      step: Training step, see `compute_reward`.
      correct: Verdict of the judge; None matches the answer by `settings.match`.
    """
    if correct is None:
        correct = matches(final_answer(episode.turns), answers, settings)
    searches = sum(call.status != "refused" for call in episode.calls)
    return compute_reward(episode.turns, correct, settings, step, searches=searches)


def matches(answer: str | None, golds: Sequence[str], settings: Rewards) -> bool:
    """Return whether an answer is correct under `settings.match`."""
    return (exact_match if settings.match == "EM" else sub_exact_match)(answer, golds)


def _collapse_spaces(text: str) -> str:
    return " ".join(text.lower().split())


def _occurs_outside_words(part: str, text: str) -> bool:
    """Return whether `part`, without outer white space, occurs in `text` outside of a word."""
    text, start = f" {text} ", -1
    while (start := text.find(part, start + 1)) >= 0:
        ends = (text[start - 1], part[0]), (part[-1], text[start + len(part)])
        if not any(_is_word_letter(left) and _is_word_letter(right) for left, right in ends):
            return True
    return False


def _is_word_letter(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _check_list(golds: Sequence[str]) -> Sequence[str]:
    """Return `golds`; reject a single text, whose letters would count as gold answers."""
    if isinstance(golds, str):
        raise TypeError("golds must be a list of texts, not one text")
    return golds
