"""Metrics of hand-made episodes, and statistics against exact computations in plain Python."""

import dataclasses
import fractions
import io
import itertools
import json
import math

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmsr1_jax.config.settings import Config, ConfigError, Eval, validate
from mmsr1_jax.data import DataError
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.evaluation.compare import compare, compare_files, mcnemar
from mmsr1_jax.evaluation.extraction import score_documents
from mmsr1_jax.evaluation.metrics import compute_metrics, confidence_interval, pass_at_k
from mmsr1_jax.evaluation.run import EvalQuestions, to_line
from mmsr1_jax.evaluation.scoring import compute_results, rescore
from mmsr1_jax.evaluation.table import format_results
from tests.evaluations import judged, line, outcome


def test_metrics_of_several_episodes():
    """The last of six episodes could not be run, so it only counts as wrong."""
    result = compute_metrics([
        outcome(0, True, category="free", source="a", tokens=40, tokens_sampled=4),
        outcome(1, True, "it", category="both", source="a", reward=0.9, tokens=160),
        outcome(2, False, "T", category="both", source="b", allowed=1, refused=2, format=False),
        outcome(3, False, "tt", category="both", source="b", end="turns"),
        outcome(4, True, "i", category="free", source="b", tokens_sampled=16),
        outcome(5, False, category="free", source="b", end="error", turns=0, tokens=0,
                tokens_sampled=0, format=False),
    ])  # fmt: skip
    assert result["questions"] == result["episodes"] == 6 and result["errors"] == 1
    assert result["accuracy"]["em"]["mean"] == 0.5 and set(result["accuracy"]) == {"em", "subem"}
    assert result["reward"] == pytest.approx(2.9 / 6) and result["format"] == 4 / 6
    assert result["turns"] == 11 / 5 and result["tokens"] == 500 / 5
    assert result["tokens_sampled"] == 50 / 5
    assert result["end"] == {"answer": 4 / 6, "error": 1 / 6, "turns": 1 / 6}
    assert result["searches"] == {
        "made": 6, "allowed": 9, "fraction_of_allowed": 6 / 9, "episode_fraction": 4 / 5,
        "per_episode": 6 / 5, "refused": 2, "failed": 1 / 6,
        "image_search": {"made": 2, "episode_fraction": 2 / 5, "failed": 0.0},
        "text_search": {"made": 4, "episode_fraction": 3 / 5, "failed": 1 / 4},
        "only_image_search": 1 / 5, "only_text_search": 2 / 5, "both": 1 / 5, "none": 1 / 5,
    }  # fmt: skip
    both, free = result["by_category"]["both"], result["by_category"]["free"]
    assert both["accuracy"]["em"]["mean"] == 1 / 3 and both["searches"]["episode_fraction"] == 1.0
    assert free["searches"]["per_episode"] == 1 / 2 and free["errors"] == 1
    assert result["by_source"]["a"]["searches"]["fraction_of_allowed"] == 2 / 4
    assert result["by_source"]["b"]["questions"] == 4


def test_the_search_ratio_is_undefined_without_allowed_searches():
    result = compute_metrics([outcome(0, True, allowed=0), outcome(1, False, allowed=0)])
    searches = result["searches"]
    assert searches["fraction_of_allowed"] is None
    assert searches["episode_fraction"] == searches["failed"] == 0.0


@pytest.mark.parametrize("n, correct", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (8, 1)])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_episode(n, correct):
    outcomes = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        sets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(k, n, correct) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)


def test_several_episodes_per_question():
    outcomes = {0: [1, 1, 0, 0], 1: [0, 0, 0, 0], 2: [1, 0, 0, 0]}
    result = compute_metrics([
        outcome(number, bool(correct), sample=sample)
        for number, episodes in outcomes.items() for sample, correct in enumerate(episodes)
    ])  # fmt: skip
    assert result["questions"] == 3 and result["episodes"] == 12
    em = result["accuracy"]["em"]
    assert em["mean"] == pytest.approx((0.5 + 0 + 0.25) / 3)
    # 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2
    assert em["pass@k"] == pytest.approx({"1": 0.25, "2": (5 / 6 + 1 / 2) / 3, "4": 2 / 3})
    low, high = em["interval"]
    assert 0.0 <= low < em["mean"] < high <= 0.5


def test_episodes_without_a_verdict_are_excluded():
    result = compute_metrics(
        [judged(0, False, True), judged(1, False, None), judged(2, False, False)]
    )
    assert result["accuracy"]["em"]["mean"] == 0.0
    assert result["accuracy"]["judge"]["mean"] == 0.5
    assert result["accuracy"]["judge"]["no_verdict"] == 1


@pytest.mark.parametrize("n, correct", [(40, 12), (100, 37), (7, 3)])
def test_the_interval_equals_the_exact_bootstrap(n, correct):
    """The mean of a resample of zeros and ones is binomial, with exactly known quantiles."""
    fraction = correct / n
    masses = [math.comb(n, k) * fraction**k * (1 - fraction) ** (n - k) for k in range(n + 1)]
    expected = [float(np.searchsorted(np.cumsum(masses), q)) / n for q in (0.025, 0.975)]
    result = confidence_interval(np.array([1.0] * correct + [0.0] * (n - correct)))
    np.testing.assert_allclose(result, expected, atol=1e-12)


def test_the_interval_of_many_values_is_nearly_normal():
    values = np.random.default_rng(1).normal(size=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    expected = [values.mean() - half, values.mean() + half]
    np.testing.assert_allclose(confidence_interval(values), expected, atol=0.1 * half)
    assert confidence_interval(values) == confidence_interval(values)


@pytest.mark.parametrize("a, b", [(0, 0), (1, 0), (5, 1), (3, 3), (2, 9)])
def test_mcnemar_equals_enumeration(a, b):
    n = a + b
    extreme = sum(
        abs(sum(flips) - fractions.Fraction(n, 2)) >= abs(a - fractions.Fraction(n, 2))
        for flips in itertools.product((0, 1), repeat=n)
    )
    assert mcnemar(a, b) == pytest.approx(extreme / 2**n, abs=1e-12)


def test_workflows_are_compared_question_by_question():
    a = [outcome(n, correct) for n, correct in enumerate([True, True, True, False, True])]
    b = [outcome(n, correct) for n, correct in enumerate([True, False, False, False])]
    result = compare(a, b[::-1], "em")
    assert result["questions"] == 4 and result["skipped"] == 1
    assert result["correct"] == {"both": 1, "only_a": 2, "only_b": 0, "neither": 1}
    assert result["accuracy"] == [0.75, 0.25] and result["difference"] == 0.5
    assert result["p"] == pytest.approx(0.5)
    assert result["interval"] == confidence_interval(np.array([0.0, 1.0, 1.0, 0.0]))
    other = [dataclasses.replace(o, id="other") for o in b]
    with pytest.raises(ValueError, match="no judged question in common"):
        compare(a, other, "em")
    with pytest.raises(ValueError, match="no judged question in common"):
        compare(a, b, "judge")


def test_several_episodes_are_compared_by_their_mean():
    a = [outcome(0, correct, sample=i) for i, correct in enumerate([True, False])]
    b = [outcome(0, False)]
    result = compare(a, b, "em")
    assert result["difference"] == 0.5 and result["p"] is None and result["correct"] is None


def test_a_duplicate_question_counts_twice():
    twice = [dataclasses.replace(outcome(n, n == 0), id="x", question="y") for n in (0, 1)]
    result = compare(twice, twice, "em")
    assert result["questions"] == 2 and result["correct"]["both"] == 1


def test_a_benchmark_is_scored_by_its_own_rules(tmp_path, processor):
    """OK-VQA: an answer of three of ten annotators scores 0.9."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (60, 40), (9, 9, 9)).save(file, "png")
    rows = [
        {"question_id": str(n), "image": {"bytes": file.getvalue(), "path": None},
         "question": "What is it?", "answers": ["sea"] * 3 + ["sky"] * 7, "question_type": "four"}
        for n in range(3)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "val2014-00000-of-00001.parquet")
    config = Config(eval=Eval(data=(str(tmp_path),), benchmark="okvqa", max_questions=2))
    source = EvalQuestions(config, processor.images)
    assert [q.id for q in source] == [q.id for q in source] == ["0", "1"]
    question = next(iter(source))
    episode = Episode(example=question.example(), group=0, index=0, end="answer")
    episode.turns.append(Turn("answer", "The sea", "r", None))
    converted = to_line(episode, question, "direct", config, processor, tmp_path)
    assert converted["score"] == pytest.approx(0.9) and converted["em"]
    path = tmp_path / "episodes.jsonl"
    second = converted | {"index": 1, "group": 1, "score": 0.0}
    path.write_text(json.dumps(converted) + "\n" + json.dumps(second) + "\n")
    results = rescore(Config(), path, None)
    result = results["workflows"]["direct"]["accuracy"]["score"]
    assert result["mean"] == pytest.approx(0.45) and "pass@k" not in result
    assert "45.0 [0.0, 90.0]" in format_results(results)
    config.eval.benchmark = "nothing"
    with pytest.raises(DataError, match="unknown benchmark 'nothing'"):
        EvalQuestions(config, processor.images)


def test_f1_covers_unanswerable_questions(tmp_path):
    """MMLongBench-Doc: one correct answer, and one to an unanswerable question."""
    path = tmp_path / "episodes.jsonl"
    episodes = [(0, "4", "4", "Int", 1.0), (1, "5", "Not answerable", "None", 0.0)]
    path.write_text(
        "".join(
            json.dumps(line(n, text, answers=[gold], answer_format=kind, score=score)) + "\n"
            for n, text, gold, kind, score in episodes
        )
    )
    result = score_documents(Config(), tmp_path, rescore(Config(), path, None))
    assert result["f1"] == {"direct": pytest.approx(2 / 3)}
    assert result["scored"] == "unchanged answers" and result["no_extraction"] == 0


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_samples", 3, "eval.temperature=0.0 must be greater than 0"),
        ("num_samples", 0, "eval.num_samples=0"), ("max_questions", -1, "eval.max_questions=-1"),
        ("temperature", -1.0, "eval.temperature=-1.0"), ("temperature", math.nan, "temperature"),
        ("workflows", ("rag", "x"), "eval.workflows='x' is not one of on_demand, rag"),
        ("workflows", (), "eval.workflows"),
    ],
)  # fmt: skip
def test_invalid_settings_are_named(field, value, message):
    config = Config()
    setattr(config.eval, field, value)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_results_are_formatted_and_files_compared(tmp_path):
    outcomes = {
        "on_demand": [judged(0, True, True), judged(1, False, None)],
        "direct": [
            dataclasses.replace(judged(n, False, False), workflow="direct", allowed=0)
            for n in (0, 1)
        ],
    }
    results = compute_results(outcomes, {"model": "m"})
    assert json.loads(json.dumps(results)) == results
    assert [(c["a"], c["b"], c["criterion"]) for c in results["comparisons"]] == [
        ("on_demand", "direct", "em"), ("on_demand", "direct", "judge"),
    ]  # fmt: skip
    text = format_results(results)
    rows = {row.split()[0]: row for row in text.splitlines()[:4]}
    assert "50.0 [0.0, 100.0]" in rows["on_demand"] and ", 1 not judged" in rows["on_demand"]
    assert " - " in rows["direct"]  # no search was allowed
    assert "on_demand - direct: +50.0" in text and "1 against 0, p = 1" in text

    for name, answer in (("a", "Paris"), ("b", "Rome")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "episodes.jsonl"
        path.write_text(json.dumps(line(answer=answer)) + "\n")
    text = compare_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"{tmp_path / 'a'}:direct - {tmp_path / 'b'}:direct: +100.0" in text.splitlines()[0]
    assert len(text.splitlines()) == 2  # by EM and SubEM
    for name in ("10:30", "rag"):  # a colon in a name, and the name of a workflow
        (tmp_path / "a").rename(tmp_path / name)
        text = compare_files([f"{tmp_path / name}:direct", f"{tmp_path / 'b'}:direct"])
        assert text.startswith(f"{tmp_path / name}:direct - {tmp_path / 'b'}:direct: +100.0")
        assert compare_files([str(tmp_path / name), str(tmp_path / "b")]) == text
        (tmp_path / name).rename(tmp_path / "a")
    with pytest.raises(ValueError, match="no episode of rag"):
        compare_files([f"{tmp_path / 'a'}:rag", f"{tmp_path / 'b'}:direct"])
    with pytest.raises(ValueError, match="two directories"):
        compare_files(["x"])
