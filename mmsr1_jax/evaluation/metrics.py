"""Metrics of completed episodes: accuracy and search behaviour.

Accuracy is a mean over questions; a question with several episodes contributes the mean over them.
Its confidence interval is also over questions, see `interval`. The mean over no episodes is None,
never 0 or NaN.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

MATCHES = ("em", "subem", "judge", "score")  # "score": a benchmark's own rules
KINDS = ("image_search", "text_search")
_RESAMPLES, _AT_ONCE = 10_000, 500_000  # _AT_ONCE: numbers drawn at a time
_SAME = 1e-9  # smaller differences are rounding errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one episode, from which metrics are computed.

    Attributes:
      workflow: Workflow that produced the episode.
      index: Number of the question, the same in all workflows.
      sample: Index of the episode among those of its question.
      id, question, source, category: Fields of the question.
      right: Correctness by each of `MATCHES`, in [0, 1]; None without a verdict of the judge, or
        without a benchmark.
      reward, format: See `reward_function.Reward`; 0 and False if the episode could not be run.
      made, failed: Number of searches of each of `KINDS`, and of failed ones among them.
      refused: Number of searches refused because they exceeded a limit.
      allowed: Number of searches that the episode was allowed to make.
      turns, tokens, tokens_sampled: Totals over the episode.
      end: Why the episode ended.
    """

    workflow: str
    index: int
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
        """Number of searches made."""
        return sum(self.made.values())


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compute the metrics of one workflow's episodes as plain data for JSON.

    Args:
      outcomes: At least one episode.

    Returns:
      A dict with these keys:
        `questions`, `episodes`: EngineStats.
        `errors`: Number of episodes that could not be run. They count as wrong, with reward 0, and
          are excluded from the means of `searches`, `turns` and tokens.
        `accuracy`: See `accuracy`, for each of `MATCHES` with at least one verdict.
        `reward`, `format`: Means.
        `searches`: See `searches`.
        `turns`, `tokens`, `tokens_sampled`: Means, None if no episode could be run.
        `end`: Share of the episodes for each way to end.
        `by_category`, `by_source`: The same metrics for each category and source.
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
        "questions": len({outcome.index for outcome in outcomes}),
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
    """Compute the accuracy by one of `MATCHES`.

    Returns:
      A dict with these keys:
        `mean`: Mean over questions, None without any verdict.
        `interval`: 95 % confidence interval [low, high], see `interval`; None without any verdict.
        `no_verdict`: Number of episodes without a verdict, which are left out.
        `pass@k`: pass@k by k. Present if each question has several episodes and each is either
          right or wrong. k is at most the smallest number of episodes of any question, since a
          larger k would cover only some of the questions.
    """
    of_question: dict[int, list[float]] = {}
    for outcome in outcomes:
        if outcome.right[match] is not None:
            of_question.setdefault(outcome.index, []).append(outcome.right[match])
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
    """Return the unbiased pass@k estimate from `n` episodes of which `right` are correct.

    1 - C(n - right, k) / C(n, k) (arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def interval(
    values: np.ndarray, seed: int = 0, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[float] | None:
    """Return a 95 % confidence interval of the mean, [low, high], or None if `values` is empty.

    For values that vary this is the percentile bootstrap (Efron and Tibshirani 1993, section 13.3):
    the 2.5th and 97.5th percentiles of the mean over 10,000 resamples of size n. If all values are
    equal, the bootstrap interval has zero width. Instead, the share of unseen questions that may
    differ is bounded by Wilson's upper limit for 0 of n, and their values by `bounds`, so the
    width is never zero. For all-right and all-wrong samples this is Wilson's interval (Wilson
    1927); for pairs that all agree, it extends by Wilson's upper limit to both sides.

    Args:
      values: float[n], one value for each question.
      seed: Seed of the resampling. The same values always give the same interval.
      bounds: Smallest and largest possible value; -1 and 1 for differences.
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
    """Return the upper end of Wilson's 95 % interval for a proportion with 0 of n successes."""
    return float(stats.binomtest(0, n).proportion_ci(0.95, method="wilson").high)


def searches(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compute search statistics; `outcomes` may be empty.

    Returns:
      A dict with these keys, in which shares of an empty `outcomes` are None:
        `made`, `allowed`: Total number of searches made, and allowed.
        `made_of_allowed`: `made` / `allowed`, one of the two published search ratios; None if no
          search was allowed.
        `share`: Share of the episodes with at least one search, the other published search ratio.
        `an_episode`: Mean number of searches of an episode.
        `refused`: Total number of refused searches.
        `failed`: Share of the searches made that failed, 0 if none was made.
        `image_search`, `text_search`: `made`, `share` and `failed` of this kind alone.
        `only_image_search`, `only_text_search`, `both`, `none`: Shares of the episodes.
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
    """Return the mean, or None if `values` is empty."""
    values = [float(value) for value in values]
    return math.fsum(values) / len(values) if values else None
