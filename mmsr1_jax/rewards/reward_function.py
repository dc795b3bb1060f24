"""What an episode is worth: r = (1 - a) * correct * penalty + a * format.

    correct   the answer matches a gold one, or a judge says that it does (`tools/judge.py`)
    penalty   1 - p if the answer is correct and anything was searched for, else 1
    format    1 if every turn is well formed and the actions came in an allowed order, else 0

As in MMSearch-R1 (arXiv 2506.20670, section 3.3), with a = p = 0.1. Pure functions of turns as
`episodes/turns.py` parses them; nothing here needs an accelerator or tokens.
"""

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmsr1_jax.config.rewards import SEQUENCES, Rewards
from mmsr1_jax.episodes.turns import Action, Turn, answer_in, asks_for_search

if TYPE_CHECKING:
    from mmsr1_jax.episodes.episode import Episode

# Names of actions in `Rewards.sequences`.
NAMES: dict[Action, str] = {"answer": "answer", "image_search": "image", "text_search": "text"}

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclasses.dataclass(frozen=True)
class Reward:
    """What an episode is worth, and why.

    Attributes:
      reward: r.
      correct: as it was judged, in [0, 1]; False where there is no answer.
      format: whether the form is right.
      searches: that were made.
      penalty: the factor on `correct`; 1 where it does not apply.
      judge: what a judge contributed; empty: none is configured. `match`: it did not have to be
        asked; `verdict`: its verdict is `correct`; `unreadable`: its reply held no verdict, which
        counts as wrong; `failed`: it could not be asked, so the reward means nothing.
    """

    reward: float
    correct: bool | float
    format: bool
    searches: int
    penalty: float
    judge: str = dataclasses.field(default="", compare=False)

    @property
    def known(self) -> bool:
        """Whether the answer was judged or matched, so that the reward means something."""
        return self.judge != "failed"


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an and the, single spaces.

    As for SQuAD (Rajpurkar et al. 2016), in this order: so `3.5` and `35` are the same.
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str | None, golds: Sequence[str]) -> bool:
    """Return whether the answer is one of the gold answers, after `normalise`.

    A blank answer is no answer, and a blank gold answer is none. Golds of which `normalise` leaves
    nothing (`A`, `The The`, `+`) are right where nothing is left of the answer, as published.
    """
    golds = _texts(golds)
    if not answer or not answer.strip():
        return False
    return normalise(answer) in {normalise(gold) for gold in golds if gold.strip()}


def sub_exact_match(answer: str | None, golds: Sequence[str]) -> bool:
    """Return whether a gold answer is a part of the answer, after `normalise`, letter by letter.

    In the published program every answer matches a gold that normalises to nothing. Here it
    counts where `exact_match` holds, or where it stands in the answer as it is, not inside a word,
    in any letter case: gold `A` is in `It is A.` and in `Vitamin A`, and not in `Tagus`.
    """
    golds = _texts(golds)
    if not answer:
        return False
    normalised, spaced = normalise(answer), _spaced(answer)
    for gold in golds:
        part = normalise(gold)
        if part and part in normalised:
            return True
        if not part and gold.strip() and _stands_in(_spaced(gold), spaced):
            return True
    return exact_match(answer, golds)


def answer_of(turns: Sequence[Turn]) -> str | None:
    """Return the answer, the last `<answer>..</answer>` of the last turn; None where there is none,
    or a blank one."""
    if not turns:
        return None
    last = turns[-1]
    if last.text is not None:
        return answer_in(last.text) or None
    return (last.payload or None) if last.action == "answer" else None


def searches_in(turns: Sequence[Turn]) -> int:
    """Return how many turns ask for a search, by `turns.asks_for_search`.

    A search beside the answer, in the last of several turns, is none, as published.
    """
    counted = [
        turn.action in ("image_search", "text_search")
        if turn.text is None
        else asks_for_search(turn.text)
        for turn in turns
    ]
    if len(turns) > 1 and answer_of(turns) is not None:
        counted.pop()
    return sum(counted)


def format_right(
    turns: Sequence[Turn], allowed: Sequence[str] = SEQUENCES, *, strict: bool = False
) -> bool:
    """Return whether each turn is well formed and the actions are one of the `allowed` sequences.

    Args:
      turns: Parsed turns; the actions are those of their forms, which in texts from elsewhere may
        be others than the engine would carry out.
      allowed: See `Rewards.sequences`.
      strict: See `Rewards.strict_form`.
    """
    forms = [turn.strict_form if strict else turn.form for turn in turns]
    return None not in forms and ",".join(NAMES[form] for form in forms) in allowed


def penalty_at(settings: Rewards, step: int) -> float:
    """The search penalty p_t at a step of training, counted from 0."""
    p, steps = settings.search_penalty, settings.penalty_warmup
    return -p + 2 * p * min(step / steps, 1.0) if steps else p


def score(
    turns: Sequence[Turn],
    correct: bool | float,
    settings: Rewards,
    step: int = 0,
    *,
    searches: int | None = None,
) -> Reward:
    """The reward of an episode whose answer was judged.

    Args:
      turns: as `turns.parse` reads them.
      correct: of the answer, in [0, 1]; taken as 0 where the last turn holds no answer.
      step: of training, from 0; for the warm-up of the penalty.
      searches: that were made. None: `searches_in`, which is all that can be known where there is
        nothing but turns. The two differ where the engine refused one, see `episode_reward`.
    """
    if answer_of(turns) is None:
        correct = False
    if not 0 <= correct <= 1:
        raise ValueError(f"correct={correct} must be in [0, 1]")
    searches = searches_in(turns) if searches is None else searches
    penalty = 1.0
    if correct and searches:
        times = searches if settings.per_search_penalty else 1
        penalty = (1.0 - penalty_at(settings, step)) ** times
    right = format_right(turns, settings.sequences, strict=settings.strict_form)
    a = settings.format_penalty
    return Reward((1.0 - a) * correct * penalty + a * right, correct, right, searches, penalty)


def episode_reward(
    episode: "Episode",
    answers: Sequence[str],
    settings: Rewards,
    step: int = 0,
    correct: bool | float | None = None,
) -> Reward:
    """The reward of an episode of the engine.

    A search that was refused, as it was over a limit, is none: no tool was called. One that failed,
    or found nothing, is.

    Args:
      answers: the gold ones, aliases and all.
      step: see `score`.
      correct: what a judge said; None: `settings.match` decides.
    """
    if correct is None:
        correct = matches(answer_of(episode.turns), answers, settings)
    made = sum(call.status != "refused" for call in episode.calls)
    return score(episode.turns, correct, settings, step, searches=made)


def matches(answer: str | None, golds: Sequence[str], settings: Rewards) -> bool:
    """Whether an answer is right by `settings.match`."""
    return (exact_match if settings.match == "EM" else sub_exact_match)(answer, golds)


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _stands_in(part: str, text: str) -> bool:
    """Whether `part`, which does not begin or end with white space, is in `text`, not in a word."""
    text, begin = f" {text} ", -1
    while (begin := text.find(part, begin + 1)) >= 0:
        ends = (text[begin - 1], part[0]), (part[-1], text[begin + len(part)])
        if not any(_in_word(left) and _in_word(right) for left, right in ends):
            return True
    return False


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _texts(golds: Sequence[str]) -> Sequence[str]:
    """Its letters would be taken for gold answers, one each."""
    if isinstance(golds, str):
        raise TypeError("golds must be a list of texts, not one text")
    return golds
