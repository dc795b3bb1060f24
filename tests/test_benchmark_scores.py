"""Answers to benchmarks are scored by the rules of their papers."""

import dataclasses

import numpy as np
import pytest

from mmsr1_jax.data.benchmarks import NAMES, BenchmarkQuestion, accuracy_and_f1, score
from mmsr1_jax.data.benchmarks.scores import (
    document_score,
    extraction,
    read_extraction,
    token_f1,
    vqa_accuracy,
    vqa_normalise,
)

TEN = ["surf"] * 4 + ["surfing"] * 3 + ["sea", "", "water"]


def test_soft_accuracy_is_the_mean_over_sets_without_one():
    rng = np.random.default_rng(1)
    for _ in range(200):
        people = [f"w{number}" for number in rng.integers(0, 4, rng.integers(2, 12))]
        answer = f"w{rng.integers(0, 4)}"
        sets = [people[:i] + people[i + 1 :] for i in range(len(people))]
        wanted = np.mean([min(1.0, rest.count(answer) / 3) for rest in sets])
        assert vqa_accuracy(answer, people) == pytest.approx(wanted, abs=1e-12)
    assert vqa_accuracy(None, TEN) == vqa_accuracy(" ", TEN) == 0
    with pytest.raises(ValueError, match="at least two"):
        vqa_accuracy("a", ["a"])


def test_words_are_compared_as_the_vqa_challenge_does():
    for text, wanted in {
        "The  Two dogs.": "2 dogs",
        "1,000 people": "1000 people",
        "red/white": "red white",
        "red, white": "red white",
        "dont know": "don't know",
        "Don't": "don't",
        "3.5 m.": "3.5 m",
        "a.m.": "am",
        "were well": "were well",
        "yall": "y'all",
    }.items():
        assert vqa_normalise(text) == wanted


def anls(gold, said):
    """1 - edit distance / longer length, 0 up to 0.5, by the full table."""
    cells = np.zeros((len(gold) + 1, len(said) + 1))
    cells[:, 0], cells[0] = np.arange(len(gold) + 1), np.arange(len(said) + 1)
    for i in range(len(gold)):
        for j in range(len(said)):
            swap = cells[i, j] + (gold[i] != said[j])
            cells[i + 1, j + 1] = min(swap, cells[i, j + 1] + 1, cells[i + 1, j] + 1)
    value = 1 - cells[-1, -1] / max(len(gold), len(said))
    return value if value > 0.5 else 0.0


def test_texts_of_documents_are_compared_by_edit_distance():
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(400):
        gold = "x" + "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        said = "x" + "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        wanted = anls(gold, said)
        assert document_score(said.upper(), gold, "Str") == pytest.approx(wanted, abs=1e-12)
        seen.add(wanted == 0)
    assert seen == {True, False}


@pytest.mark.parametrize("kind, gold, answer, wanted", [
    ("Int", "8", "8.0", 1), ("Int", "8", "8 people", 0), ("Int", "21%", "21%", 0),
    ("Int", "8", "inf", 0), ("Float", "18.29%", "18.4", 1), ("Float", "18.29%", "0.1829", 1),
    ("Float", "18.29%", "18.6", 0), ("Float", "$49.99", "49.99 (USD)", 1),
    ("Float", "0.5", "50%", 1), ("Float", "0", "0.004", 1), ("Float", "5", "five", 0),
    ("Str", "Less well-off", '"less well-off"', 1), ("Str", "page 3", "page 4", 0),
    ("Str", "https://a.org/b", "https://a.org/c", 0), ("Str", "2015-06-08", "2015-06-09", 0),
    ("Str", "eval.py", "eval.pyc", 0), ("Str", "10 a.m.", "11 a.m.", 0),
    ("Str", "me@a.org", "me@b.org", 0), ("None", "Not answerable", "Not answerable.", 14 / 15),
    ("None", "Not answerable", "2015", 0), ("List", "['White', '10%']", "['10%', 'white']", 1),
    ("List", "['White', '10%']", "['White']", 0), ("List", "[16, 19]", "[19, 16]", 1),
    ("List", "[16, 19]", "[19, 17]", 0), ("List", "92", "['92']", 1),
    ("List", "['abcd', 'wxyz']", "['abcx', 'wxyz']", 0.75), ("List", "['a']", "[a", 0),
    ("List", "['true']", '["true"]', 1), ("List", "['a']", "[" * 10_000, 0),
])  # fmt: skip
def test_answers_about_documents_are_scored_by_their_form(kind, gold, answer, wanted):
    assert document_score(answer, gold, kind) == pytest.approx(wanted)
    assert document_score(None, gold, kind) == 0


def test_f1_of_documents_weighs_what_cannot_be_answered():
    none = "Not answerable"
    scored = [(1.0, "a", "a"), (0.6, "b", "bb"), (0.0, "c", none), (1.0, none, none),
              (0.0, none, "d"), (0.0, "e", None)]  # fmt: skip
    recall, precision = 1.6 / 4, 1.6 / 4  # of a, b, c, e; of a, bb, d and no answer
    accuracy, f1 = accuracy_and_f1(scored)
    assert accuracy == pytest.approx(2.6 / 6)
    assert f1 == pytest.approx(2 * recall * precision / (recall + precision))
    recall, precision = 1.6 / 4, 1.6 / 5
    assert accuracy_and_f1([*scored, (0.0, none, "x")])[1] == pytest.approx(
        2 * recall * precision / (recall + precision)
    )
    assert accuracy_and_f1([]) == (0, 0) and accuracy_and_f1([(0.0, "a", none)]) == (0, 0)


def test_a_short_answer_is_taken_out_of_a_reply():
    system, user = extraction("How many?", "Ten.\n========")
    fence = system["content"].split("that read ")[1].split(".")[0]
    assert user["content"].count(fence) == 4 and "Ten." in user["content"]
    assert read_extraction("Extracted answer: ['a', 'b']\nAnswer format: List\n") == "['a', 'b']"
    assert read_extraction("Extracted answer: Fail to answer\nAnswer format: String") is None
    for text in ("10", "Extracted answer:\nAnswer format: Integer", "Answer format: Integer"):
        with pytest.raises(ValueError, match="not the two lines"):
            read_extraction(text)


def test_words_in_common_are_weighed():
    assert token_f1("The users: 3 million", "3 million users") == 1
    assert token_f1("3 users", "3 million users") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert token_f1(None, "a b") == token_f1("", "b") == token_f1("c", "b") == 0


def test_all_benchmarks_have_a_score():
    question = BenchmarkQuestion(id="", question="", images=(), answers=("Ann",),
                                 references=("Ann",) * 10, answer_format="Str")  # fmt: skip
    assert [score(name)("ann", question) for name in NAMES] == [1] * len(NAMES)
    assert [score(name)(None, question) for name in NAMES] == [0] * len(NAMES)
    assert dataclasses.replace(question, id="x").references == ("Ann",) * 10
