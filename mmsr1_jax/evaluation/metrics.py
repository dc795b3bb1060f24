"""Figures of episodes that have ended: how many answers are right, and what was searched for it.

Accuracy is a mean over questions; with several episodes of a question, of their shares. Its
interval is over questions too, see `interval`. A mean of no episodes is None, never 0 or NaN.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

MATCHES = ("em", "subem", "judge", "score")  # the last: by the rules of a benchmark
KINDS = ("image_search", "text_search")
_RESAMPLES, _AT_ONCE = 10_000, 500_000  # numbers drawn at a time
_SAME = 1e-9  # values that differ by less do so by rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the figures need of an episode.

    Attributes:
      workflow: by which it came about.
      number: of its question, the same in all workflows; sample: of the episode among those of the
        question.
      id, question, source, category: of the question.
      right: by each of `MATCHES`, in [0, 1]; None: the judge said nothing, or there is no
        benchmark.
      reward, format: see `rewards.Reward`; 0 and False where the episode could not be run.
      made, failed: searches of each of `KINDS`, and those of them that failed.
      refused: searches that were asked for over a limit.
      allowed: searches that it might have made.
      turns, tokens, tokens_sampled: in all.
      end: why it ended.
    """

    workflow: str
    number: int
    sample: int
    id: str
    question: str
    source: str
    category: str
    right: Mapping[str, float | None]
    reward: float
    format: bool
    made: Mapping[str, int]
    failed: Mapping[str, int]
    refused: int
    allowed: int
    turns: int
    tokens: int
    tokens_sampled: int
    end: str

    @property
    def searches(self) -> int:
        """That were made."""
        return sum(self.made.values())


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of the episodes of one workflow, plain data for JSON; at least one episode.

    Returns:
      `questions`, `episodes`, `errors` (episodes that could not be run: they count as wrong, and
      in nothing else); `accuracy`, see `accuracy`, by `em`, `subem`, and `judge` where there is
      any verdict; `reward`, `format`: means; `searches`, see `searches`; `turns`, `tokens`,
      `tokens_sampled`: means, None where no episode could be run; `end`: shares of the episodes by
      how they ended; `by_category` and `by_source`: the same figures of a part.
    """
    found = _figures(outcomes)
    for field in ("category", "source"):
        names = sorted({getattr(outcome, field) for outcome in outcomes} - {""})
        found[f"by_{field}"] = {
            name: _figures([o for o in outcomes if getattr(o, field) == name]) for name in names
        }
    return found


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ran = [outcome for outcome in outcomes if outcome.end != "error"]
    ends = [outcome.end for outcome in outcomes]
    return {
        "questions": len({outcome.number for outcome in outcomes}),
        "episodes": len(outcomes),
        "errors": len(outcomes) - len(ran),
        "accuracy": {
            match: accuracy(outcomes, match)
            for match in MATCHES
            if any(outcome.right[match] is not None for outcome in outcomes)
        },
        "reward": _mean(outcome.reward for outcome in outcomes),
        "format": _mean(outcome.format for outcome in outcomes),
        "searches": searches(ran),
        "turns": _mean(outcome.turns for outcome in ran),
        "tokens": _mean(outcome.tokens for outcome in ran),
        "tokens_sampled": _mean(outcome.tokens_sampled for outcome in ran),
        "end": {end: ends.count(end) / len(ends) for end in sorted(set(ends))},
    }


def accuracy(outcomes: Sequence[Outcome], match: str) -> dict[str, Any]:
    """How many answers are right by one of `MATCHES`.

    Returns:
      `mean`; `interval`: [low, high], 95 %, see `interval`; both None where there is no verdict;
      `no_verdict`: episodes of which the judge said nothing, which are left out; `pass@k` by k,
      where each question has several episodes, each right or wrong: for no k above the number that
      all questions have, as it would be of some questions only.
    """
    of_question: dict[int, list[float]] = {}
    for outcome in outcomes:
        if outcome.right[match] is not None:
            of_question.setdefault(outcome.number, []).append(outcome.right[match])
    counts = [(len(rights), sum(rights)) for rights in of_question.values()]
    shares = np.array([right / n for n, right in counts])
    found: dict[str, Any] = {
        "mean": _mean(shares),
        "interval": interval(shares),
        "no_verdict": sum(outcome.right[match] is None for outcome in outcomes),
    }
    most = min((n for n, _ in counts), default=0)
    if most > 1 and match != "score":
        ks = sorted({2**i for i in range(most.bit_length())} | {most})
        found["pass@k"] = {str(k): _mean(pass_at(k, n, int(r)) for n, r in counts) for k in ks}
    return found


def pass_at(k: int, n: int, right: int) -> float:
    """The share of sets of `k` of `n` episodes with a right one among them, of which `right` are:
    1 - C(n - right, k) / C(n, k) (arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(
    values: np.ndarray, seed: int = 0, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[float] | None:
    """Return a 95 % interval of the mean, [low, high], never of zero width; None: of no values.

    Where values vary it is the percentile bootstrap's (Efron and Tibshirani 1993, section 13.3):
    the 2.5th and the 97.5th percentile of the mean of as many values drawn with replacement, 10,000
    times. If all values are equal, the bootstrap has no width. Instead, the share of unseen
    questions that may differ is bounded by Wilson's upper limit for 0 of n, and their values by
    `bounds`. For all-right and all-wrong samples this is
    Wilson's interval (Wilson 1927); for pairs that all agree, its upper end to both sides.

    Args:
      values: float[n], one for each question.
      seed: of the drawing; so the interval of the same values is always the same.
      bounds: Least and greatest possible value; -1 and 1 for differences.
    """
    rng, n = np.random.default_rng(seed), len(values)
    if not n:
        return None
    if np.ptp(values) < _SAME:
        value, others = float(values[0]), _most_others(n)
        return [value + others * (bound - value) for bound in bounds]
    means, part = [], max(1, _AT_ONCE // n)
    for begin in range(0, _RESAMPLES, part):
        chosen = rng.integers(0, n, (min(part, _RESAMPLES - begin), n))
        means.append(values[chosen].mean(axis=1))
    return [float(x) for x in np.percentile(np.concatenate(means), [2.5, 97.5])]


def _most_others(n: int) -> float:
    """Upper end of Wilson's 95 % interval of a share of which n draws show none."""
    return float(stats.binomtest(0, n).proportion_ci(0.95, method="wilson").high)


def searches(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What was searched; `outcomes` may be empty.

    Returns:
      `made`, `allowed`: in all; `made_of_allowed`: the first by the second (one of the published
      search ratios), None where none was allowed; `share`: of the episodes, that search at all (the
      other one); `an_episode`: mean; `refused`: in all; `failed`: share of those made, 0 where none
      was made; for each of `KINDS` `made`, `share` of the episodes that do, `failed`;
      `only_image_search`, `only_text_search`, `both`, `none`: shares of the episodes. Shares of no
      episodes are None.
    """
    made = sum(outcome.searches for outcome in outcomes)
    allowed = sum(outcome.allowed for outcome in outcomes)
    failed = sum(sum(outcome.failed.values()) for outcome in outcomes)
    found: dict[str, Any] = {
        "made": made,
        "allowed": allowed,
        "made_of_allowed": made / allowed if allowed else None,
        "share": _mean(outcome.searches > 0 for outcome in outcomes),
        "an_episode": _mean(outcome.searches for outcome in outcomes),
        "refused": sum(outcome.refused for outcome in outcomes),
        "failed": failed / made if made else 0.0,
    }
    for kind in KINDS:
        count = sum(outcome.made[kind] for outcome in outcomes)
        lost = sum(outcome.failed[kind] for outcome in outcomes)
        found[kind] = {
            "made": count,
            "share": _mean(outcome.made[kind] > 0 for outcome in outcomes),
            "failed": lost / count if count else 0.0,
        }
        found[f"only_{kind}"] = _mean(
            outcome.made[kind] == outcome.searches > 0 for outcome in outcomes
        )
    found["both"] = _mean(all(outcome.made[kind] for kind in KINDS) for outcome in outcomes)
    found["none"] = _mean(not outcome.searches for outcome in outcomes)
    return found


def _mean(values) -> float | None:
    """None where there are none."""
    values = [float(value) for value in values]
    return math.fsum(values) / len(values) if values else None
