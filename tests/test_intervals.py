"""Figures of few answers, of equal ones and of none claim no more than is known."""

import json

import numpy as np
import pytest
from scipy import stats

from mmsr1_jax.evaluation.compare import compare
from mmsr1_jax.evaluation.metrics import accuracy, figures, interval
from mmsr1_jax.evaluation.scoring import results_of
from mmsr1_jax.evaluation.table import compared, table
from tests.test_figures import outcome


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000])
def test_intervals_of_all_right_and_all_wrong_are_wilsons(n):
    for value in (0, 1):
        expected = stats.binomtest(value * n, n).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(interval(np.full(n, float(value))), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 200])
@pytest.mark.parametrize("value", [-1.0, -0.25, 0.0, 0.3, 1.0])
def test_no_interval_has_zero_width(n, value):
    """Of values that are the same, to the bit or to rounding; the true mean may be elsewhere."""
    same = np.full(n, value) + 1e-16 * np.arange(n)
    low, high = interval(same, bounds=(-1.0, 1.0))
    assert -1 <= low <= value <= high <= 1
    assert high - low >= 2 * stats.binomtest(0, n).proportion_ci(0.95, method="wilson").high - 1e-9
    if value >= 0:
        within = interval(same)
        assert 0 <= within[0] <= value <= within[1] <= 1 and within[1] - within[0] > 3 / (n + 4)


def test_the_interval_of_pairs_that_all_agree_holds_the_true_difference():
    """One of 20 questions is right by a only: seldom are 30 drawn that all agree."""
    rng, n = np.random.default_rng(0), 30
    draws = (rng.random((400, n)) < 0.05).astype(float)
    agree = [interval(values, bounds=(-1.0, 1.0)) for values in draws if not values.any()]
    assert len(agree) > 50 and all(low < 0 < 0.05 < high for low, high in agree)


def test_no_values_have_no_interval_and_no_mean():
    assert interval(np.zeros(0)) is None
    found = accuracy([outcome(0, True)], "judge")
    assert found == {"mean": None, "interval": None, "no_verdict": 1}


def test_episodes_of_one_question_are_one_observation():
    right = figures([outcome(0, True, sample=i) for i in range(8)])["accuracy"]["em"]
    assert right["mean"] == 1.0 and right["pass@k"] == {"1": 1.0, "2": 1.0, "4": 1.0, "8": 1.0}
    assert right["interval"] == pytest.approx(interval(np.ones(1)))
    half = figures([outcome(n, i == 0, sample=i) for n in (0, 1) for i in (0, 1)])
    low, high = half["accuracy"]["em"]["interval"]
    assert low < 0.25 and high > 0.75  # two questions, each right half of the time


def test_pass_at_k_is_of_all_questions():
    some = [outcome(0, True, sample=i) for i in range(8)]
    some += [outcome(1, False, sample=i) for i in range(2)]
    assert figures(some)["accuracy"]["em"]["pass@k"] == {"1": 0.5, "2": 0.5}
    assert "pass@k" not in figures([*some, outcome(2, True)])["accuracy"]["em"]


def test_where_no_episode_could_be_run_nothing_is_said_of_searches():
    found = results_of({"direct": [
        outcome(n, False, workflow="direct", end="error", turns=0, category="c") for n in (0, 1)
    ]}, {})  # fmt: skip
    one = found["workflows"]["direct"]
    assert one["errors"] == 2 and one["accuracy"]["em"]["mean"] == 0.0
    assert one["turns"] is one["tokens"] is one["tokens_sampled"] is None
    assert one["searches"]["share"] is one["searches"]["an_episode"] is None
    assert json.loads(json.dumps(found)) == found
    row = next(row for row in table(found).splitlines() if row.startswith("direct"))
    assert "0.0 [0.0, 65.8]" in row and row.split()[-5:] == ["-"] * 5


def test_an_equal_or_opposite_pair_of_workflows_is_no_certainty():
    right, wrong = ([outcome(n, value) for n in range(4)] for value in (True, False))
    same = compare(right, right, "em")
    assert same["difference"] == 0 and same["interval"] == pytest.approx(
        [-0.4899, 0.4899], abs=1e-4
    )
    apart = compare(right, wrong, "em")
    assert apart["difference"] == 1 and apart["interval"] == pytest.approx([0.0202, 1.0], abs=1e-4)
    assert compare(right[:1], wrong[:1], "em")["interval"][0] < 0


def test_a_comparison_says_how_many_questions_are_left_out():
    found = compare(
        [outcome(n, True) for n in range(5)], [outcome(n, False) for n in (3, 4, 7)], "em"
    )
    line = compared({"a": "x", "b": "y", **found})
    assert "2 questions, 2 against 0" in line and line.endswith(
        "; 4 questions left out: in only one of them, or not judged"
    )


def test_a_category_says_of_how_many_questions_it_is():
    text = table(results_of({"direct": [
        outcome(0, True, category="free"), outcome(1, True, category="both"),
        outcome(2, False, category="both"),
    ]}, {}))  # fmt: skip
    assert "50.0 / 0.0 of 2" in text and "100.0 / 0.0 of 1" in text
