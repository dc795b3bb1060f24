"""Metrics of completed episodes: accuracy and search behaviour.

Accuracy is a mean over questions; a question with several episodes contributes the mean over them.
Its confidence interval is also over questions, see `confidence_interval`. The mean over no
episodes is None, never 0 or NaN.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

# Criteria for a correct answer. "score": a benchmark's own rules.
CRITERIA: tuple[str, ...] = ("em", "subem", "judge", "score")
SEARCH_ACTIONS: tuple[str, ...] = ("image_search", "text_search")
_RESAMPLES = 10_000
_CHUNK = 500_000  # random numbers drawn at a time
_TOLERANCE = 1e-9  # smaller differences are rounding errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one episode, from which metrics are computed.

    Attributes:
      workflow: Workflow that produced the episode.
      index: Index of the question, the same in all workflows.
      sample: Index of the episode among those of its question.
      id, question, source, category: Fields of the question.
      correct: Correctness by each of `CRITERIA`, in [0, 1]; None without a verdict of the judge, or
        without a benchmark.
      reward, format: See `reward_function.Reward`; 0 and False if the episode could not be run.
      made, failed: Number of executed and of failed searches by each of `SEARCH_ACTIONS`.
      refused: Number of searches refused because they exceeded a limit.
      allowed: Maximum number of searches of the episode.
      turns, tokens, tokens_sampled: Totals over the episode.
      end: Reason why the episode ended.
    """

    workflow: str
    index: int
    sample: int
    id: str
    question: str
    source: str
    category: str
    correct: Mapping[str, float | None]
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
        """Number of executed searches."""
        return sum(self.made.values())


def compute_metrics(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compute the metrics of one workflow's episodes as plain data for JSON.

    Args:
      outcomes: At least one episode.

    Returns:
      A dict with these keys:
        `questions`, `episodes`: Counts.
        `errors`: Number of episodes that could not be run. They count as wrong, with reward 0, and
          are excluded from the means of `searches`, `turns` and tokens.
        `accuracy`: See `accuracy`, for each of `CRITERIA` with at least one verdict.
        `reward`, `format`: Means.
        `searches`: See `search_metrics`.
        `turns`, `tokens`, `tokens_sampled`: Means, None if no episode could be run.
        `end`: Fraction of the episodes for each way to end.
        `by_category`, `by_source`: The same metrics for each category and source.
    """
    metrics = _group_metrics(outcomes)
    for field in ("category", "source"):
        names = sorted({getattr(outcome, field) for outcome in outcomes} - {""})
        metrics[f"by_{field}"] = {
            name: _group_metrics([o for o in outcomes if getattr(o, field) == name])
            for name in names
        }
    return metrics


def _group_metrics(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    completed = [outcome for outcome in outcomes if outcome.end != "error"]
    ends = [outcome.end for outcome in outcomes]
    return {
        "questions": len({outcome.index for outcome in outcomes}),
        "episodes": len(outcomes),
        "errors": len(outcomes) - len(completed),
        "accuracy": {
            criterion: accuracy(outcomes, criterion)
            for criterion in CRITERIA
            if any(outcome.correct[criterion] is not None for outcome in outcomes)
        },
        "reward": _mean(outcome.reward for outcome in outcomes),
        "format": _mean(outcome.format for outcome in outcomes),
        "searches": search_metrics(completed),
        "turns": _mean(outcome.turns for outcome in completed),
        "tokens": _mean(outcome.tokens for outcome in completed),
        "tokens_sampled": _mean(outcome.tokens_sampled for outcome in completed),
        "end": {end: ends.count(end) / len(ends) for end in sorted(set(ends))},
    }


def accuracy(outcomes: Sequence[Outcome], criterion: str) -> dict[str, Any]:
    """Compute the accuracy by one of `CRITERIA`.

    Returns:
      A dict with these keys:
        `mean`: Mean over questions, None without any verdict.
        `interval`: 95 % confidence interval [low, high], see `confidence_interval`; None without
          any verdict.
        `no_verdict`: Number of episodes without a verdict, which are excluded.
        `pass@k`: pass@k by k. Present if each question has several episodes and each is either
          correct or wrong. k is at most the smallest number of episodes of any question, since a
          larger k would cover only some of the questions.
    """
    by_question: dict[int, list[float]] = {}
    for outcome in outcomes:
        value = outcome.correct[criterion]
        if value is not None:
            by_question.setdefault(outcome.index, []).append(value)
    counts = [(len(values), sum(values)) for values in by_question.values()]
    fractions = np.array([correct / n for n, correct in counts])
    result: dict[str, Any] = {
        "mean": _mean(fractions),
        "interval": confidence_interval(fractions),
        "no_verdict": sum(outcome.correct[criterion] is None for outcome in outcomes),
    }
    max_k = min((n for n, _ in counts), default=0)
    if max_k > 1 and criterion != "score":
        ks = sorted({2**i for i in range(max_k.bit_length())} | {max_k})
        result["pass@k"] = {str(k): _mean(pass_at_k(k, n, int(c)) for n, c in counts) for k in ks}
    return result


def pass_at_k(k: int, n: int, correct: int) -> float:
    """Return the unbiased pass@k estimate from `n` episodes of which `correct` are correct.

    1 - C(n - correct, k) / C(n, k) (arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def confidence_interval(
    values: np.ndarray, seed: int = 0, *, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[float] | None:
    """Return a 95 % confidence interval of the mean, [low, high], or None if `values` is empty.

    For values that vary this is the percentile bootstrap (Efron and Tibshirani 1993, section 13.3):
    the 2.5th and 97.5th percentiles of the mean over 10,000 resamples of size n. If all values are
    equal, the bootstrap interval has zero width. Instead, the fraction of unseen questions that may
    differ is bounded by Wilson's upper limit for 0 of n, and their values by `bounds`, so the
    width is never zero. For samples that are all correct or all wrong this is Wilson's interval
    (Wilson 1927); for pairs that all agree, it extends by Wilson's upper limit to both sides.

    Args:
      values: float[n], one value for each question.
      seed: Seed of the resampling. The same values always give the same interval.
      bounds: Smallest and largest possible value; -1 and 1 for differences.
    """
    rng, n = np.random.default_rng(seed), len(values)
    if not n:
        return None
    if np.ptp(values) < _TOLERANCE:
        value, unseen = float(values[0]), _max_unseen_fraction(n)
        return [value + unseen * (bound - value) for bound in bounds]
    means, chunk = [], max(1, _CHUNK // n)
    for start in range(0, _RESAMPLES, chunk):
        indices = rng.integers(0, n, (min(chunk, _RESAMPLES - start), n))
        means.append(values[indices].mean(axis=1))
    return [float(x) for x in np.percentile(np.concatenate(means), [2.5, 97.5])]


def _max_unseen_fraction(n: int) -> float:
    """Return the upper end of Wilson's 95 % interval for a proportion with 0 of n successes."""
    return float(stats.binomtest(0, n).proportion_ci(0.95, method="wilson").high)


def search_metrics(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compute search statistics; `outcomes` may be empty.

    Returns:
      A dict with these keys, in which means over no episode are None:
        `made`, `allowed`: Total number of executed and of allowed searches.
        `fraction_of_allowed`: `made` / `allowed`, one of the two published search ratios; None if
          no search was allowed.
        `episode_fraction`: Fraction of the episodes with at least one search, the other published
          search ratio.
        `per_episode`: Mean number of searches in an episode.
        `refused`: Total number of refused searches.
        `failed`: Fraction of the executed searches that failed; 0 without searches.
        `image_search`, `text_search`: `made`, `episode_fraction` and `failed` of this kind alone.
        `only_image_search`, `only_text_search`, `both`, `none`: Fractions of the episodes.
    """
    made = sum(outcome.searches for outcome in outcomes)
    allowed = sum(outcome.allowed for outcome in outcomes)
    failed = sum(sum(outcome.failed.values()) for outcome in outcomes)
    metrics: dict[str, Any] = {
        "made": made,
        "allowed": allowed,
        "fraction_of_allowed": made / allowed if allowed else None,
        "episode_fraction": _mean(outcome.searches > 0 for outcome in outcomes),
        "per_episode": _mean(outcome.searches for outcome in outcomes),
        "refused": sum(outcome.refused for outcome in outcomes),
        "failed": failed / made if made else 0.0,
    }
    for action in SEARCH_ACTIONS:
        action_made = sum(outcome.made[action] for outcome in outcomes)
        action_failed = sum(outcome.failed[action] for outcome in outcomes)
        metrics[action] = {
            "made": action_made,
            "episode_fraction": _mean(outcome.made[action] > 0 for outcome in outcomes),
            "failed": action_failed / action_made if action_made else 0.0,
        }
        metrics[f"only_{action}"] = _mean(
            outcome.made[action] == outcome.searches > 0 for outcome in outcomes
        )
    metrics["both"] = _mean(
        all(outcome.made[action] for action in SEARCH_ACTIONS) for outcome in outcomes
    )
    metrics["none"] = _mean(not outcome.searches for outcome in outcomes)
    return metrics


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None if `values` is empty."""
    values = [float(value) for value in values]
    return math.fsum(values) / len(values) if values else None
