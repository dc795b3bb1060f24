"""Metrics of few, equal or no answers do not overstate their certainty."""

import json

import numpy as np
import pytest
from scipy import stats

from mmsr1_jax.evaluation.compare import compare
from mmsr1_jax.evaluation.metrics import accuracy, compute_metrics, confidence_interval
from mmsr1_jax.evaluation.scoring import compute_results
from mmsr1_jax.evaluation.table import format_comparison, format_results
from tests.evaluations import outcome


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000])
def test_intervals_of_equal_answers_are_wilsons(n):
    for value in (0, 1):
        expected = stats.binomtest(value * n, n).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(
            confidence_interval(np.full(n, float(value))), expected, atol=1e-12
        )


@pytest.mark.parametrize("n", [1, 3, 200])
@pytest.mark.parametrize("value", [-1.0, -0.25, 0.0, 0.3, 1.0])
def test_no_interval_has_zero_width(n, value):
    """The true mean may differ from equal values, bit-identical or up to rounding."""
    equal = np.full(n, value) + 1e-16 * np.arange(n)
    low, high = confidence_interval(equal, bounds=(-1.0, 1.0))
    assert -1 <= low <= value <= high <= 1
    assert high - low >= 2 * stats.binomtest(0, n).proportion_ci(0.95, method="wilson").high - 1e-9
    if value >= 0:
        within = confidence_interval(equal)
        assert 0 <= within[0] <= value <= within[1] <= 1 and within[1] - within[0] > 3 / (n + 4)


def test_the_interval_of_agreeing_pairs_contains_the_true_difference():
    """If only a is correct on one of 20 questions, a sample of 30 that all agree is rare."""
    rng, n = np.random.default_rng(0), 30
    draws = (rng.random((400, n)) < 0.05).astype(float)
    agree = [
        confidence_interval(values, bounds=(-1.0, 1.0)) for values in draws if not values.any()
    ]
    assert len(agree) > 50 and all(low < 0 < 0.05 < high for low, high in agree)


def test_no_values_have_no_interval_and_no_mean():
    assert confidence_interval(np.zeros(0)) is None
    result = accuracy([outcome(0, True)], "judge")
    assert result == {"mean": None, "interval": None, "no_verdict": 1}


def test_episodes_of_one_question_are_one_observation():
    correct = compute_metrics([outcome(0, True, sample=i) for i in range(8)])["accuracy"]["em"]
    assert correct["mean"] == 1.0 and correct["pass@k"] == {"1": 1.0, "2": 1.0, "4": 1.0, "8": 1.0}
    assert correct["interval"] == pytest.approx(confidence_interval(np.ones(1)))
    half = compute_metrics([outcome(n, i == 0, sample=i) for n in (0, 1) for i in (0, 1)])
    low, high = half["accuracy"]["em"]["interval"]
    assert low < 0.25 and high > 0.75  # two questions, each correct half of the time


def test_pass_at_k_covers_all_questions():
    episodes = [outcome(0, True, sample=i) for i in range(8)]
    episodes += [outcome(1, False, sample=i) for i in range(2)]
    assert compute_metrics(episodes)["accuracy"]["em"]["pass@k"] == {"1": 0.5, "2": 0.5}
    assert "pass@k" not in compute_metrics([*episodes, outcome(2, True)])["accuracy"]["em"]


def test_search_metrics_are_undefined_if_no_episode_could_be_run():
    result = compute_results({"direct": [
        outcome(n, False, workflow="direct", end="error", turns=0, category="c") for n in (0, 1)
    ]}, {})  # fmt: skip
    metrics = result["workflows"]["direct"]
    assert metrics["errors"] == 2 and metrics["accuracy"]["em"]["mean"] == 0.0
    assert metrics["turns"] is metrics["tokens"] is metrics["tokens_sampled"] is None
    assert metrics["searches"]["episode_fraction"] is metrics["searches"]["per_episode"] is None
    assert json.loads(json.dumps(result)) == result
    row = next(row for row in format_results(result).splitlines() if row.startswith("direct"))
    assert "0.0 [0.0, 65.8]" in row and row.split()[-5:] == ["-"] * 5


def test_equal_or_opposite_workflows_have_a_wide_interval():
    correct, wrong = ([outcome(n, value) for n in range(4)] for value in (True, False))
    equal = compare(correct, correct, "em")
    assert equal["difference"] == 0 and equal["interval"] == pytest.approx(
        [-0.4899, 0.4899], abs=1e-4
    )
    apart = compare(correct, wrong, "em")
    assert apart["difference"] == 1 and apart["interval"] == pytest.approx([0.0202, 1.0], abs=1e-4)
    assert compare(correct[:1], wrong[:1], "em")["interval"][0] < 0


def test_a_comparison_counts_the_skipped_questions():
    result = compare(
        [outcome(n, True) for n in range(5)], [outcome(n, False) for n in (3, 4, 7)], "em"
    )
    line = format_comparison({"a": "x", "b": "y", **result})
    assert "2 questions, 2 against 0" in line and line.endswith(
        "; skipped 4 questions that only one side has or are not judged"
    )


def test_a_category_shows_its_number_of_questions():
    text = format_results(compute_results({"direct": [
        outcome(0, True, category="free"), outcome(1, True, category="both"),
        outcome(2, False, category="both"),
    ]}, {}))  # fmt: skip
    assert "50.0 / 0.0 of 2" in text and "100.0 / 0.0 of 1" in text
