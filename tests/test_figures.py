"""Figures of hand-made episodes, whose answers are known, and statistics against plain float64."""

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

from mmsr1_jax.config.settings import Config, ConfigError, Eval, Turns, validate
from mmsr1_jax.data import DataError
from mmsr1_jax.episodes import prompts
from mmsr1_jax.episodes.episode import Episode
from mmsr1_jax.episodes.turns import Turn
from mmsr1_jax.evaluation import records
from mmsr1_jax.evaluation.compare import compare, compare_files, mcnemar
from mmsr1_jax.evaluation.extraction import finish_documents
from mmsr1_jax.evaluation.metrics import Outcome, figures, interval, pass_at
from mmsr1_jax.evaluation.run import Source, line_of
from mmsr1_jax.evaluation.scoring import rescore, results_of
from mmsr1_jax.evaluation.table import table
from mmsr1_jax.evaluation.workflows import WORKFLOWS, allowed, limits_of


def outcome(number, right, made="", **fields) -> Outcome:
    """`made`: a letter for each search, i or t, capital where it failed."""
    kinds = {"image_search": "i", "text_search": "t"}
    known = {
        "workflow": "on_demand", "sample": 0, "id": f"q{number}", "question": f"What is {number}?",
        "source": "s", "category": "", "right": {"em": right, "subem": right, "judge": None,
        "score": None}, "reward": float(right), "format": True,
        "made": {kind: made.lower().count(letter) for kind, letter in kinds.items()},
        "failed": {kind: made.count(letter.upper()) for kind, letter in kinds.items()},
        "refused": 0, "allowed": 2, "turns": 1 + len(made), "tokens": 100, "tokens_sampled": 10,
        "end": "answer",
    }  # fmt: skip
    return Outcome(index=number, **known | fields)


def test_searches():
    """Six episodes; the last could not be run, and counts only as wrong."""
    found = figures([
        outcome(0, True, category="free", source="a", tokens=40, tokens_sampled=4),
        outcome(1, True, "it", category="both", source="a", reward=0.9, tokens=160),
        outcome(2, False, "T", category="both", source="b", allowed=1, refused=2, format=False),
        outcome(3, False, "tt", category="both", source="b", end="turns"),
        outcome(4, True, "i", category="free", source="b", tokens_sampled=16),
        outcome(5, False, category="free", source="b", end="error", turns=0, tokens=0,
                tokens_sampled=0, format=False),
    ])  # fmt: skip
    assert found["questions"] == found["episodes"] == 6 and found["errors"] == 1
    assert found["accuracy"]["em"]["mean"] == 0.5 and set(found["accuracy"]) == {"em", "subem"}
    assert found["reward"] == pytest.approx(2.9 / 6) and found["format"] == 4 / 6
    assert found["turns"] == 11 / 5 and found["tokens"] == 500 / 5
    assert found["tokens_sampled"] == 50 / 5
    assert found["end"] == {"answer": 4 / 6, "error": 1 / 6, "turns": 1 / 6}
    assert found["searches"] == {
        "made": 6, "allowed": 9, "made_of_allowed": 6 / 9, "share": 4 / 5, "an_episode": 6 / 5,
        "refused": 2, "failed": 1 / 6,
        "image_search": {"made": 2, "share": 2 / 5, "failed": 0.0},
        "text_search": {"made": 4, "share": 3 / 5, "failed": 1 / 4},
        "only_image_search": 1 / 5, "only_text_search": 2 / 5, "both": 1 / 5, "none": 1 / 5,
    }  # fmt: skip
    both, free = found["by_category"]["both"], found["by_category"]["free"]
    assert both["accuracy"]["em"]["mean"] == 1 / 3 and both["searches"]["share"] == 1.0
    assert free["searches"]["an_episode"] == 1 / 2 and free["errors"] == 1
    assert found["by_source"]["a"]["searches"]["made_of_allowed"] == 2 / 4
    assert found["by_source"]["b"]["questions"] == 4


def test_where_nothing_may_be_searched_there_is_no_ratio():
    found = figures([outcome(0, True, allowed=0), outcome(1, False, allowed=0)])["searches"]
    assert found["made_of_allowed"] is None and found["share"] == 0.0 and found["failed"] == 0.0


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (8, 1)])
def test_pass_at_k_is_the_share_of_sets_with_a_right_one(n, right):
    rights = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        sets = list(itertools.combinations(rights, k))
        assert pass_at(k, n, right) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)


def test_several_episodes_of_a_question():
    rights = {0: [1, 1, 0, 0], 1: [0, 0, 0, 0], 2: [1, 0, 0, 0]}
    found = figures([
        outcome(number, bool(right), sample=sample)
        for number, some in rights.items() for sample, right in enumerate(some)
    ])  # fmt: skip
    assert found["questions"] == 3 and found["episodes"] == 12
    em = found["accuracy"]["em"]
    assert em["mean"] == pytest.approx((0.5 + 0 + 0.25) / 3)
    # 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2
    assert em["pass@k"] == pytest.approx({"1": 0.25, "2": (5 / 6 + 1 / 2) / 3, "4": 2 / 3})
    low, high = em["interval"]
    assert 0.0 <= low < em["mean"] < high <= 0.5


def judged(number, em, judge):
    right = {"em": em, "subem": em, "judge": judge, "score": None}
    return dataclasses.replace(outcome(number, em), right=right)


def test_no_verdict_is_neither_right_nor_wrong():
    found = figures([judged(0, False, True), judged(1, False, None), judged(2, False, False)])
    assert found["accuracy"]["em"]["mean"] == 0.0
    assert found["accuracy"]["judge"]["mean"] == 0.5
    assert found["accuracy"]["judge"]["no_verdict"] == 1


@pytest.mark.parametrize("n, right", [(40, 12), (100, 37), (7, 3)])
def test_the_interval_is_the_bootstraps(n, right):
    """Of zeros and ones the mean of a resample is binomial: its quantiles are known exactly."""
    share = right / n
    masses = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    expected = [float(np.searchsorted(np.cumsum(masses), q)) / n for q in (0.025, 0.975)]
    found = interval(np.array([1.0] * right + [0.0] * (n - right)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_intervals_of_many():
    values = np.random.default_rng(1).normal(size=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    expected = [values.mean() - half, values.mean() + half]
    np.testing.assert_allclose(interval(values), expected, atol=0.1 * half)
    assert interval(values) == interval(values)


@pytest.mark.parametrize("a, b", [(0, 0), (1, 0), (5, 1), (3, 3), (2, 9)])
def test_mcnemar_by_going_through_all_cases(a, b):
    n = a + b
    extreme = sum(
        abs(sum(flips) - fractions.Fraction(n, 2)) >= abs(a - fractions.Fraction(n, 2))
        for flips in itertools.product((0, 1), repeat=n)
    )
    assert mcnemar(a, b) == pytest.approx(extreme / 2**n, abs=1e-12)


def test_compared_question_by_question():
    a = [outcome(n, right) for n, right in enumerate([True, True, True, False, True])]
    b = [outcome(n, right) for n, right in enumerate([True, False, False, False])]
    found = compare(a, b[::-1], "em")
    assert found["questions"] == 4 and found["left_out"] == 1
    assert found["right"] == {"both": 1, "only_a": 2, "only_b": 0, "neither": 1}
    assert found["accuracy"] == [0.75, 0.25] and found["difference"] == 0.5
    assert found["p"] == pytest.approx(0.5)
    assert found["interval"] == interval(np.array([0.0, 1.0, 1.0, 0.0]))
    other = [dataclasses.replace(o, id="other") for o in b]
    with pytest.raises(ValueError, match="no question is in both"):
        compare(a, other, "em")
    with pytest.raises(ValueError, match="no question is in both"):
        compare(a, b, "judge")


def test_several_episodes_are_compared_by_their_shares():
    a = [outcome(0, right, sample=i) for i, right in enumerate([True, False])]
    b = [outcome(0, False)]
    found = compare(a, b, "em")
    assert found["difference"] == 0.5 and found["p"] is None and found["right"] is None


def test_a_question_that_comes_twice_is_two():
    twice = [dataclasses.replace(outcome(n, n == 0), id="x", question="y") for n in (0, 1)]
    found = compare(twice, twice, "em")
    assert found["questions"] == 2 and found["right"]["both"] == 1


def line(number=0, answer="Paris", **fields):
    known = {
        "id": f"q{number}", "question": "Where?", "group": number, "index": number, "sample": 0,
        "workflow": "direct", "end": "answer", "error": None, "answer": answer,
        "turns": [dataclasses.asdict(Turn("answer", answer, "r", None))], "calls": [],
        "images": ["pictures/a.png"], "segments": [], "answers": ["paris"], "category": "c",
        "source": "s", "reward": {"reward": 1.0, "format": True}, "allowed": 0, "tokens": 9,
        "tokens_sampled": 4, "em": None, "subem": None, "judge": None,
    }  # fmt: skip
    return known | fields


def call(action, status):
    return {"turn": 0, "action": action, "query": None, "status": status}


def test_what_a_line_says():
    calls = [call("image_search", "ok"), call("text_search", "failed"),
             call("text_search", "empty"), call("text_search", "refused")]  # fmt: skip
    found = records.outcome_of(
        line(2, "in Paris.", calls=calls, judge={"correct": True}, allowed=2)
    )
    assert found.right == {"em": False, "subem": True, "judge": True, "score": None}
    assert found.made == {"image_search": 1, "text_search": 2} and found.refused == 1
    assert found.failed == {"image_search": 0, "text_search": 1} and found.searches == 3
    assert (found.workflow, found.index, found.turns, found.tokens) == ("direct", 2, 1, 9)


def test_pictures_are_found_from_another_folder(tmp_path):
    moved = records.moved(line(), tmp_path / "a", tmp_path / "b" / "c")
    assert moved["images"] == ["../../a/pictures/a.png"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"), ("[1]", "must be an object"), ("[" * 100_000, "not JSON"),
        ("{}", "no episode of an evaluation .lacks 'calls'"),
        (json.dumps(line(answers=3)), "no episode of an evaluation"),
        ('{"ground_truth": "x"}', "no recorded answer"),
        ('{"ground_truth": 1, "turns": [], "question": ""}', ".*answers must be texts"),
        ("\udcff", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_episode(tmp_path, text, message):
    path = tmp_path / "episodes.jsonl"
    good = json.dumps(line()).encode()
    path.write_bytes(good + b"\n\n" + text.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(DataError, match=f"episodes.jsonl, line 3: {message}"):
        list(records.scan(path))


def test_a_line_that_was_cut_off_is_cut_away(tmp_path):
    path = tmp_path / "episodes.jsonl"
    records.truncate_partial_line(path)
    whole = json.dumps(line()) + "\n"
    path.write_text(whole + whole[:40])
    records.truncate_partial_line(path)
    assert path.read_text() == whole


def test_limits_of_workflows():
    limits = Turns(max_turns=5, max_searches=4, max_image_searches=1, max_text_searches=3)
    assert limits_of("on_demand", limits) is limits and limits_of("agent", limits) is limits
    direct, rag = limits_of("direct", limits), limits_of("rag", limits)
    assert (direct.max_turns, direct.max_searches, rag.max_turns, rag.max_searches) == (1, 0, 3, 2)
    assert direct.max_episode_tokens == rag.max_episode_tokens == limits.max_episode_tokens
    assert [allowed(limits, picture) for picture in (True, False)] == [4, 3]
    assert [allowed(rag, picture) for picture in (True, False)] == [2, 1]
    assert allowed(direct, True) == 0


def test_a_benchmark_is_read_and_scored_by_its_own_rules(tmp_path, processor):
    """OK-VQA: three of ten people said it, which is 0.9."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (60, 40), (9, 9, 9)).save(file, "png")
    rows = [
        {"question_id": str(n), "image": {"bytes": file.getvalue(), "path": None},
         "question": "What is it?", "answers": ["sea"] * 3 + ["sky"] * 7, "question_type": "four"}
        for n in range(3)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "val2014-00000-of-00001.parquet")
    config = Config(eval=Eval(data=(str(tmp_path),), benchmark="okvqa", max_questions=2))
    source = Source(config, processor.images)
    assert [q.id for q in source] == [q.id for q in source] == ["0", "1"]
    question = next(iter(source))
    episode = Episode(example=question.example(), group=0, index=0, end="answer")
    episode.turns.append(Turn("answer", "The sea", "r", None))
    made = line_of(episode, question, "direct", config, processor, tmp_path)
    assert made["score"] == pytest.approx(0.9) and made["em"]
    path = tmp_path / "episodes.jsonl"
    second = made | {"index": 1, "group": 1, "score": 0.0}
    path.write_text(json.dumps(made) + "\n" + json.dumps(second) + "\n")
    results = rescore(Config(), path, None)
    found = results["workflows"]["direct"]["accuracy"]["score"]
    assert found["mean"] == pytest.approx(0.45) and "pass@k" not in found
    assert "45.0 [0.0, 90.0]" in table(results)
    config.eval.benchmark = "nothing"
    with pytest.raises(DataError, match="unknown benchmark 'nothing'"):
        Source(config, processor.images)


def test_unanswerable_questions_have_an_f1(tmp_path):
    """Of MMLongBench-Doc: one answer, which is right, and two that there might have been."""
    path = tmp_path / "episodes.jsonl"
    some = [(0, "4", "4", "Int", 1.0), (1, "5", "Not answerable", "None", 0.0)]
    path.write_text(
        "".join(
            json.dumps(line(n, said, answers=[gold], answer_format=kind, score=score)) + "\n"
            for n, said, gold, kind, score in some
        )
    )
    found = finish_documents(Config(), tmp_path, rescore(Config(), path, None))
    assert found["f1"] == {"direct": pytest.approx(2 / 3)}
    assert found["scored"] == "answers as they are" and found["no_extraction"] == 0


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_samples", 3, "eval.temperature=0.0 must not be negative, and over 0"),
        ("num_samples", 0, "eval.num_samples=0"), ("max_questions", -1, "eval.max_questions=-1"),
        ("temperature", -1.0, "eval.temperature=-1.0"), ("temperature", math.nan, "temperature"),
        ("workflows", ("rag", "x"), "eval.workflows='x' is not one of on_demand, rag"),
        ("workflows", (), "eval.workflows"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(field, value, message):
    config = Config()
    setattr(config.eval, field, value)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_prompts_of_workflows(tmp_path):
    """Each its own question; those of a directory come before what is built in."""
    trained = prompts.load()
    assert prompts.load(None, "on_demand") == trained
    asked = {name: prompts.load(None, name)["question"] for name in WORKFLOWS}
    assert len(set(asked.values())) == 4
    for name in WORKFLOWS:
        texts = prompts.load(None, name)
        assert set(texts) == set(trained)
        assert "{images}" in texts["question"] and "{question}" in texts["question"]
        for kind in ("after_image_search", "after_text_search"):
            assert "<information>\n" in texts[kind] and "\n{results}\n</info" in texts[kind]
    (tmp_path / "question.txt").write_text("{images} {question}")
    assert prompts.load(tmp_path, "rag")["question"] == "{images} {question}"
    rag = prompts.load(None, "rag")["after_text_search"]
    assert prompts.load(tmp_path, "rag")["after_text_search"] == rag != trained["after_text_search"]
    (tmp_path / "rag").mkdir()
    (tmp_path / "rag" / "question.txt").write_text("{images} {question}?")
    assert prompts.load(tmp_path, "rag")["question"] == "{images} {question}?"
    assert prompts.load(tmp_path, "direct")["question"] == "{images} {question}"
    (tmp_path / "rag" / "question.txt").write_text("{images}")
    with pytest.raises(prompts.PromptsError, match="lacks {question}"):
        prompts.load(tmp_path, "rag")


def test_the_table_and_a_comparison_of_files(tmp_path):
    outcomes = {
        "on_demand": [judged(0, True, True), judged(1, False, None)],
        "direct": [
            dataclasses.replace(judged(n, False, False), workflow="direct", allowed=0)
            for n in (0, 1)
        ],
    }
    results = results_of(outcomes, {"model": "m"})
    assert json.loads(json.dumps(results)) == results
    assert [(c["a"], c["b"], c["match"]) for c in results["comparisons"]] == [
        ("on_demand", "direct", "em"), ("on_demand", "direct", "judge"),
    ]  # fmt: skip
    text = table(results)
    rows = {row.split()[0]: row for row in text.splitlines()[:4]}
    assert "50.0 [0.0, 100.0]" in rows["on_demand"] and ", 1 open" in rows["on_demand"]
    assert " - " in rows["direct"]  # made of allowed
    assert "on_demand - direct: +50.0" in text and "1 against 0, p = 1" in text

    for name, answer in (("a", "Paris"), ("b", "Rome")):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "episodes.jsonl"
        path.write_text(json.dumps(line(answer=answer)) + "\n")
    said = compare_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"{tmp_path / 'a'}:direct - {tmp_path / 'b'}:direct: +100.0" in said.splitlines()[0]
    assert len(said.splitlines()) == 2  # by EM and SubEM
    for name in ("10:30", "rag"):  # a colon in a name, and a workflow's
        (tmp_path / "a").rename(tmp_path / name)
        said = compare_files([f"{tmp_path / name}:direct", f"{tmp_path / 'b'}:direct"])
        assert said.startswith(f"{tmp_path / name}:direct - {tmp_path / 'b'}:direct: +100.0")
        assert compare_files([str(tmp_path / name), str(tmp_path / "b")]) == said
        (tmp_path / name).rename(tmp_path / "a")
    with pytest.raises(ValueError, match="no episode of rag"):
        compare_files([f"{tmp_path / 'a'}:rag", f"{tmp_path / 'b'}:direct"])
    with pytest.raises(ValueError, match="two directories"):
        compare_files(["x"])
